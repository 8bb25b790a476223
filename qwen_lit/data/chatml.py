"""Conversations to token ids and labels, through the tokenizer's own chat template."""

import difflib
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from qwen_lit.data.control import guard
from qwen_lit.data.difference import parting
from qwen_lit.data.fast import FastDiffers, FastEncoder
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.overlong import CUT, shorten
from qwen_lit.data.parts import untrained
from qwen_lit.data.records import Conversation
from qwen_lit.data.render import Draft, Renderer
from qwen_lit.data.report import UNOFFERED, UNTHOUGHT

IGNORED = -100
LONGER = 8
"""Characters of a text for each token it may have, above which it has more in all likelihood."""
GROUP = 1_000_000
"""Characters that are tokenised at once, which bounds memory."""
HEADER, END = "<|im_start|>assistant\n", "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"
ESCAPED, TRAILING, SPLIT, MERGED = (
    "control tokens escaped",
    "turns after the last answer left out",
    "text before </think> made a thought by the chat template",
    "newlines before an answer in one token with its header, not trained",
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


class Encoder:
    """Turns conversations into examples; one per process."""

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int,
        overlong: Literal["shorten", "truncate", "drop", "error"] = "shorten",
        train_on: Literal["all", "last"] = "all",
        expand_turns: Literal["auto", "off"] = "auto",
        control_tokens: Literal["error", "escape"] = "error",
        exact_every: int = 1,
        fast: FastEncoder | None = None,
    ) -> None:
        """Probes the template once.

        Args:
            tokenizer: transformers' tokenizer with a ChatML template.
            max_length: most tokens of an example.
            overlong: shorten, truncate, drop (a ``RowError`` of kind ``overlong``) or error (of kind ``too long``);
                what cannot be shortened is of kind ``overlong`` too.
            train_on: every assistant turn that is to be trained, or the last one.
            expand_turns: auto gives a turn an example of its own where the template renders it differently later.
            control_tokens: error or escape.
            exact_every: of so many examples one is compared with what ``apply_chat_template`` gives by itself, token
                for token; all of them are decoded and compared with the rendered text.
            fast: encodes in the place of the tokenizer.

        Raises:
            DataError: the tokenizer has no chat template, or cannot render ChatML.
        """
        self.tokenizer, self.renderer = tokenizer, Renderer(tokenizer)
        if tokenizer.backend_tokenizer.token_to_id(END) is None:
            raise DataError(f"the model's tokenizer has no {END} token; use a Qwen2 or Qwen3 tokenizer.")
        self.backend, self.fast = tokenizer.backend_tokenizer, fast
        self.max_length, self.overlong, self.train_on = max_length, overlong, train_on
        self.expand_turns, self.control_tokens, self.exact_every = expand_turns, control_tokens, exact_every
        added = tokenizer.added_tokens_encoder
        self.control = frozenset(token for token in added if token.startswith("<|") and token.endswith("|>"))
        self.header = self._ids(HEADER)
        self.end = tokenizer.convert_tokens_to_ids(END)
        self.empty_think = self._ids(EMPTY_THINK)
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self.renderer.text(probe)
        if HEADER not in rendered or END not in rendered.partition(HEADER)[2]:
            raise DataError(
                f"the chat template renders an answer without {HEADER!r} … {END!r}: {snippet(rendered[-80:])}; use "
                "the chat template of a Qwen2 or Qwen3 model."
            )
        self.inserts_think = EMPTY_THINK in rendered or tokenizer.apply_chat_template(
            probe[:1], tokenize=False, add_generation_prompt=True, enable_thinking=False
        ).endswith(EMPTY_THINK)

    def _ids(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode(self, conversations: list[Conversation]) -> list[list[Example | RowError]]:
        """For each conversation its examples; in the place of one that cannot be used, why.

        Raises:
            DataError: ids differ from the exported tokenizer's own.
            FastDiffers: those of ``fast`` do.
        """
        outcomes = self.drafts(conversations)
        drafts = [draft for outcome in outcomes if not isinstance(outcome, RowError) for draft in outcome]
        examples = iter([example for some in _grouped(drafts) for example in self._examples(some)])
        return [
            [outcome] if isinstance(outcome, RowError) else [next(examples) for _ in outcome] for outcome in outcomes
        ]

    def _examples(self, drafts: list[Draft]) -> list[Example | RowError]:
        """The example of each draft, or why there is none."""
        # What is longer by far is cut before it is tokenised: each turn of a long conversation is a draft.
        most = LONGER * self.max_length if self.overlong in ("shorten", "truncate") else math.inf
        usual = [draft for draft in drafts if len(draft.text) <= most]
        encoded = self._tokenised([draft.text for draft in usual])
        used = [pair for pair in zip(usual, encoded, strict=True) if len(pair[1]) <= self.max_length]
        self._prove([draft for draft, _ in used], [ids for _, ids in used])
        ids = iter(encoded)
        return [self._example(draft, next(ids) if len(draft.text) <= most else None) for draft in drafts]

    def drafts(self, conversations: list[Conversation]) -> list[list[Draft] | RowError]:
        """For each conversation what is to be tokenised, rendered; or why it cannot be used."""
        outcomes: list[list[Draft] | RowError] = []
        for conversation in conversations:
            try:
                outcomes.append(self._versions(conversation))
            except RowError as error:
                outcomes.append(error)
        asked = [draft for outcome in outcomes if not isinstance(outcome, RowError) for draft in outcome]
        texts = iter(self.renderer.texts(asked))
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, RowError):
                continue
            rendered = [next(texts) for _ in outcome]
            refused = next((one for one in rendered if isinstance(one, RowError)), None)
            outcomes[number] = refused or self._one_or_each(outcome, [str(one) for one in rendered])
        return outcomes

    def _versions(self, conversation: Conversation) -> list[Draft]:
        """The conversation up to each trained turn; the last version is the whole.

        Raises:
            RowError: a control token stands in a message, or the template shows nothing of one.
        """
        try:
            escaped = guard(conversation, self.control, self.control_tokens)
        except RecursionError as error:
            raise RowError("bad JSON", "is nested too deep.") from error
        notes = [*conversation.notes, *[ESCAPED] * escaped, *self._omitted(conversation)]
        turns = [number for number, wanted in enumerate(conversation.train) if wanted]
        if self.train_on == "last":
            turns = turns[-1:]
        if turns[-1] + 1 < len(conversation.messages):
            notes.append(TRAILING)
        last = turns if self.expand_turns == "auto" else turns[-1:]
        return [
            Draft(conversation.messages[: turn + 1], turns, conversation.tools, conversation.source, list(notes))
            for turn in last
        ]

    def _omitted(self, conversation: Conversation) -> list[str]:
        """A note where the template shows none of the tools that are offered.

        Raises:
            RowError: it shows nothing of what is said.
        """
        for what in self.renderer.omitted:
            if any(message["role"] == what or message.get(what) for message in conversation.messages):
                name = {"system": "system prompts", "tool": "results of tools", "tool_calls": "tool calls"}[what]
                raise RowError("template", f"the chat template shows no {name}; train a model whose template does.")
        return [UNOFFERED] if conversation.tools and "tools" in self.renderer.omitted else []

    @staticmethod
    def _one_or_each(versions: list[Draft], texts: list[str]) -> "list[Draft] | RowError":
        """The whole alone, or, where the template renders turns differently later, each trained turn by itself."""
        whole = texts[-1]
        try:
            whole.encode("utf-8")
        except UnicodeEncodeError as error:
            return RowError("lone surrogate", f"has half of a surrogate pair: {whole[error.start]!r}.")
        for draft, text in zip(versions, texts, strict=True):
            draft.text = text
        if all(whole.startswith(text) for text in texts):
            return versions[-1:]
        for draft, turn in zip(versions, versions[-1].turns, strict=True):
            draft.turns = [turn]
        return versions

    def _example(self, draft: Draft, ids: list[int] | None) -> Example | RowError:
        try:
            return self._cut_to_fit(draft, ids)
        except RowError as error:
            return error

    def _cut_to_fit(self, draft: Draft, ids: list[int] | None) -> Example:
        """The example of a draft, cut where it is too long.

        Args:
            draft: rendered.
            ids: of its text; None where it is too long in all likelihood.

        Raises:
            RowError: it cannot be cut, or the template leaves out what is to be trained, or hides where it stands.
        """
        self._complete(draft)
        if ids is None or len(ids) > self.max_length:
            if ids is not None and self.overlong not in ("shorten", "truncate"):
                kind = "overlong" if self.overlong == "drop" else "too long"
                raise RowError(kind, f"has {len(ids)} tokens, more than data.max_length {self.max_length}.")
            draft, ids = shorten(
                draft,
                self.max_length,
                self._rendered,
                lambda text: self.backend.encode(text, add_special_tokens=False).offsets,
                self._trained_from if self.overlong == "truncate" else None,
            )
            self._prove([draft], [ids])
        spans = self._spans(ids, draft)
        if len(ids) > self.max_length:
            ids = self._whole_characters(ids[: self.max_length])
            spans = [(begin, min(end, len(ids))) for begin, end in spans if begin < len(ids)]
            draft.notes.append(CUT)
        return Example(ids, spans, draft.source, "; ".join(draft.notes))

    def _trained_from(self, ids: list[int], draft: Draft) -> int:
        """Where the first trained turn begins."""
        return self._spans(ids, draft)[0][0]

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """The ids without the last ones that are a part of a character; a character has four bytes at most."""
        for left_out in range(4):
            kept = ids[: len(ids) - left_out]
            if not self.backend.decode(kept[-4:], skip_special_tokens=False).endswith("\ufffd"):
                return kept
        return ids

    @staticmethod
    def _complete(draft: Draft) -> None:
        """Whatever is to be trained stands in the text; reasoning that does not is noted.

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

    def _rendered(self, draft: Draft) -> list[int]:
        draft.text = self.renderer.text(draft.messages, draft.tools)
        return self._tokenised([draft.text])[0]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        if self.fast is not None:
            return self.fast.encode(texts)
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _spans(self, ids: list[int], draft: Draft) -> list[tuple[int, int]]:
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
            self._check_header(ids[begin - 1], number, draft)
            if self.inserts_think and ids[begin : begin + len(self.empty_think)] == self.empty_think:
                begin += len(self.empty_think)
            if number in draft.turns and "parts" in message:
                spans += self._trained_parts(begin, position, draft, message)
            elif number in draft.turns:
                spans.append((begin, position))
        return spans

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

    def _trained_parts(self, begin: int, end: int, draft: Draft, message: dict[str, Any]) -> list[tuple[int, int]]:
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

    def _prove(self, drafts: list[Draft], encoded: list[list[int]]) -> None:
        """Every example reads back as its text, and one of ``exact_every`` is, token for token, the template's own.

        Raises:
            DataError: naming the row, with the difference.
            FastDiffers: it was encoded by ``fast``.
        """
        if self.fast is not None:
            for draft, ids in zip(drafts, encoded, strict=True):
                if not self.fast.reads_as(ids, draft.text):
                    raise FastDiffers(draft.source)
        else:
            decoded = self.backend.decode_batch(encoded, skip_special_tokens=False)
            for draft, text in zip(drafts, decoded, strict=True):
                if text != draft.text and text != unicodedata.normalize("NFC", draft.text):
                    diff = list(difflib.ndiff(draft.text.splitlines()[:50], text.splitlines()[:50]))
                    self._differs(draft.source, "\n".join(diff)[:2000].splitlines())
        chosen = slice(None, None, self.exact_every)
        for draft, ids, own in zip(drafts[chosen], encoded[chosen], self.renderer.ids(drafts[chosen]), strict=True):
            if own != ids:
                if self.fast is not None:
                    raise FastDiffers(draft.source)
                lines = parting(ids, own, lambda some: self.backend.decode(some, skip_special_tokens=False))
                self._differs(draft.source, lines)

    @staticmethod
    def _differs(source: str, lines: list[str]) -> None:
        shown = "".join(f"\n  {line}" for line in lines)
        raise DataError(f"{source}: token ids differ from the exported tokenizer's own:{shown}")


def _grouped(drafts: list[Draft]) -> Iterator[list[Draft]]:
    group, size = list[Draft](), 0
    for draft in drafts:
        if group and size + len(draft.text) > GROUP:
            yield group
            group, size = [], 0
        group.append(draft)
        size += len(draft.text)
    if group:
        yield group
