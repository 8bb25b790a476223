"""Conversations to text, through the tokenizer's own chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_lit.data.faults import DataError, RowError
from qwen_lit.thinking import EMPTY_THINK, THINK, Asking

Messages = list[dict[str, Any]]
MARK = "qwen_lit_probe"
"""A word that no template says by itself."""


@dataclass
class Draft:
    """An example before its ids are known."""

    messages: Messages
    turns: list[int]
    """Numbers of the messages that are trained, in order."""
    tools: list[dict[str, Any]] | None
    source: str
    """``path:line``."""
    hash: int
    """Hash of the conversation that the example is a part of."""
    notes: list[str] = field(default_factory=list)
    """What was changed."""
    text: str = ""
    """The messages as the chat template renders them."""

    @property
    def reasoned(self) -> bool:
        """Whether its last turn, for whose sake it is asked, has a thought."""
        message = self.messages[-1]
        content = str(message["content"]).lstrip()
        written = content.startswith(THINK) and not content.startswith(EMPTY_THINK.strip())
        return written or bool(str(message.get("reasoning_content") or "").strip())


class Renderer:
    """The chat template of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Compiles the template.

        Args:
            tokenizer: transformers', with a chat template.

        Raises:
            DataError: it has none.
        """
        if not tokenizer.chat_template:
            raise DataError("the model's tokenizer has no chat template; use the Instruct model's tokenizer files.")
        self.tokenizer, self.asking = tokenizer, Asking.of(tokenizer)
        # The switch may change more of a prompt than its end: a row is rendered as it will be asked.
        self.switched = {reasoned: self.asking.switched(reasoned) for reasoned in (True, False)}
        self.omitted = self._omitted()
        """Those of ``system``, ``tool``, ``tools`` and ``tool_calls`` that the chat template leaves out."""

    def _omitted(self) -> list[str]:
        asked, answered = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        tool = {"type": "function", "function": {"name": MARK, "description": "", "parameters": {}}}
        call = {"type": "function", "function": {"name": MARK, "arguments": {}}}
        calling = {"role": "assistant", "content": "", "tool_calls": [call]}
        said = {"role": "tool", "content": MARK}
        probes: dict[str, tuple[Messages, Any]] = {
            "system": ([{"role": "system", "content": MARK}, asked, answered], None),
            "tool": ([asked, answered, said, answered], None),
            "tools": ([asked, answered], [tool]),
            "tool_calls": ([asked, calling], None),
        }
        found = []
        for name, (messages, tools) in probes.items():
            try:
                if MARK not in self.text(messages, tools):
                    found.append(name)
            except RowError:  # a row that it refuses is named then
                continue
        return found

    def text(self, messages: Messages, tools: Any = None, think: bool | None = None) -> str:
        """The text of a conversation, as the exported tokenizer renders it.

        Args:
            messages: of the conversation.
            tools: that are offered.
            think: the value of the template's switch ``enable_thinking``; None leaves it to the template.

        Raises:
            RowError: the template refuses it.
        """
        try:
            return str(self._rendered(messages, tools, think, tokenize=False))
        except Exception as error:  # a template may raise anything
            raise RowError("template", f"the chat template refuses it: {error}") from error

    def texts(self, drafts: Sequence[Draft]) -> list[str | RowError]:
        """The text of each draft, or why it has none."""
        found: list[str | RowError] = []
        try:
            return list(self._grouped(drafts, tokenize=False))
        except Exception:  # a template may raise anything; which draft it refuses is found one by one
            for draft in drafts:
                try:
                    found.append(self.text(draft.messages, draft.tools, self.switched[draft.reasoned]))
                except RowError as error:
                    found.append(error)
        return found

    def ids(self, drafts: Sequence[Draft]) -> list[list[int]]:
        """The token ids of each draft by ``apply_chat_template`` alone."""
        return self._grouped(drafts, tokenize=True)

    def _rendered(self, messages: Any, tools: Any, think: bool | None, **options: Any) -> Any:
        switch = {} if think is None else {"enable_thinking": think}
        return self.tokenizer.apply_chat_template(messages, tools=tools, **switch, **options)

    def _grouped(self, drafts: Sequence[Draft], tokenize: bool) -> list[Any]:
        """One call for all conversations with the same tools and switch costs half of one call for each."""
        groups: dict[tuple[int, bool | None], list[int]] = {}
        for number, draft in enumerate(drafts):
            groups.setdefault((id(draft.tools), self.switched[draft.reasoned]), []).append(number)
        found: list[Any] = [None] * len(drafts)
        for (_, think), numbers in groups.items():
            several = [drafts[number].messages for number in numbers]
            made = self._rendered(several, drafts[numbers[0]].tools, think, tokenize=tokenize)
            for number, one in zip(numbers, made["input_ids"] if tokenize else made, strict=True):
                found[number] = one
        return found
