"""Columns and keys that are no text of a conversation: known to be harmless, refused, or reported as not read."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwen_lit.data.faults import RowError
from qwen_lit.data.marks import ABOUT_TRAINING, Message

log = logging.getLogger(__name__)
HARMLESS = frozenset(
    """
    id ids idx index uid uuid guid no number hash md5 sha sha256 fingerprint name tool_call_id
    source sources src dataset data_source dataset_name dataset_id origin url urls link file filename path license
    category categories subcategory cat topic topics subtopic tag tags type types task tasks task_type task_name kind
    domain subject area difficulty level grade split subset version
    language languages lang langs locale country region state
    date time timestamp timestamps ts created created_at updated_at modified create_time update_time
    model models model_name generator annotator annotators author user user_name username
    score scores rating ratings quality rank likes upvotes votes views toxicity toxic redacted flagged
    moderation openai_moderation detoxify_moderation hashed_ip header
    turn turns num_turns n_turns round length lengths len tokens num_tokens n_tokens token_count
    metadata meta meta_data info annotations usage finish_reason stop_reason
    """.split()
)
ENDINGS = ("_id", "_ids", "_idx", "_hash", "_count", "_score", "_url", "_date", "_time", "_at", "_model", "_tokens")
MEDIA = frozenset({"image", "images", "video", "videos", "audio", "audios", "pixel_values", "image_path"})
PREFERENCE = frozenset(
    {
        "chosen",
        "rejected",
        "rejected_response",
        "rejected_messages",
        "rejected_images",
        "rejected_conversations",
        "kto_tag",
        "preferred",
        "dispreferred",
    }
)


@dataclass(slots=True)
class Seen:
    """What is reported of one row beside its conversation."""

    notes: dict[str, None] = field(default_factory=dict)
    """What was changed or is odd, in order."""
    unread: set[str] = field(default_factory=set)
    """Names of columns and keys that nothing reads."""
    mapped: set[str] = field(default_factory=set)
    """Columns of ``data.fields`` that the row has."""
    tools: Any = None
    """Tools that stand in a message."""


def renamed(given: Message, fields: Mapping[str, str] | None, seen: Seen, before: str = "") -> Message:
    """A row or message by our names; a field that is null is absent, as many writers mean it.

    Args:
        given: as the file has it.
        fields: our name to the file's.
        seen: gains the columns that were found, and the names of fields in whose place another is read.
        before: stands before such a name.
    """
    if None in given.values():
        given = {key: value for key, value in given.items() if value is not None}
    if not fields:
        return given
    found = {ours: given[theirs] for ours, theirs in fields.items() if theirs in given}
    taken = set(fields.values())
    seen.mapped |= {fields[ours] for ours in found}
    seen.unread |= {before + key for key in found.keys() & given.keys() if key not in taken}
    return {key: value for key, value in given.items() if key not in taken and key not in found} | found


def is_harmless(name: str) -> bool:
    """Whether a column's or a key's name says that it holds no text of a conversation."""
    name = name.rpartition(".")[2].lower()
    return name in HARMLESS or name.endswith(ENDINGS)


def listed(unread: dict[str, int]) -> str:
    """Names of columns and keys with the rows that have them."""
    return ", ".join(f"{name} ({count:,} row{'s' * (count != 1)})" for name, count in unread.items())


def tell_unread(unread: dict[str, int]) -> None:
    """Say once which columns nothing reads; those whose names say that they hold no conversation in a lower voice."""
    for say, harmless in ((log.warning, False), (log.info, True)):
        counts = {name: count for name, count in unread.items() if is_harmless(name) == harmless}
        if counts:
            say("columns not read: %s", listed(counts))


def refuse(given: dict[str, Any], what: str) -> None:
    """Stop at columns or keys that make a row something else than text to be trained.

    Raises:
        RowError: it holds pictures, or two answers to choose from.
    """
    media = sorted(key for key in given.keys() & MEDIA if given[key])
    if media:
        raise RowError("media", f"{what} has {media[0]!r}; pictures, video and sound are not trained here.")
    preference = sorted(key for key in given.keys() & PREFERENCE if given[key] is not None)
    if isinstance(given.get("label"), bool):
        preference.append("label")
    if preference:
        raise RowError(
            "preference data",
            f"{what} is preference data ({', '.join(preference)}), which says which answer is better and is not "
            "trained here; write the good answers as rows of their own.",
        )


def leftover(row: dict[str, Any], used: set[str], messages: list[dict[str, Any]], seen: Seen) -> None:
    """Count the columns that nothing has read, but for what the messages say too.

    Raises:
        RowError: one says something of training whose meaning is not certain.
    """
    for key, value in row.items():
        if key in used or value in ("", [], {}) or (isinstance(value, str) and not value.strip()):
            continue
        if ABOUT_TRAINING.search(key) and _flags(value):
            raise RowError(
                "bad weight",
                f"the row has {key!r}, which seems to say what is trained; write it as train: true or train: false.",
            )
        if not (isinstance(value, str) and _said(value.strip(), messages)):
            seen.unread.add(key)


def _flags(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(one, int | float) for one in value)
    return isinstance(value, int | float)


def _said(text: str, messages: list[dict[str, Any]]) -> bool:
    """Whether a message is this text, or the text is a rendering of the question and the answer."""
    contents = [message["content"].strip() for message in messages]
    question = next((one for one, message in zip(contents, messages, strict=True) if message["role"] == "user"), "")
    if text in contents:
        return True
    lines = [line for one in (question, contents[-1]) for line in one.split("\n")]
    return bool(question and contents[-1]) and all(line in text for line in lines)
