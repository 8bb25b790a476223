"""Conversations to token ids and labels, through the tokenizer's own chat template."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from qwen_lit.data.answers import END, Answers, check_complete, has_thought
from qwen_lit.data.control import control_names, guard
from qwen_lit.data.examples import CONVERSATION, NO_END, Example
from qwen_lit.data.faults import DataError, RowError, snippet
from qwen_lit.data.overlong import CUT, shorten
from qwen_lit.data.records import Conversation
from qwen_lit.data.render import Draft, Renderer
from qwen_lit.data.report import UNOFFERED
from qwen_lit.data.token_check import EXACT_EVERY, diff_ids, diff_text, reads_as, unlike
from qwen_lit.thinking import EMPTY_THINK, HEADER

LONGER = 8
"""Characters of a text for each token it may have, above which it has more in all likelihood."""
GROUP = 1_000_000
"""Characters that are tokenised at once, which bounds memory."""
ESCAPED, TRAILING = "control tokens escaped", "turns after the last answer left out"


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

        Raises:
            DataError: the tokenizer has no chat template, or cannot render ChatML.
        """
        self.tokenizer, self.renderer = tokenizer, Renderer(tokenizer)
        if tokenizer.backend_tokenizer.token_to_id(END) is None:
            raise DataError(f"the model's tokenizer has no {END} token; use a Qwen2 or Qwen3 tokenizer.")
        self.backend = tokenizer.backend_tokenizer
        self.max_length, self.overlong, self.train_on = max_length, overlong, train_on
        self.expand_turns, self.control_tokens = expand_turns, control_tokens
        self.control = control_names(tokenizer)
        probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        rendered = self.renderer.text(probe)
        if HEADER not in rendered or END not in rendered.partition(HEADER)[2]:
            raise DataError(
                f"the chat template renders an answer without {HEADER!r} … {END!r}: {snippet(rendered[-80:])}; use "
                "the chat template of a Qwen2 or Qwen3 model."
            )
        asking = self.renderer.asking
        self.inserts_think = EMPTY_THINK in rendered or asking.off == EMPTY_THINK
        self.answers = Answers(self.backend, self.inserts_think, asking)

    def encode(self, conversations: Sequence[Conversation]) -> list[list[Example | RowError]]:
        """For each conversation its examples; in the place of one that cannot be used, why.

        Raises:
            DataError: ids differ from the exported tokenizer's own.
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
        self._check([draft for draft, _ in used], [ids for _, ids in used])
        ids = iter(encoded)
        return [self._example(draft, next(ids) if len(draft.text) <= most else None) for draft in drafts]

    def drafts(self, conversations: Sequence[Conversation]) -> list[list[Draft] | RowError]:
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
        key = conversation.hash
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
            Draft(conversation.messages[: turn + 1], turns, conversation.tools, conversation.source, key, list(notes))
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
        check_complete(draft)
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
            self._check([draft], [ids])
        (spans, begins), end = self.answers.spans(ids, draft), self.answers.end
        if len(ids) > self.max_length:
            ids = self._whole_characters(ids[: self.max_length])
            spans = [(begin, min(stop, len(ids))) for begin, stop in spans if begin < len(ids)]
            draft.notes.append(CUT)
            # The model is not taught to stop where an answer is cut off.
            end, begins = NO_END, [begin for begin in begins if begin < len(ids)]
        note = "; ".join(draft.notes)
        prompt_end = self.answers.asked(ids, begins[-1])
        return Example(ids, spans, draft.source, CONVERSATION, draft.hash, prompt_end, end, note, has_thought(draft))

    def _trained_from(self, ids: list[int], draft: Draft) -> int:
        """Where the first trained turn begins."""
        return self.answers.spans(ids, draft)[0][0][0]

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """The ids without the last ones that are a part of a character; a character has four bytes at most."""
        for left_out in range(4):
            kept = ids[: len(ids) - left_out]
            if not self.backend.decode(kept[-4:], skip_special_tokens=False).endswith("\ufffd"):
                return kept
        return ids

    def _rendered(self, draft: Draft) -> list[int]:
        (text,) = self.renderer.texts([draft])
        if isinstance(text, RowError):
            raise text
        draft.text = text
        return self._tokenised([draft.text])[0]

    def _tokenised(self, texts: list[str]) -> list[list[int]]:
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _check(self, drafts: list[Draft], encoded: list[list[int]]) -> None:
        """Every example reads back as its text, and one of ``EXACT_EVERY`` is, token for token, the template's own.

        Raises:
            DataError: naming the row, with the difference.
        """
        decoded = self.backend.decode_batch(encoded, skip_special_tokens=False)
        for draft, text in zip(drafts, decoded, strict=True):
            if not reads_as(text, draft.text):
                raise unlike(draft.source, diff_text(draft.text, text))
        chosen = slice(None, None, EXACT_EVERY)
        for draft, ids, own in zip(drafts[chosen], encoded[chosen], self.renderer.ids(drafts[chosen]), strict=True):
            if own != ids:
                raise unlike(draft.source, diff_ids(ids, own, self.backend))


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
