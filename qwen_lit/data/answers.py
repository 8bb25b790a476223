"""Where the trained answers of a conversation stand among its token ids, as the chat template has rendered it."""

from typing import Any

from qwen_lit.data.faults import RowError, snippet
from qwen_lit.data.parts import untrained
from qwen_lit.data.render import Draft
from qwen_lit.data.report import UNTHOUGHT
from qwen_lit.thinking import EMPTY_THINK, HEADER, THINK, Asking

END = "<|im_end|>"
SPLIT, MERGED = (
    "text before </think> made a thought by the chat template",
    "newlines before an answer in one token with its header, not trained",
)


class Answers:
    """Finds the answers in the ids of one tokenizer and chat template."""

    def __init__(self, backend: Any, inserts_think: bool, asking: Asking) -> None:
        """Tokenises what stands around an answer.

        Args:
            backend: the ``tokenizers`` tokenizer, which has ``<|im_end|>``.
            inserts_think: whether the template begins an answer without a thought with an empty one, which the server
                writes by itself.
            asking: how the template asks for an answer.
        """
        self.backend = backend
        self.header = self._ids(HEADER)
        self.end = int(backend.token_to_id(END))
        self.empty_think = self._ids(EMPTY_THINK) if inserts_think else []
        opened = asking.opening(asking.switched(reasoned=True))
        self.opened = self._ids(opened) if opened != EMPTY_THINK else []

    def _ids(self, text: str) -> list[int]:
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def spans(self, ids: list[int], draft: Draft) -> tuple[list[tuple[int, int]], list[int]]:
        """The trained ranges ``[begin, end)``, and where each trained turn begins, in tokens.

        A turn is trained from after the newline of its header to its ``<|im_end|>`` and with it.

        Raises:
            RowError: the template hides where a turn stands.
        """
        head = self.header[:-1]
        spans: list[tuple[int, int]] = []
        begins: list[int] = []
        position = 0
        for number, message in enumerate(draft.messages):
            if message["role"] != "assistant":
                continue
            try:
                start = ids.index(head[0], position)
                while ids[start : start + len(head)] != head:
                    start = ids.index(head[0], start + 1)
                position = ids.index(self.end, start) + 1
            except ValueError as error:
                raise RowError(
                    "template", f"the chat template renders no {HEADER!r} … {END} for message {number}."
                ) from error
            begin = start + len(self.header)
            self._check_header(ids[begin - 1], number, draft)
            if self.empty_think and ids[begin : begin + len(self.empty_think)] == self.empty_think:
                begin += len(self.empty_think)
            if number in draft.turns:
                begins.append(begin)
                spans += self._parts(begin, position, draft, message) if "parts" in message else [(begin, position)]
        return spans, begins

    def asked(self, ids: list[int], begin: int) -> int:
        """Where the prompt of a turn that begins at ``begin`` ends: after what the template writes to open a thought.

        What the server writes so is trained with the thought all the same.
        """
        opened = len(self.opened)
        return begin + opened if ids[begin : begin + opened] == self.opened else begin

    def _check_header(self, last: int, number: int, draft: Draft) -> None:
        """The last token of a header is its newline, alone or with newlines that begin the answer.

        Raises:
            RowError: it is another.
        """
        if last == self.header[-1]:
            return
        text = self.backend.decode([last], skip_special_tokens=False)
        if text.strip("\n"):
            raise RowError("template", f"the chat template ends the header of message {number} with {text!r}.")
        if number in draft.turns and MERGED not in draft.notes:
            draft.notes.append(MERGED)

    def _parts(self, begin: int, end: int, draft: Draft, message: dict[str, Any]) -> list[tuple[int, int]]:
        """The ranges of ``[begin, end)`` that hold no character of an untrained part; the last ends the turn."""
        text = draft.text
        places = self.backend.encode(text, add_special_tokens=False).offsets
        first = places[begin][0]
        taken = [(first + a, first + b) for a, b in untrained(text[first : places[end - 1][0]], message)]
        kept = [at for at in range(begin, end) if not any(a < places[at][1] and places[at][0] < b for a, b in taken)]
        spans: list[tuple[int, int]] = []
        for at in kept:
            if spans and spans[-1][1] == at:
                spans[-1] = (spans[-1][0], at + 1)
            else:
                spans.append((at, at + 1))
        return spans


def is_thought(rendered: str) -> bool:
    """Whether an answer, as the chat template renders it, begins with a thought that is not empty."""
    return rendered.startswith(THINK) and not rendered.startswith(EMPTY_THINK)


def has_thought(draft: Draft) -> bool:
    """Whether a trained turn of a rendered draft begins with a thought."""
    speakers = [number for number, message in enumerate(draft.messages) if message["role"] == "assistant"]
    rendered = zip(speakers, draft.text.split(HEADER)[1:], strict=False)
    return any(number in draft.turns and is_thought(turn) for number, turn in rendered)


def check_complete(draft: Draft) -> None:
    """Whatever is to be trained stands in the rendered text; reasoning that does not is noted.

    Raises:
        RowError: part of an assistant's text does not.
    """
    rendered = draft.text.split(HEADER)[1:]
    speakers = [number for number, message in enumerate(draft.messages) if message["role"] == "assistant"]
    for number, turn in zip(speakers, rendered, strict=False):
        message = draft.messages[number]
        if number not in draft.turns:
            continue
        content, thought = message["content"], message.get("reasoning_content", "")
        if content.strip() not in turn:
            # A thought within the text may be set again, but with the answer after it.
            opened, _, rest = content.partition("</think>")
            pieces = (opened.strip().removeprefix("<think>").strip(), rest.strip())
            if not all(piece in turn for piece in pieces):
                raise RowError("template", f"loses assistant text to the chat template: {snippet(content)}")
            if not content.lstrip().startswith("<think>") and SPLIT not in draft.notes:
                draft.notes.append(SPLIT)
        if thought.strip() not in turn and UNTHOUGHT not in draft.notes:
            draft.notes.append(UNTHOUGHT)
