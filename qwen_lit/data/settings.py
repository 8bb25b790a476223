"""The section ``data`` of the configuration."""

from dataclasses import dataclass
from typing import Any, Literal

from qwen_lit.checks import check_ranges
from qwen_lit.data.faults import DataError
from qwen_lit.data.layouts import check_fields
from qwen_lit.data.sources import Value
from qwen_lit.errors import UserError

Paths = str | list[str | dict[str, Value]]


@dataclass
class DataSettings:
    """Which rows are trained, and how they become batches."""

    dataset_path: Paths
    """file, folder, glob or name of a dataset of the hub, or a list of them or of {path, weight, max_rows, columns,
    name, split}: JSONL, a JSON array, CSV, TSV, Parquet, or raw text (.txt, .md, rows of {"text": …}), which is
    trained as it is."""
    val_dataset_path: Paths | None = None
    """rows for validation; null takes val_size of the training rows."""
    val_size: float = 0.0
    """size of the validation split: a fraction below 1 (of ten rows or more, at least one), or a number of distinct
    rows. Rows are assigned by a hash of their content, so a row never moves between train and validation when the
    files grow (a number then grows in proportion). A raw text of more than 20,000 characters is split by blocks; a
    shorter one is on one side."""
    batch_size: int = 1
    """rows in a micro-batch on each GPU; with packing, a micro-batch holds up to batch_size x max_length tokens
    instead."""
    max_length: int = 2048
    """longest row, in tokens; overlong says what becomes of longer conversations, and longer raw text is cut into
    blocks without loss."""
    packing: bool = False
    """fill micro-batches with whole rows end to end instead of padding; no row attends to another."""
    overlong: Literal["shorten", "truncate", "drop", "error"] = "shorten"
    """what becomes of a longer row: shorten leaves out its oldest turns, then the middle of the longest user text, and
    drops it where the answer does not fit; truncate cuts the end off that answer instead; drop, or error."""
    train_on: Literal["all", "last"] = "all"
    """which turns have a loss: all assistant turns, or the last one alone."""
    expand_turns: Literal["auto", "off"] = "auto"
    """auto makes an example of each turn whose history the chat template shows otherwise once more turns follow; off
    takes a row as one example."""
    control_tokens: Literal["error", "escape"] = "error"
    """special tokens written out in a message, such as <|im_start|>: error refuses the row; escape parts them with a
    zero-width space, so that they are plain text."""
    odd_turns: Literal["error", "merge"] = "error"
    """turns in an order that chat templates do not expect: error, or merge, which joins turns of one role in a row
    with an empty line, and keeps a greeting, a later system prompt, or a question after a tool's result."""
    on_bad_row: Literal["error", "skip"] = "error"
    """what becomes of faulty rows: error stops and names them; skip leaves them out, and counts and names them in
    rows.log."""
    max_bad_share: float = 0.1
    """with on_bad_row skip, the largest share of faulty rows; a run with more stops all the same."""
    fields: dict[str, str] | None = None
    """names of columns that differ from ours, as {our name: name in the file}, such as {instruction: question, output:
    answer}."""
    cache_dir: str | None = None
    """folder in which tokenised rows are kept between runs; null is ~/.cache/qwen_lit."""
    num_proc: int | None = None
    """processes that tokenise; null takes one per core for large files."""
    num_workers: int = 0
    """worker processes of the DataLoader; 0 builds batches in the training process, which is enough for tokenised
    rows."""
    seed: int = 42
    """seed of the order of rows; set by seed_everything."""

    def __post_init__(self) -> None:
        """Check what can be known without the files.

        Raises:
            UserError: a number is out of range, or a field name is unknown.
        """
        check_ranges("data", vars(self))
        if self.val_size > 1 and self.val_size != int(self.val_size):
            raise UserError(f"data.val_size is {self.val_size}; give a share below 1, or a whole count of rows.")
        if self.max_bad_share > 1:
            raise UserError(f"data.max_bad_share is {self.max_bad_share}; it must be a share from 0 to 1.")
        try:
            check_fields(self.fields or {})
        except DataError as error:
            raise UserError(f"data.fields: {error}") from error

    @property
    def encoder_options(self) -> dict[str, Any]:
        """What of it decides how a row is tokenised, beside its fields."""
        names = ("max_length", "overlong", "train_on", "expand_turns", "control_tokens")
        return {name: getattr(self, name) for name in names}
