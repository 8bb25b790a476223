"""Conversations to token ids and labels, through the tokenizer's own chat template."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

from qwen_lit.data.records import Conversation, DataError, RowError

IGNORED = -100
START, END = "<|im_start|>assistant\n", "<|im_end|>"
EMPTY_THINK = "<think>\n\n</think>\n\n"


@dataclass
class Example:
    """One row as token ids."""

    input_ids: list[int]
    labels: list[int]
    """As long as ``input_ids`` and not shifted; -100 where nothing is trained."""
    source: str
    note: str = ""
    """What was changed to make it fit."""


def check_tokenizer(tokenizer: Any) -> None:
    """Reject a tokenizer that cannot render ChatML.

    Raises:
        DataError: it has no chat template, or ``<|im_end|>`` is not one token.
    """
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; use the Instruct model's tokenizer files.")
    if END not in tokenizer.get_vocab():
        raise DataError(f"the model's tokenizer has no {END} token; use a Qwen2 or Qwen3 tokenizer.")


def encode(
    conversation: Conversation,
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Literal["truncate", "drop", "error"] = "truncate",
    train_on: Literal["all", "last"] = "all",
    expand_turns: Literal["auto", "off"] = "auto",
    control_tokens: Literal["error", "escape"] = "error",
) -> list[Example]:
    """Token ids and labels of a conversation: the assistant's words and their ``<|im_end|>`` are trained.

    Where the template renders an earlier turn differently once others follow, each trained turn is an example of its
    own, with the history the server will show it.

    Raises:
        RowError: control tokens in a message, nothing to train, or a row too long.
    """
    messages = _guard(conversation.messages, tokenizer, control_tokens)
    turns = [i for i, wanted in enumerate(conversation.train) if wanted]
    if train_on == "last":
        turns = turns[-1:]
    if not turns:
        raise RowError("nothing to train", "has no assistant turn that is to be trained.")
    tools = conversation.tools
    whole = _render(tokenizer, messages[: turns[-1] + 1], tools)
    prefixes = [_render(tokenizer, messages[: turn + 1], tools) for turn in turns[:-1]]
    if expand_turns == "off" or all(whole.startswith(prefix) for prefix in prefixes):
        groups = [turns]
    else:
        groups = [[turn] for turn in turns]
    return [_fit(messages[: g[-1] + 1], g, conversation, tokenizer, tools, max_length, overlong) for g in groups]


def _guard(messages: list[dict[str, Any]], tokenizer: Any, policy: str) -> list[dict[str, Any]]:
    """No text of a message may become a control token: refuse it, or part it with a zero-width space."""
    control = [token for token in tokenizer.all_special_tokens if token.startswith("<|")]

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            for token in control:
                if token in value:
                    if policy == "error":
                        raise RowError(
                            "control token", f"has {token} inside a message; set control_tokens: escape."
                        )
                    value = value.replace(token, token.replace("<|", "<\u200b|"))
            return value
        if isinstance(value, list):
            return [walk(item) for item in value]
        return {key: walk(item) for key, item in value.items()} if isinstance(value, dict) else value

    return walk(copy.deepcopy(messages))


def _render(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise RowError("template", f"the chat template refuses it: {error}") from error


def _fit(
    messages: list[dict[str, Any]],
    turns: list[int],
    conversation: Conversation,
    tokenizer: Any,
    tools: Any,
    max_length: int,
    overlong: str,
) -> Example:
    example = _label(messages, turns, conversation.source, tokenizer, tools)
    length = len(example.input_ids)
    if length <= max_length:
        return example
    if overlong != "truncate":
        raise RowError("overlong", f"has {length} tokens, more than data.max_length {max_length}.")
    head = 1 if messages[0]["role"] == "system" else 0
    # The oldest turns go first, a whole exchange at a time.
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in users[1:]:
        kept = messages[:head] + messages[start:]
        shifted = [turn - start + head for turn in turns if turn >= start]
        if not shifted:
            break
        example = _label(kept, shifted, conversation.source, tokenizer, tools)
        example.note = "oldest turns dropped"
        if len(example.input_ids) <= max_length:
            return example
        last, last_turns = kept, shifted
    if len(users) < 2:
        last, last_turns = messages, turns
    longest = max((i for i, m in enumerate(last) if m["role"] == "user"), key=lambda i: len(last[i]["content"]))
    text = last[longest]["content"]
    for _ in range(20):
        over = len(example.input_ids) - max_length
        if over <= 0:
            example.note = "longest user text shortened"
            return example
        pieces = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        if len(pieces) <= over:
            break
        text = text[: pieces[-over][0]]
        last = [*last[:longest], {**last[longest], "content": text}, *last[longest + 1 :]]
        example = _label(last, last_turns, conversation.source, tokenizer, tools)
    raise RowError(
        "overlong", f"has {length} tokens; data.max_length {max_length} cannot keep its whole answer."
    )


def _label(messages: list[dict[str, Any]], turns: list[int], source: str, tokenizer: Any, tools: Any) -> Example:
    text = _render(tokenizer, messages, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    spans = []
    assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    position = 0
    for number in assistants:
        start = text.find(START, position)
        end = text.find(END, start) if start >= 0 else -1
        if start < 0 or end < 0:
            raise RowError("template", f"the chat template renders no {START!r} ... {END} for message {number}.")
        begin, position = start + len(START), end + len(END)
        if text.startswith(EMPTY_THINK, begin):
            begin += len(EMPTY_THINK)
        if number in turns:
            spans.append((begin, position))
    labels = [IGNORED] * len(ids)
    for begin, end in spans:
        for index, (left, right) in enumerate(offsets):
            if left >= begin and right <= end and right > left:
                labels[index] = ids[index]
    return Example(ids, labels, source)
