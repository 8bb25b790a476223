"""What a row, a message or a part says of itself about being trained, in the words of every trainer."""

import re
from typing import Any

from qwen_lit.data.faults import RowError, snippet

Message = dict[str, Any]
WORDS = ("train", "training", "trainable", "weight", "loss", "loss_weight", "loss_scale", "loss_mask")
DETAILS = ("train_detail", "training_detail")
NAMES = frozenset(WORDS + DETAILS)
ABOUT_TRAINING = re.compile(r"(^|_)(mask\w*|loss\w*|train\w*|weights?|supervis\w*|learn\w*|ignore)(_|$)")
"""Names of keys that say something of training; those that no trainer documents have no certain meaning."""


def trained(given: dict[str, Any], what: str) -> bool:
    """Whether a row, a message or a part of one is trained, by whichever of the words it has.

    Raises:
        RowError: a word is neither yes nor no.
    """
    found = True
    for word in WORDS:
        value = given.get(word)
        if value is not None:
            found = _yes(value, f"{what} has {word} {value!r}") and found
    return found


def _yes(value: Any, what: str) -> bool:
    if value in (0, "false", "False"):
        return False
    if value in (1, "true", "True"):
        return True
    raise RowError("bad weight", f"{what}; text is trained (1, true) or not (0, false).")


def refuse_unsure(key: str, what: str) -> None:
    """Stop at a key that says something of training whose meaning is not certain.

    Raises:
        RowError: it does.
    """
    if ABOUT_TRAINING.search(key):
        raise RowError(
            "bad weight",
            f"{what} has {key!r}, which seems to say what is trained; write it as train: true or train: false.",
        )


def mark_row(row: dict[str, Any], messages: list[Message]) -> set[str]:
    """Take a row's own marks over to its messages, in place: one for all, or a list with one each.

    A list is as long as the messages, or as the assistant's turns.

    Returns:
        The keys that were read.

    Raises:
        RowError: a mark is neither yes nor no, or fits neither length.
    """
    present = [word for word in WORDS if row.get(word) is not None]
    for word in present:
        value = row[word]
        if not isinstance(value, list):
            marked = messages
            flags = [_yes(value, f"the row has {word} {value!r}")] * len(messages)
        else:
            speakers = [message for message in messages if message["role"] == "assistant"]
            marked = messages if len(value) == len(messages) else speakers
            if len(value) != len(marked):
                raise RowError(
                    "bad weight",
                    f"the row's {word} has {len(value)} values for {len(messages)} messages, {len(speakers)} of them "
                    "the assistant's; give one each.",
                )
            flags = [_yes(one, f"the row's {word} holds {one!r}") for one in value]
        for message, flag in zip(marked, flags, strict=True):
            message["train"] = message["train"] and flag
    return set(present)


def detailed(text: str, detail: Any, what: str) -> list[Message]:
    """Axolotl's ranges of characters, ``[begin_offset, end_offset]`` with the end, as parts of a message.

    What no range holds is not trained, as there.

    Raises:
        RowError: a range is not one, or two overlap.
    """
    parts: list[Message] = []
    position = 0
    for one in sorted(detail, key=_begin) if isinstance(detail, list) else [detail]:
        begin, end = (one.get(name) if isinstance(one, dict) else None for name in ("begin_offset", "end_offset"))
        if not (isinstance(begin, int) and isinstance(end, int) and position <= begin <= end < len(text)):
            raise RowError(
                "bad weight", f"{what} has a range of training that does not fit its text: {snippet(repr(one))}"
            )
        parts.append({"type": "text", "text": text[position:begin], "train": False})
        flag = _yes(one.get("train", one.get("training", True)), f"{what} has the range {one!r}")
        parts.append({"type": "text", "text": text[begin : end + 1], "train": flag})
        position = end + 1
    parts.append({"type": "text", "text": text[position:], "train": False})
    return [part for part in parts if part["text"]]


def _begin(one: Any) -> int:
    begin = one.get("begin_offset") if isinstance(one, dict) else None
    return begin if isinstance(begin, int) else -1
