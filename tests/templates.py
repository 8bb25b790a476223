"""Minimal chat templates, one for each way in which Qwen's templates ask for an answer."""

EMPTY = "<think>\n\n</think>\n\n"


def chatml(prompt: str, block: str = EMPTY, before: str = "") -> str:
    """A template in ChatML.

    Args:
        prompt: after the header of an answer that is asked for.
        block: before an answer without reasoning, at the end of a conversation.
        before: at its beginning.
    """
    thought = "{% if m['reasoning_content'] %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n"
    answer = f"{thought}{{% elif loop.last %}}{block}{{% endif %}}" if block else ""
    return (
        f"{before}{{% for m in messages %}}<|im_start|>{{{{ m['role'] }}}}\n"
        f"{{% if m['role'] == 'assistant' %}}{answer}{{% endif %}}{{{{ m['content'] }}}}<|im_end|>\n{{% endfor %}}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{prompt}{{% endif %}}"
    )


OFF = "enable_thinking is defined and not enable_thinking"
ON = "enable_thinking is defined and enable_thinking"
THINKS_IF_LEFT = f"{{% if {OFF} %}}{EMPTY}{{% else %}}<think>\n{{% endif %}}"
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
EFFORT = f"{{% if not ({OFF}) %}}<|im_start|>system\nThink hard.<|im_end|>\n{{% endif %}}"

TEMPLATES = {
    "qwen2.5": chatml("", block="", before=DEFAULT_SYSTEM),
    "instruct": chatml("", block=""),
    "thinking": chatml("<think>\n"),
    "qwen3": chatml(f"{{% if {OFF} %}}{EMPTY}{{% endif %}}"),
    "qwen3.5": chatml(THINKS_IF_LEFT),
    "qwen3.5 small": chatml(f"{{% if {ON} %}}<think>\n{{% else %}}{EMPTY}{{% endif %}}"),
    "qwen3.8": chatml(THINKS_IF_LEFT, before=EFFORT),
}
