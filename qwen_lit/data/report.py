"""What became of every row of some files."""

from dataclasses import dataclass, field

from qwen_lit.data.examples import CONVERSATION, Example
from qwen_lit.data.faults import Fault
from qwen_lit.data.overlong import CUT, OLDEST, SHORTENED

TURN = "overlong turn"
"""The kind of a trained turn that is too long with its history, where others of its row are not."""
UNOFFERED, UNTHOUGHT = "tools left out by the chat template", "reasoning left out by the chat template"
LOSSES = (OLDEST, SHORTENED, CUT, UNTHOUGHT, UNOFFERED)
"""Changes with which something of a row is not trained."""
COUNTS = (
    "rows_per_source",
    "formats",
    "faults",
    "dropped",
    "changed",
    "unread",
    "mapped",
    "taken_of",
    "examples_of",
)
"""Fields that count by name."""


@dataclass
class Report:
    """What became of every row."""

    rows: int = 0
    rows_per_source: dict[str, int] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    """Rows that cannot be used, by kind."""
    dropped: dict[str, int] = field(default_factory=dict)
    """Good rows that are too long to train, by kind."""
    changed: dict[str, int] = field(default_factory=dict)
    """Examples that differ from their row or are odd, by how."""
    unread: dict[str, int] = field(default_factory=dict)
    """Rows with a column, or a key of a message, that nothing reads, by its name."""
    mapped: dict[str, int] = field(default_factory=dict)
    """Rows with a column of ``data.fields``, by its name."""
    first: list[Fault] = field(default_factory=list)
    """The first faults, in the order of the files."""
    examples: int = 0
    taken: int = 0
    """Rows of which there are examples."""
    taken_of: dict[str, int] = field(default_factory=dict)
    """Rows of which there are examples, by kind of row; a large file of raw text counts as one for each 500 kB."""
    examples_of: dict[str, int] = field(default_factory=dict)
    """Examples by kind of row."""

    def take(self, examples: list[Example]) -> None:
        """Count one row with its examples."""
        kind = examples[0].kind
        self.taken += 1
        self.examples += len(examples)
        self.taken_of[kind] = self.taken_of.get(kind, 0) + 1
        self.examples_of[kind] = self.examples_of.get(kind, 0) + len(examples)

    def expanded(self) -> str:
        """What became of rows of which each trained turn is an example of its own; empty where each row is one."""
        rows, examples = (of.get(CONVERSATION, 0) for of in (self.taken_of, self.examples_of))
        if examples <= rows or not rows:
            return ""
        return (
            f"{rows:,} rows became {examples:,} examples ({examples / rows:.3g} each): each answer is trained with "
            "the history that the server shows; data.expand_turns: off trains a row once"
        )

    def losses(self, max_length: int, overlong: str) -> list[str]:
        """What is not trained as it stands in its row, with the key that changes it; empty where all is.

        Args:
            max_length: ``data.max_length``.
            overlong: ``data.overlong``.
        """
        why = {
            "drop": f"longer than data.max_length {max_length}; raise it, or set data.overlong: shorten",
            "truncate": f"their prompt alone fills data.max_length {max_length}; raise it",
        }
        answers = f"question and answer do not fit into data.max_length {max_length}; raise it, or set "
        dropped = why.get(overlong, answers + "data.overlong: truncate, which cuts the answer")
        longer = f"longer than data.max_length {max_length}; raise it"
        found = [f"{_many(count, 'row')} skipped as faulty: {kind}; fix them" for kind, count in self.faults.items()]
        for kind, count in self.dropped.items():
            of = f"{count:,} of {_many(self.rows, 'row')} ({count / self.rows:.0%})"
            what = _many(count, "turn") if kind == TURN else of
            found.append(f"{what} dropped: {dropped}")
        for kind, how in (
            (OLDEST, f"shortened, {OLDEST}: {longer}"),
            (SHORTENED, f"shortened, {SHORTENED}: {longer}"),
            (CUT, f"cut, {CUT}: {longer}"),
            (UNTHOUGHT, UNTHOUGHT),
            (UNOFFERED, UNOFFERED),
        ):
            if changed := self.changed.get(kind):
                found.append(f"{_many(changed, 'row')} {how}")
        return found

    def absent(self) -> str:
        """Which columns of ``data.fields`` no row has, or nothing."""
        names = [name for name, count in self.mapped.items() if not count]
        return f"no row has what data.fields names: {', '.join(names)}" if names and self.taken else ""

    def add(self, other: "Report") -> None:
        """Take in the counts of a later chunk."""
        self.rows += other.rows
        self.examples += other.examples
        self.taken += other.taken
        for name in COUNTS:
            mine = getattr(self, name)
            for key, count in getattr(other, name).items():
                mine[key] = mine.get(key, 0) + count
        self.first += other.first[: max(0, 10 - len(self.first))]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
