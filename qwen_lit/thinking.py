"""How an answer begins: what a chat template writes before it, by its switch ``enable_thinking``, and in which of
these forms a run was trained, so that it is asked in the same one."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEADER = "<|im_start|>assistant\n"
THINK, EMPTY_THINK = "<think>", "<think>\n\n</think>\n\n"
PROMPT_FORM = "prompt_form.json"
"""Beside exported weights: the form in which they were trained, and are to be asked."""


def asked(
    tokenizer: Any, messages: Sequence[dict[str, Any]], think: bool | None = None, tools: Any = None
) -> list[int]:
    """Token ids of a prompt, as the chat template renders it for an answer.

    Args:
        tokenizer: transformers', with a chat template.
        messages: of the conversation so far.
        think: the value of the template's switch; None leaves it to the template.
        tools: that are offered.
    """
    options = {} if think is None else {"enable_thinking": think}
    return list(
        tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=True, **options)["input_ids"]
    )


@dataclass(frozen=True)
class Asking:
    """How a chat template asks for an answer: what its prompt has after the header of the answer."""

    default: str
    on: str
    """With ``enable_thinking`` true."""
    off: str
    """With ``enable_thinking`` false."""
    switch: bool
    """Whether ``enable_thinking`` changes anything of a prompt."""
    by_itself: bool | None
    """The value of the switch that the template takes by itself; None without a switch."""
    trained_plain: str
    """What an answer without reasoning is trained behind: an empty thought, or nothing."""

    @classmethod
    def of(cls, tokenizer: Any) -> "Asking":
        """Ask the template of a tokenizer itself.

        Args:
            tokenizer: transformers', with a chat template.
        """
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]

        def prompt(**options: bool) -> str:
            return str(tokenizer.apply_chat_template(probe[:1], tokenize=False, add_generation_prompt=True, **options))

        def opening(text: str) -> str:
            return text.rpartition(HEADER)[2] if HEADER in text else ""

        default, on, off = prompt(), prompt(enable_thinking=True), prompt(enable_thinking=False)
        answered = tokenizer.apply_chat_template(probe, tokenize=False).rpartition(HEADER)[2]
        return cls(
            opening(default),
            opening(on),
            opening(off),
            on != off,
            None if on == off else default == on,
            EMPTY_THINK if answered.startswith(EMPTY_THINK) else "",
        )

    def opening(self, think: bool | None) -> str:
        """What the prompt has after the header, by the value of the switch."""
        return self.default if think is None else self.on if think else self.off

    def switched(self, reasoned: bool) -> bool | None:
        """The value of the switch that asks for an answer with reasoning, or for one without, as it is trained; None
        where the template has no switch, or neither value asks so."""
        return next((value for value in (reasoned, not reasoned) if self.switch and self.asks(reasoned, value)), None)

    def asks(self, reasoned: bool, think: bool | None) -> bool:
        """Whether a value of the switch asks for such an answer in the form in which it is trained.

        A thought is trained from its first word on, so that the prompt may open it; an empty one is not trained, so
        that the prompt has to hold all of it.
        """
        opening = self.opening(think)
        return opening != EMPTY_THINK if reasoned else opening == self.trained_plain


@dataclass(frozen=True)
class Form:
    """In which form the conversations of a run were trained."""

    with_reasoning: int
    """Examples whose answer begins with a thought."""
    without_reasoning: int
    enable_thinking: bool | None
    """The value of the template's switch that asks as most of them were trained; None leaves it to the template."""
    opening: str
    """What the prompt then has after the header of the answer."""
    template_default: bool
    """Whether the template asks so by itself."""
    askable: bool
    """Whether the template can ask so at all."""

    @property
    def kwargs(self) -> dict[str, bool]:
        """What a server's chat template has to be given; nothing where it does so by itself."""
        if self.enable_thinking is None or self.template_default:
            return {}
        return {"enable_thinking": self.enable_thinking}

    @property
    def mixed(self) -> bool:
        """Whether some examples have reasoning and others do not."""
        return bool(self.with_reasoning and self.without_reasoning)

    def shares(self) -> str:
        """How many have reasoning, in words."""
        every = self.with_reasoning + self.without_reasoning
        if not self.mixed:
            return "all with reasoning" if self.with_reasoning else "all without reasoning"
        return f"{self.with_reasoning:,} of {every:,} with reasoning ({self.with_reasoning / every:.0%})"

    def told(self) -> str:
        """How it is served, and what to do; empty where the template does what was trained by itself."""
        value = str(self.enable_thinking).lower()
        if not self.askable:
            return (
                "the chat template asks for another form than answers without reasoning are trained in, behind an "
                "empty thought: only Ollama's Modelfile will ask so; give the rows reasoning (reasoning_content), or "
                "train a model whose template can be asked not to think"
            )
        if self.mixed and self.enable_thinking is None:
            return (
                "the chat template has no switch, so the model will choose by itself when to think; keep one kind, or "
                "let a system prompt in the rows tell them apart"
            )
        if self.mixed:
            why = "the template does" if self.with_reasoning == self.without_reasoning else "most are"
            return (
                f"each is asked as it was trained by enable_thinking true or false; served with {value} by default, "
                f"as {why}; keep one kind if only one will be asked"
            )
        return f"trained, and so served, with enable_thinking {value}" if self.kwargs else ""

    def write(self, folder: Path) -> None:
        """Keep it beside exported weights."""
        (folder / PROMPT_FORM).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def trained_form(tokenizer: Any, with_reasoning: int, without_reasoning: int) -> Form | None:
    """The form that most examples were trained in; of as many with reasoning as without, what the template does.

    Args:
        tokenizer: transformers', with a chat template.
        with_reasoning: conversations whose answer begins with a thought.
        without_reasoning: the others.

    Returns:
        None where there are no conversations.
    """
    if not with_reasoning and not without_reasoning:
        return None
    asking = Asking.of(tokenizer)
    most = with_reasoning > without_reasoning
    if with_reasoning == without_reasoning:
        most = bool(asking.by_itself)
    think = asking.switched(most)
    askable = asking.asks(most, think)
    opening = asking.opening(think) if askable else "" if most else asking.trained_plain
    return Form(with_reasoning, without_reasoning, think, opening, think in (None, asking.by_itself), askable)


def form_of(value: Any) -> Form | None:
    """A form as ``asdict`` wrote it; None where it is none."""
    try:
        return Form(**value)
    except TypeError:
        return None


def read_form(folder: Path) -> Form | None:
    """The form that stands beside exported weights; None where it is not known."""
    try:
        return form_of(json.loads((folder / PROMPT_FORM).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None
