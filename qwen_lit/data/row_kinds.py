"""The kinds of rows: which one a row is, and what turns each into examples. A new kind is listed here."""

from collections.abc import Mapping
from typing import Any

from qwen_lit.data.blocks import TextEncoder
from qwen_lit.data.chatml import Encoder
from qwen_lit.data.examples import RAW_TEXT, Row, RowEncoder
from qwen_lit.data.faults import RowError
from qwen_lit.data.records import parse_line, parse_row
from qwen_lit.data.sources import RawRow
from qwen_lit.data.text import read_text


def read_content(raw: RawRow) -> Any:
    """What a line of a file holds.

    Raises:
        RowError: it is not JSON, or the file's own format says that it is no row.
    """
    if isinstance(raw.content, bytes):
        return parse_line(raw.content)
    if isinstance(raw.content, RowError):
        raise raw.content
    return raw.content


def read_row(
    content: Any, source: str, fields: Mapping[str, str], odd_turns: str = "error", answered: bool = True
) -> Row:
    """A row of whichever kind it is.

    Args:
        content: as ``read_content`` returns it.
        source: ``path:line``.
        fields: our field name to the file's.
        odd_turns: of the configuration.
        answered: whether it is to be trained, so that a question must have an answer.

    Raises:
        RowError: it cannot be used.
    """
    return read_text(content, source, fields) or parse_row(content, source, fields, odd_turns, answered)


def encoder_of(kind: str, tokenizer: Any, options: dict[str, Any]) -> RowEncoder[Any]:
    """What turns rows of a kind into examples.

    Args:
        kind: one of ``examples.KINDS``.
        tokenizer: transformers'.
        options: of ``chatml.Encoder``.

    Raises:
        DataError: the tokenizer cannot do it.
    """
    if kind == RAW_TEXT:
        control_tokens = options.get("control_tokens", "error")
        return TextEncoder(tokenizer, max_length=options["max_length"], control_tokens=control_tokens)
    return Encoder(tokenizer, **options)
