"""Conversations to token ids and labels, through the tokenizer's own chat template."""

import difflib
import unicodedata
from dataclasses import dataclass
from typing import Any, Literal

from qwen_lit.data.records import Conversation, DataError, RowError, guard

IGNORED = -100
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
ESCAPED, OLDEST, SHORTENED, TRAILING = (
    "control tokens escaped",
    "oldest turns dropped",
    "longest user text shortened",
    "turns after the last answer left out",
)


@dataclass
class Example:
    """What is trained at once: a row, or one turn of it with the history that the server will show."""

    input_ids: list[int]
    spans: list[tuple[int, int]]
    """Ranges ``[begin, end)`` of ``input_ids`` that are trained, in order."""
    source: str
    """``path:line``."""
    note: str = ""
    """What was changed, ``; `` between changes."""

    @property
    def labels(self) -> list[int]:
        """As long as ``input_ids`` and not shifted; -100 where nothing is trained."""
        labels = [IGNORED] * len(self.input_ids)
        for begin, end in self.spans:
            labels[begin:end] = self.input_ids[begin:end]
        return labels


@dataclass
class _Draft:
    """An example before its ids are known."""

    messages: list[dict[str, Any]]
    turns: list[int]
    text: str
    notes: list[str]
    owner: int


class Encoder:
    """Turns conversations into examples; one per process."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        train_on: Literal["all", "last"] = "all",
        expand_turns: Literal["auto", "off"] = "auto",
        control_tokens: Literal["error", "escape"] = "error",
        exact_every: int = 16,
    ) -> None:
        """Probes the template once.

        Args:
            tokenizer: transformers' tokenizer with a ChatML template.
            max_length: most tokens of an example.
            overlong: truncate, drop (a ``RowError`` of kind ``overlong``) or error (of kind ``too long``).
            train_on: every assistant turn that is to be trained, or the last one.
            expand_turns: auto gives a turn an example of its own where the template renders it differently later.
            control_tokens: error or escape.
            exact_every: of so many examples one is compared with ``apply_chat_template(tokenize=True)``; all of
                them are decoded and compared with the rendered text.

        Raises:
            DataError: the tokenizer has no chat template, or cannot render ChatML.
        """
        if not tokenizer.chat_template:
            raise DataError("the model's tokenizer has no chat template; use the Instruct model's tokenizer files.")
        if END not in tokenizer.get_vocab():
            raise DataError(f"the model's tokenizer has no {END} token; use a Qwen2 or Qwen3 tokenizer.")
        self.tokenizer = tokenizer
        self.backend = tokenizer.backend_tokenizer
        self.max_length, self.overlong, self.train_on = max_length, overlong, train_on
        self.expand_turns, self.control_tokens, self.exact_every = expand_turns, control_tokens, exact_every
        added = tokenizer.added_tokens_encoder
        self.control = frozenset(token for token in added if token.startswith("<|") and token.endswith("|>"))
        self.header = self._ids(HEADER)
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.empty_think = self._ids(EMPTY_THINK)
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.inserts_think = EMPTY_THINK in self.render(probe, None) or tokenizer.apply_chat_template(
            probe[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False
        ).endswith(EMPTY_THINK)

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def render(self, messages: list[dict[str, Any]], tools: Any) -> str:
        """The text of a conversation, as the exported tokenizer renders it.

        Raises:
            RowError: the template refuses it.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
        except Exception as error:  # a template may raise anything
            raise RowError("template", f"the chat template refuses it: {error}") from error

    def encode(self, conversations: list[Conversation]) -> list[list[Example] | RowError]:
        """For each conversation its examples, or why it cannot be used.

        Raises:
            DataError: ids differ from the exported tokenizer's own.
        """
        outcomes: list[list[Example] | RowError] = [[] for _ in conversations]
        drafts: list[_Draft] = []
        for number, whole in enumerate(self._whole(conversations)):
            try:
                if isinstance(whole, RowError):
                    raise whole
                drafts += self._by_turn(whole, conversations[number].tools)
            except RowError as error:
                outcomes[number] = error
        encoded = [e.ids for e in self.backend.encode_batch_fast([d.text for d in drafts], add_special_tokens=False)]
        self._prove(drafts, encoded, conversations)
        for draft, ids in zip(drafts, encoded, strict=True):
            outcome, conversation = outcomes[draft.owner], conversations[draft.owner]
            if isinstance(outcome, RowError):
                continue
            try:
                example = Example(ids, self._spans(ids, draft), conversation.source)
                if len(ids) > self.max_length:
                    example = self._shorten(draft, conversation, len(ids))
                example.note = "; ".join(draft.notes)
                outcome.append(example)
            except RowError as error:
                outcomes[draft.owner] = error
        return outcomes

    def _whole(self, conversations: list[Conversation]) -> list["_Draft | RowError"]:
        """Each conversation as one draft, up to its last trained turn."""
        drafts: list[_Draft | RowError] = []
        for number, conversation in enumerate(conversations):
            try:
                notes = [ESCAPED] if guard(conversation, self.control, self.control_tokens) else []
            except RowError as error:
                drafts.append(error)
                continue
            turns = [i for i, wanted in enumerate(conversation.train) if wanted]
            if self.train_on == "last":
                turns = turns[-1:]
            if turns[-1] + 1 < len(conversation.messages):
                notes.append(TRAILING)
            drafts.append(_Draft(conversation.messages[: turns[-1] + 1], turns, "", notes, number))
        # One call for all conversations without tools costs half of one call for each.
        plain = [d for d in drafts if isinstance(d, _Draft) and conversations[d.owner].tools is None]
        try:
            texts = self.tokenizer.apply_chat_template([d.messages for d in plain], tokenize=False) if plain else []
        except Exception:  # a template may raise anything; which row it refuses is found below
            texts = []
        for draft, text in zip(plain, texts, strict=False):
            draft.text = text
        for number, one in enumerate(drafts):
            if isinstance(one, _Draft):
                try:
                    one.text = one.text or self.render(one.messages, conversations[number].tools)
                    one.text.encode("utf-8")
                except RowError as error:
                    drafts[number] = error
                except UnicodeEncodeError as error:
                    where = one.text[error.start]
                    drafts[number] = RowError("lone surrogate", f"has half of a surrogate pair: {where!r}.")
        return drafts

    def _by_turn(self, whole: "_Draft", tools: Any) -> list["_Draft"]:
        """The draft itself, or one for each trained turn where the template renders turns differently later."""
        prefixes = [self.render(whole.messages[: turn + 1], tools) for turn in whole.turns[:-1]]
        if self.expand_turns == "off" or all(whole.text.startswith(prefix) for prefix in prefixes):
            return [whole]
        return [
            _Draft(whole.messages[: turn + 1], [turn], text, list(whole.notes), whole.owner)
            for turn, text in zip(whole.turns, [*prefixes, whole.text], strict=True)
        ]

    def _spans(self, ids: list[int], draft: _Draft) -> list[tuple[int, int]]:
        """Where the trained turns stand: after the header's newline, to ``<|im_end|>`` and with it."""
        head = self.header[:-1]
        spans, position = [], 0
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
            if self.inserts_think and ids[begin : begin + len(self.empty_think)] == self.empty_think:
                begin += len(self.empty_think)
            if number in draft.turns:
                spans.append((begin, position))
        return spans

    def _prove(self, drafts: list[_Draft], encoded: list[list[int]], conversations: list[Conversation]) -> None:
        for number, text in enumerate(self.backend.decode_batch(encoded, skip_special_tokens=False)):
            wanted = drafts[number].text
            if text != wanted and text != unicodedata.normalize("NFC", wanted):
                self._differs(conversations[drafts[number].owner].source, wanted, text)
        for number in range(0, len(drafts), self.exact_every):
            draft = drafts[number]
            conversation = conversations[draft.owner]
            ids = self.tokenizer.apply_chat_template(draft.messages, tools=conversation.tools)["input_ids"]
            if list(ids) != encoded[number]:
                both = self.backend.decode_batch([list(ids), encoded[number]], skip_special_tokens=False)
                self._differs(conversation.source, *both)

    @staticmethod
    def _differs(source: str, wanted: str, found: str) -> None:
        diff = "\n".join(difflib.ndiff(wanted.splitlines()[:50], found.splitlines()[:50]))[:2000]
        raise DataError(f"{source}: token ids differ from the exported tokenizer's own:\n{diff}")

    def _shorten(self, draft: _Draft, conversation: Conversation, length: int) -> Example:
        """The oldest turns go first, then the middle of the longest user text; the answer stays whole."""
        if self.overlong != "truncate":
            kind = "overlong" if self.overlong == "drop" else "too long"
            raise RowError(kind, f"has {length} tokens, more than data.max_length {self.max_length}.")
        for start, messages, turns in self._without_oldest(draft):
            example = self._again(messages, turns, conversation)
            if start and OLDEST not in draft.notes:
                draft.notes.append(OLDEST)
            if len(example.input_ids) <= self.max_length:
                return example
        longest = max(
            (i for i, message in enumerate(messages) if message["role"] == "user"),
            key=lambda i: len(messages[i]["content"]),
            default=None,
        )
        text = messages[longest]["content"] if longest is not None else ""
        for _ in range(8):
            over = len(example.input_ids) - self.max_length
            if over <= 0:
                draft.notes.append(SHORTENED)
                return example
            pieces = self.backend.encode(text, add_special_tokens=False).offsets
            keep = len(pieces) - over
            if longest is None or keep < 1:
                break
            tail = keep // 2
            text = text[: pieces[keep - tail - 1][1]] + (text[pieces[len(pieces) - tail][0] :] if tail else "")
            messages = [*messages[:longest], {**messages[longest], "content": text}, *messages[longest + 1 :]]
            example = self._again(messages, turns, conversation)
        raise RowError(
            "overlong", f"has {length} tokens; data.max_length {self.max_length} cannot hold its question and answer."
        )

    @staticmethod
    def _without_oldest(draft: _Draft) -> list[tuple[int, list[dict[str, Any]], list[int]]]:
        """The conversation whole, then without its first exchange, its first two, and so on to the last."""
        head = 1 if draft.messages[0]["role"] == "system" else 0
        starts = [i for i, message in enumerate(draft.messages) if message["role"] == "user"]
        kept: list[tuple[int, list[dict[str, Any]], list[int]]] = [(0, draft.messages, draft.turns)]
        for start in starts[1:]:
            turns = [turn - start + head for turn in draft.turns if turn >= start]
            if turns:
                kept.append((start, draft.messages[:head] + draft.messages[start:], turns))
        return kept

    def _again(self, messages: list[dict[str, Any]], turns: list[int], conversation: Conversation) -> Example:
        text = self.render(messages, conversation.tools)
        ids = self._ids(text)
        draft = _Draft(messages, turns, text, [], 0)
        self._prove([draft], [ids], [conversation])
        return Example(ids, self._spans(ids, draft), conversation.source)
