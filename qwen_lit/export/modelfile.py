"""Ollama's Modelfile: where the weights are, and a template that renders a conversation as the chat template does."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_lit.thinking import Form

IMPORTED = (
    "Qwen2ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
)
"""What Ollama takes from safetensors, of Qwen's architectures; source: its ``convert/convert.go``."""
MODELFILE = '''# ollama create NAME -f Modelfile
{source}
TEMPLATE """{template}"""
{parameters}
'''
TEMPLATE = (
    "{{ range $i, $m := .Messages }}%s<|im_start|>{{ $m.Role }}\n%s{{ $m.Content }}<|im_end|>\n{{ end }}"
    "<|im_start|>assistant\n%s"
)
UNLESS_SYSTEM = '{{ if and (eq $i 0) (ne $m.Role "system") }}%s{{ end }}'
IF_SYSTEM = '{{ if and (eq $i 0) (eq $m.Role "system") }}%s{{ end }}'
ACTION = re.compile(r"({{ .*? }})")


def modelfile(
    tokenizer: Any,
    generation: Mapping[str, Any],
    stops: Sequence[str],
    form: Form | None = None,
    source: str = "FROM .",
) -> str:
    """The Modelfile, whose template renders conversations of system, user and assistant as the tokenizer does.

    Args:
        tokenizer: with the chat template.
        generation: the generation config; its sampling settings become parameters.
        stops: tokens at which an answer ends, those of them that the vocabulary has.
        form: in which prompts were trained; None takes the chat template's own.
        source: the lines that say where the weights are.
    """
    parameters = [f'PARAMETER stop "{token}"' for token in stops if token in tokenizer.get_vocab()]
    for name, ours in (
        ("temperature", "temperature"),
        ("top_p", "top_p"),
        ("top_k", "top_k"),
        ("repetition_penalty", "repeat_penalty"),
    ):
        if generation.get(name) is not None:
            parameters.append(f"PARAMETER {ours} {generation[name]}")
    if form is not None and form.mixed:
        source = f"# Trained on conversations {form.shares()}: {form.told()}.\n{source}"
    return MODELFILE.format(source=source, template=template(tokenizer, form), parameters="\n".join(parameters))


def template(tokenizer: Any, form: Form | None = None) -> str:
    """The template in Go's language; ``rendered`` reads it."""
    default, before = default_system(tokenizer, form), before_system(tokenizer, form)
    opening = form.opening if form is not None else _prompt(tokenizer, form).rpartition("<|im_start|>assistant\n")[2]
    return TEMPLATE % (UNLESS_SYSTEM % default if default else "", IF_SYSTEM % before if before else "", opening)


def default_system(tokenizer: Any, form: Form | None = None) -> str:
    """What the chat template puts before a conversation that has no system prompt."""
    text = _prompt(tokenizer, form)
    return text[: text.index("<|im_start|>user")]


def before_system(tokenizer: Any, form: Form | None = None) -> str:
    """What the chat template puts before the words of a system prompt."""
    try:
        text = _prompt(tokenizer, form, {"role": "system", "content": "SYSTEM"})
    except Exception:  # a template may refuse system prompts, by any error
        return ""
    begun, _, rest = text.partition("<|im_start|>system\n")
    return rest.partition("SYSTEM")[0] if "SYSTEM" in rest and not begun else ""


def _prompt(tokenizer: Any, form: Form | None, *before: dict[str, str]) -> str:
    options = {} if form is None or form.enable_thinking is None else {"enable_thinking": form.enable_thinking}
    messages = [*before, {"role": "user", "content": "a"}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options))


def ollama_imports(architecture: str) -> bool:
    """Whether Ollama is known to take a model's safetensors; one that says nothing of its class is let through."""
    return not architecture or architecture in IMPORTED


def source_lines(architecture: str, gguf: str | None, output_dir: str) -> str:
    """Where Ollama finds the weights.

    Args:
        architecture: the class that config.json names.
        gguf: the GGUF file in the folder, if there is one.
        output_dir: of the run.
    """
    if gguf:
        return f"FROM ./{gguf}"
    if ollama_imports(architecture):
        return "FROM ."
    config = shlex.quote(str(Path(output_dir) / "config.yaml"))
    return (
        f"# Ollama reads safetensors of some architectures alone, and may not know {architecture}. A GGUF file,\n"
        "# which it does read, is written, and named here, by:\n"
        f"#   python -m qwen_lit export --config {config} --export.gguf q8_0\n"
        "FROM ."
    )


def rendered(text: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of a conversation: the template of a Modelfile as ``modelfile`` writes it.

    Args:
        text: the Modelfile.
        messages: each with ``role`` and ``content``.

    Raises:
        ValueError: it has an action that ``modelfile`` does not write.
    """
    body, _, tail = text.partition('TEMPLATE """')[2].partition('"""')[0].rpartition("{{ end }}")
    pieces = ACTION.split(body.removeprefix("{{ range $i, $m := .Messages }}"))
    return "".join(_turn(pieces, number, message) for number, message in enumerate(messages)) + tail


def _turn(pieces: Sequence[str], number: int, message: Mapping[str, str]) -> str:
    """One message of a conversation, through the pieces between and of the template's actions."""
    first, system, shown, found = number == 0, message["role"] == "system", True, list[str]()
    actions = {
        UNLESS_SYSTEM.partition("%s")[0]: first and not system,
        IF_SYSTEM.partition("%s")[0]: first and system,
        "{{ end }}": True,
    }
    for piece in pieces:
        if piece in actions:
            shown = actions[piece]
        elif piece in ("{{ $m.Role }}", "{{ $m.Content }}"):
            found.append(message["role" if "Role" in piece else "content"])
        elif ACTION.fullmatch(piece):
            raise ValueError(f"an action of a Modelfile that is not known: {piece}")
        elif shown:
            found.append(piece)
    return "".join(found)
