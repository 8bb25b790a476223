"""The audit of a whole dataset before any training, and rows as they will be trained."""

import math
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qwen_lit.data.columns import is_harmless, listed
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.examples import NO_END, RAW_TEXT
from qwen_lit.data.kinds import TEXTS, kind_of
from qwen_lit.data.packing import fill
from qwen_lit.data.report import LOSSES, Report
from qwen_lit.data.rows import Rows, numbers
from qwen_lit.lines import plural
from qwen_lit.thinking import Form

PERCENTILES = (50, 90, 95, 99, 100)


@dataclass
class Audit:
    """What would be trained, and what is wrong with it."""

    report: Report
    val_report: Report | None
    """The report of validation rows that have files of their own; None where they have none."""
    train: int
    val: int
    tokens: int
    supervised: int
    percentiles: dict[int, int]
    histogram: list[tuple[int, int]]
    """(upper bound in tokens, examples)."""
    masked: int
    """Examples in which nothing is trained."""
    endless: int
    """Examples with a trained answer that does not end in ``<|im_end|>``, and was not cut off."""
    duplicates: list[str]
    """``path:line`` of rows that say what an earlier row says."""
    blocks: int
    """Examples that are blocks of raw text."""
    fill: float
    """Share of the batches' tokens that is not padding or empty."""
    batches: int
    steps: int
    """Optimizer steps of an epoch."""
    form: Form | None = None
    """In which form the conversations are trained; None where there are none."""
    problems: list[str] = field(default_factory=list)
    """What would be lost or trained wrongly; empty when the data is right."""
    notes: list[str] = field(default_factory=list)
    """What is trained otherwise than it stands in its row, or not read."""

    @property
    def verdict(self) -> str:
        """One line: what is lost, or that nothing is, with what should be looked at."""
        if self.problems:
            return "; ".join([*self.problems, *self.notes])
        return "no row is lost, but look at: " + "; ".join(self.notes) if self.notes else "nothing is lost"


def audit(data: QwenDataModule, accumulate: int) -> Audit:
    """Counts over every prepared example of a DataModule that has been set up.

    Args:
        data: after ``setup``.
        accumulate: micro-batches of an optimizer step.
    """
    assert data.train_rows is not None and data.val_rows is not None
    rows = Rows(data.train_rows.folder)
    lengths = rows.column("length")
    batches = data.batches(data.train_rows)
    trained = data.train_rows.column("length")
    if data.settings.packing:
        share = fill(batches, trained.tolist(), data.settings.batch_size * data.settings.max_length)
    else:
        share = trained.sum() / max(1, sum(len(batch) * int(trained[batch].max()) for batch in batches))
    report = data.report
    result = Audit(
        report=report,
        val_report=data.val_report if data.val_sources else None,
        train=len(data.train_rows),
        val=len(data.val_rows),
        tokens=int(lengths.sum()),
        supervised=int(rows.column("supervised").sum()),
        percentiles={p: int(np.percentile(lengths, p, method="higher")) for p in PERCENTILES},
        histogram=_histogram(lengths),
        masked=int((rows.column("supervised") == 0).sum()),
        endless=_endless(rows),
        duplicates=_duplicates(rows),
        blocks=int(rows.of_kind(RAW_TEXT).sum()),
        fill=float(share),
        batches=len(batches),
        steps=math.ceil(len(batches) / accumulate),
        form=data.form(),
    )
    result.problems, result.notes = _problems(report, rows), _notes(report)
    if result.form is not None and (result.form.mixed or not result.form.askable):
        result.notes.append(f"conversations {result.form.shares()}: {result.form.told()}")
    if result.val_report is not None:
        found = _problems(result.val_report, Rows(data.val_rows.folder))
        result.problems += [f"validation: {problem}" for problem in found]
        result.notes += [f"validation: {note}" for note in _notes(result.val_report)]
    return result


def _problems(report: Report, rows: Rows) -> list[str]:
    """What would be lost or trained wrongly of one prepared folder."""
    masked, endless = int((rows.column("supervised") == 0).sum()), _endless(rows)
    found = [f"{plural(count, 'row')} faulty: {kind}" for kind, count in report.faults.items()]
    found += [f"{plural(count, 'row')} dropped: {kind}" for kind, count in report.dropped.items()]
    found += [f"{plural(n, 'row')} cut: {kind}" for kind, n in report.changed.items() if kind in LOSSES]
    found += [f"{plural(masked, 'row')} without a trained word"] * bool(masked)
    return found + [f"{plural(endless, 'row')} with an answer without <|im_end|>"] * bool(endless)


def _notes(report: Report) -> list[str]:
    """What of one prepared folder is not lost, and yet not as it stands in the files."""
    found = [f"{plural(count, 'row')}: {kind}" for kind, count in report.changed.items() if kind not in LOSSES]
    unread = {name: count for name, count in report.unread.items() if not is_harmless(name)}
    found += [f"not read: {listed(unread)}"] * bool(unread)
    return found + [report.absent()] * bool(report.absent())


def _histogram(lengths: np.ndarray) -> list[tuple[int, int]]:
    top = max(16, 2 ** math.ceil(math.log2(max(2, int(lengths.max())))))
    edges = np.linspace(0, top, 17).astype(int)
    counts, _ = np.histogram(lengths, edges + np.r_[np.zeros(16, int), 1])
    return [(int(edge), int(count)) for edge, count in zip(edges[1:], counts, strict=True)]


def _endless(rows: Rows) -> int:
    """Examples with a trained turn whose end is not trained, though the example says that its turns end.

    A turn is one range, or several where parts of it are not trained; the last of them ends it.
    """
    count = 0
    for batch in rows.batches:
        ids, spans = batch.column("input_ids"), batch.column("spans")
        offsets = numbers(spans.offsets)
        owner = np.repeat(np.arange(len(batch)), np.diff(offsets) // 2)
        places = numbers(spans.values)[offsets[0] : offsets[-1]].reshape(-1, 2) + numbers(ids.offsets)[owner, None]
        values, end = numbers(ids.values), numbers(batch.column("end"))[owner]
        found = set()
        for at in np.flatnonzero((end != NO_END) & (values[places[:, 1] - 1] != end)).tolist():
            more = at + 1 < len(owner) and owner[at + 1] == owner[at]
            if not more or end[at] in values[places[at, 1] : places[at + 1, 0]]:
                found.add(int(owner[at]))
        count += len(found)
    return count


def _duplicates(rows: Rows) -> list[str]:
    hashes = rows.column("hash")
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order][1:] == hashes[order][:-1]) + 1
    found: dict[str, int] = {}
    first: dict[int, str] = {}
    for at in repeated.tolist():
        # Turns of one row share its hash; only another row is a duplicate.
        earlier, later = int(order[at - 1]), int(order[at])
        first.setdefault(int(hashes[later]), rows.place(earlier)[0])
        place = rows.place(later)[0]
        if place != first[int(hashes[later])]:
            found.setdefault(place, later)
    return sorted(found, key=lambda place: found[place])


def report_lines(report: Report) -> Iterable[str]:
    """What became of the rows of some files."""
    yield f"rows            {report.rows:,} read, {report.examples:,} examples"
    for name, count in report.rows_per_source.items():
        yield f"  {count:>12,}  {name}"
    yield from textwrap.wrap(report.expanded(), 80, initial_indent="expanded        ", subsequent_indent="  ")
    yield "formats         " + (", ".join(f"{name} {count:,}" for name, count in report.formats.items()) or "none")
    for title, counts in (("faulty", report.faults), ("dropped", report.dropped), ("changed", report.changed)):
        yield f"{title:<15} " + (", ".join(f"{kind} {count:,}" for kind, count in counts.items()) or "none")
    yield "not read        " + (listed(report.unread) or "none")
    for fault in report.first:
        yield f"  {fault.source}: {fault.message}"


def text_report(result: Audit) -> Iterable[str]:
    """The audit in lines of at most 80 columns."""
    yield from report_lines(result.report)
    if result.val_report is not None:
        yield "validation files"
        yield from report_lines(result.val_report)
    yield from _figures(result)


def _figures(result: Audit) -> Iterable[str]:
    yield f"fully masked    {result.masked:,}"
    yield f"no <|im_end|>   {result.endless:,}"
    yield f"duplicates      {len(result.duplicates):,}" + "".join(f"\n  {place}" for place in result.duplicates[:5])
    if result.blocks:
        yield f"raw text        {result.blocks:,} blocks, trained as they are"
    if result.form is not None:
        said = "; ".join(filter(None, [result.form.shares(), result.form.told()]))
        yield from textwrap.wrap(said, 80, initial_indent="reasoning       ", subsequent_indent="  ")
    share = result.supervised / max(1, result.tokens)
    yield "token ids       the tokenizer's own: every row reads back as its text"
    yield f"tokens          {result.tokens:,}, {share:.1%} supervised"
    lengths = ", ".join(f"{'max' if p == 100 else f'p{p}'} {n:,}" for p, n in result.percentiles.items())
    yield f"tokens in a row {lengths}"
    most = max(count for _, count in result.histogram)
    for edge, count in result.histogram:
        yield f"  ≤{edge:>8,} {'█' * round(48 * count / most):<48} {count:,}"
    yield f"train / val     {result.train:,} / {result.val:,}"
    yield f"batches         {result.batches:,} in an epoch, {result.fill:.1%} full, {result.steps:,} optimizer steps"
    yield f"verdict         {result.verdict}"


def pieces(rows: Rows, number: int, tokenizer: Any) -> list[tuple[str, bool]]:
    """One example as (text, whether it is trained), in order."""
    ids, spans = rows[number]
    found, position = [], 0
    for begin, end in spans.tolist():
        found += [(position, begin, False), (begin, end, True)]
        position = end
    found.append((position, len(ids), False))
    return [(tokenizer.decode(ids[a:b]), trained) for a, b, trained in found if b > a]


def text_row(rows: Rows, number: int, tokenizer: Any, colour: bool) -> str:
    """One example; trained text green on a terminal, between ⟦ and ⟧ elsewhere."""
    start, stop = ("\033[32m", "\033[0m") if colour else ("⟦", "⟧")
    place, note = rows.place(number)
    body = "".join(start + text + stop if trained else text for text, trained in pieces(rows, number, tokenizer))
    return f"── {place}{f' ({note})' if note else ''} ──\n{body}"


def row_outcome(folder: Path, wanted: str) -> list[str]:
    """What became of a row that was left out or changed, as ``rows.log`` names it."""
    with (folder / "rows.log").open(encoding="utf-8", errors="backslashreplace") as lines:
        return [line.rstrip("\n") for line in lines if _is_place(line.split(": ", 1)[0], wanted)]


def _is_place(place: str, wanted: str) -> bool:
    wanted = wanted.removeprefix("./")
    return place == wanted or place.endswith("/" + wanted)


def find_rows(rows: Rows, wanted: str) -> list[int]:
    """Numbers of the examples of one row, given as ``path:line``; a line of a text file is in the block around it."""
    places = [place for batch in rows.batches for place in batch.column("place").to_pylist()]
    found = [at for at, place in enumerate(places) if _is_place(place, wanted)]
    path, _, line = wanted.rpartition(":")
    if found or not line.isdigit() or kind_of(Path(path)) not in TEXTS:
        return found
    before = [
        (int(place.rpartition(":")[2]), at)
        for at, place in enumerate(places)
        if _is_place(place.rpartition(":")[0], path) and int(place.rpartition(":")[2]) < int(line)
    ]
    return [max(before)[1]] if before else []


def spread_rows(rows: Rows, count: int) -> list[int]:
    """Numbers of ``count`` examples, spread over the data."""
    return sorted(set(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int).tolist()))
