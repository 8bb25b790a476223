"""The DataModule: prepared rows, the split, and loaders over them."""

import copy
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from qwen_lit.checks import check_ranges, check_writable
from qwen_lit.data.batches import Batch, EpochOrder, MicroBatches, ResumableLoader, collate, group
from qwen_lit.data.columns import tell_unread
from qwen_lit.data.encoding import Task
from qwen_lit.data.examples import RAW_TEXT
from qwen_lit.data.faults import DataError
from qwen_lit.data.held_out import chosen, limit
from qwen_lit.data.kinds import is_hub_name, passed_over
from qwen_lit.data.layouts import check_fields
from qwen_lit.data.overlong import CUT
from qwen_lit.data.prepare import prepare, raise_if_too_many_faults, read_report
from qwen_lit.data.report import LOSSES, Report
from qwen_lit.data.rows import Rows
from qwen_lit.data.sources import Source, Value, as_sources, expand
from qwen_lit.errors import UserError, refuse_changes
from qwen_lit.lines import plural
from qwen_lit.names import expanded
from qwen_lit.signals import leave_to_parent

log = logging.getLogger(__name__)


class QwenDataModule(L.LightningDataModule):
    """Instruction rows and raw text as batches of token ids."""

    def __init__(
        self,
        dataset_path: str | list[str | dict[str, Value]],
        val_dataset_path: str | list[str | dict[str, Value]] | None = None,
        val_size: float = 0.0,
        batch_size: int = 1,
        max_length: int = 2048,
        packing: bool = False,
        overlong: Literal["shorten", "truncate", "drop", "error"] = "shorten",
        train_on: Literal["all", "last"] = "all",
        expand_turns: Literal["auto", "off"] = "auto",
        control_tokens: Literal["error", "escape"] = "error",
        odd_turns: Literal["error", "merge"] = "error",
        on_bad_row: Literal["error", "skip"] = "error",
        max_bad_share: float = 0.1,
        fields: dict[str, str] | None = None,
        cache_dir: str | None = None,
        num_proc: int | None = None,
        num_workers: int = 0,
        seed: int = 42,
        tokenizer: Any = None,
    ) -> None:
        """Checks that the files are there; rows are read in ``prepare_data``.

        Args:
            dataset_path: file, folder, glob or name of a dataset of the hub, or a list of them or of {path, weight,
                max_rows, columns, name, split}: JSONL, a JSON array, CSV, TSV, Parquet, or raw text (.txt, .md, rows
                of {"text": …}), which is trained as it is.
            val_dataset_path: rows for validation; null takes val_size of the training rows.
            val_size: rows held out, chosen by content, each of which keeps its side when the files grow: a share below
                1, of ten rows or more one at least; or a count of distinct rows, which the same share of later rows
                joins. Of a text of more than 20,000 characters, blocks are held out; a shorter one is on one side.
            batch_size: rows in a micro-batch; with packing, it holds batch_size x max_length tokens.
            max_length: longest row, in tokens; longer raw text is cut into blocks, and none of it is lost.
            packing: fill micro-batches with whole rows end to end instead of padding; none sees another.
            overlong: what becomes of a longer row: shorten leaves out its oldest turns, then the middle of the longest
                user text, and drops it where the answer does not fit; truncate cuts the end off that answer instead;
                drop, or error.
            train_on: all assistant turns, or the last one alone.
            expand_turns: auto trains each turn with the history it will really see; off takes a row as one.
            control_tokens: text like <|im_start|> inside a message: error, or escape it.
            odd_turns: turns in an order that chat templates do not expect: error, or merge, which joins turns of one
                role in a row with an empty line, and keeps a greeting, a later system prompt, or a question after a
                tool's result.
            on_bad_row: error stops with the faults named; skip counts them, writes them down and goes on.
            max_bad_share: with skip, the share of faulty rows above which it stops all the same.
            fields: our field name to the file's, where they differ, as {instruction: question, output: answer}.
            cache_dir: folder of tokenised rows; null is ~/.cache/qwen_lit.
            num_proc: processes that tokenise; null takes one per core for large files.
            num_workers: processes that build batches; 0 is enough for tokenised rows.
            seed: of the order of rows; set by seed_everything.
            tokenizer: of the model, from transformers; rows cannot be read without it.

        Raises:
            UserError: a file is missing or a number is out of range.
        """
        check_ranges("data", locals())
        super().__init__()
        if val_size > 1 and val_size != int(val_size):
            raise UserError(f"data.val_size is {val_size}; give a share below 1, or a whole count of rows.")
        if max_bad_share > 1:
            raise UserError(f"data.max_bad_share is {max_bad_share}; it must be a share from 0 to 1.")
        cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.cache = Path(expanded(cache_dir or f"{cache_home}/qwen_lit"))
        check_writable("data.cache_dir", self.cache)
        self.sources = _checked("dataset_path", dataset_path, self.cache)
        given = val_dataset_path
        self.val_sources = _checked("val_dataset_path", given, self.cache) if given is not None else []
        self.val_size, self.batch_size, self.max_length, self.packing = val_size, batch_size, max_length, packing
        self.encoder_options: dict[str, Any] = {
            "max_length": max_length,
            "overlong": overlong,
            "train_on": train_on,
            "expand_turns": expand_turns,
            "control_tokens": control_tokens,
        }
        self.on_bad_row, self.max_bad_share, self.fields = on_bad_row, max_bad_share, fields or {}
        self.odd_turns = odd_turns
        try:
            check_fields(self.fields)
        except DataError as error:
            raise UserError(f"data.fields: {error}") from error
        self.num_proc, self.num_workers, self.seed = num_proc, num_workers, seed
        self.heaviest_first = False
        self.waited = 0.0
        """Seconds that training has waited for batches."""
        self.tokenizer = tokenizer
        self.folders: dict[int, Path] = {}
        """Folders of the prepared rows, so that files are read for their key once in a process."""
        self.train_rows: Rows | None = None
        self.val_rows: Rows | None = None
        self.report, self.val_report = Report(), Report()

    def prepare_data(self, judge: bool = True) -> None:
        """Tokenise all rows into the cache, once per machine.

        Args:
            judge: whether faulty rows are refused as ``on_bad_row`` says; an audit only counts them.

        Raises:
            UserError: faulty rows, named by path and line; or the files or the tokenizer cannot be used.
        """
        for sources in (self.sources, self.val_sources):
            if sources:
                self._prepare(sources, judge)

    def _prepare(self, sources: list[Source], judge: bool) -> Path:
        task = Task(sources, self.encoder_options, self.fields, self.odd_turns)
        try:
            folder = self.folders.get(id(sources)) or prepare(task, self.tokenizer, self.cache, self.num_proc)
            self.folders[id(sources)] = folder
            if judge:
                raise_if_too_many_faults(read_report(folder), self.on_bad_row, self.max_bad_share)
            return folder
        except DataError as error:
            raise UserError(str(error)) from error
        except OSError as error:
            reason = f"{self.cache} cannot be used ({error})"
            raise UserError(f"data.cache_dir: {reason}; set it to a folder that you can write to.") from error

    def setup(self, stage: str | None = None, judge: bool = True) -> None:
        """Open the prepared rows and split them.

        Args:
            stage: of Lightning; the rows are the same in each.
            judge: as of ``prepare_data``.

        Raises:
            UserError: no row is left to train on.
        """
        if self.train_rows is not None:
            return
        folder = self._prepare(self.sources, judge)
        self.report = read_report(folder)
        if not len(Rows(folder)):
            raise UserError(self._nothing_left(folder))
        train = Rows(folder, chosen(Rows(folder), self.sources))
        hashes = train.column("hash")
        if self.val_sources:
            val_folder = self._prepare(self.val_sources, judge)
            self.val_report = read_report(val_folder)
            val = Rows(val_folder, chosen(Rows(val_folder), self.val_sources))
            held_out = np.isin(hashes, val.column("hash"))
        else:
            held_out = hashes < limit(hashes, self.val_size, self.sources, self.cache)
            val = Rows(folder, np.unique(train.chosen[held_out]))
        if self.val_sources and held_out.any():
            log.warning("%d training rows are left out: they are validation rows too", held_out.sum())
        self.train_rows, self.val_rows = Rows(folder, train.chosen[~held_out]), val
        if not len(self.train_rows):
            raise UserError(self._nothing_left(folder))
        if self.val_size and not self.val_sources and not len(val):
            log.warning(
                "data.val_size is %s, which holds out none of %d distinct rows; give a larger share, or a count, such "
                "as data.val_size: %d",
                self.val_size,
                len(np.unique(hashes)),
                min(8, max(1, len(hashes) // 10)),
            )
        self._tell(folder)

    def _tell(self, folder: Path) -> None:
        assert self.train_rows is not None and self.val_rows is not None
        if lost := self.losses():
            log.warning("not all is trained: %s (each is named in %s)", "; ".join(lost), folder / "rows.log")
        for kind, count in self.report.changed.items():
            if kind not in LOSSES:
                log.warning("%s changed: %s (named in %s)", plural(count, "row"), kind, folder / "rows.log")
        if blocks := self.report.examples_of.get(RAW_TEXT):
            log.info("raw text, trained as it is: %s", plural(blocks, "block"))
        if told := self.report.expanded():
            log.info("%s", told)
        tell_unread(self.report.unread)
        if absent := self.report.absent():
            log.warning("%s", absent)
        supervised, tokens = self.train_rows.column("supervised").sum(), self.train_rows.column("length").sum()
        log.info(
            "%s to train on (%s, %.0f %% supervised), %d to validate",
            plural(len(self.train_rows), "row"),
            plural(int(tokens), "token"),
            100 * supervised / max(tokens, 1),
            len(self.val_rows),
        )

    def _nothing_left(self, folder: Path) -> str:
        names, lost = ", ".join(source.path for source in self.sources), "; ".join(self.losses())
        return f"no row of {names} is left to train on{': ' * bool(lost)}{lost}; see {folder / 'rows.log'}."

    def losses(self) -> list[str]:
        """What of the rows will not be trained as it stands in them, and the key that changes it."""
        overlong = self.encoder_options["overlong"]
        found = self.report.losses(self.max_length, overlong)
        return found + [f"validation: {one}" for one in self.val_report.losses(self.max_length, overlong)]

    def batches(self, rows: Rows) -> list[list[int]]:
        """Row numbers of each micro-batch of an epoch, over all ranks."""
        budget = self.batch_size * self.max_length
        return group(rows.column("length"), self.batch_size, budget, self.packing, self.seed)

    def facts(self) -> dict[str, Any]:
        """What a reader wants to know of the data."""
        assert self.train_rows is not None and self.val_rows is not None
        tokens, supervised = self.train_rows.column("length").sum(), self.train_rows.column("supervised").sum()
        blocks = int(self.train_rows.of_kind(RAW_TEXT).sum())
        return {
            "files": ", ".join(source.path for source in self.sources),
            "rows_read": self.report.rows,
            "examples_trained": len(self.train_rows),
            "examples_held_out": len(self.val_rows),
            **({"blocks_of_raw_text_trained": blocks} if blocks else {}),
            "tokens_in_an_epoch": int(tokens),
            "supervised_tokens": int(supervised),
            "share_supervised": round(float(supervised / max(1, tokens)), 6),
            "faulty_skipped": sum(self.report.faults.values()),
            "dropped": sum(self.report.dropped.values()),
            "changed": sum(self.report.changed.values()),
            "fingerprint": self._rows_digest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """What the order of rows depends on; a run is resumed only where all of it is the same."""
        if self.train_rows is None or self.trainer is None:
            return {}
        return {
            "data.dataset_path": self._rows_digest(),
            "seed_everything": self.seed,
            "data.batch_size": self.batch_size,
            "data.max_length": self.max_length,
            "data.packing": self.packing,
            "trainer.accumulate_grad_batches": self.per_step,
            "trainer.devices x trainer.num_nodes": self.trainer.world_size,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Compare the run that is resumed with this one.

        Raises:
            UserError: the order of rows would be another, with each difference.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        mine = self.state_dict()
        changes = {key: (value, mine.get(key)) for key, value in state_dict.items() if value != mine.get(key)}
        if "data.dataset_path" in changes and self.report.changed.get(CUT):
            cut = f"truncate, which cuts {self.report.changed[CUT]} answers"
            changes["data.overlong"] = ("maybe truncate of an earlier version, which is shorten now", cut)
        refuse_changes(changes)

    def _rows_digest(self) -> str:
        assert self.train_rows is not None
        digest = hashlib.sha256()
        for name in ("hash", "length", "supervised"):
            digest.update(np.ascontiguousarray(self.train_rows.column(name)).tobytes())
        return f"{len(self.train_rows)} rows, {digest.hexdigest()[:16]}"

    def places(self, epoch: int, step: int) -> list[list[str]]:
        """``path:line`` of the rows in each micro-batch of a step of an epoch on this rank, steps counted from 0."""
        assert self.train_rows is not None
        order = self._order(self.train_rows, shuffled=True)
        order.epoch, order.start = epoch, step
        return [[self.train_rows.place(row)[0] for row in batch] for batch in next(iter(order))]

    def most_tokens(self, counts: Sequence[int]) -> dict[int, int]:
        """Tokens of the largest micro-batches of an epoch together, without padding, by how many they are."""
        assert self.train_rows is not None
        lengths = self.train_rows.column("length")
        sizes = [int(lengths[batch].sum()) for batch in self._heaviest_first(self.train_rows)]
        return {count: sum(sizes[:count]) for count in counts}

    def mean_tokens(self) -> float:
        """Tokens of a micro-batch of an epoch on average, without padding."""
        assert self.train_rows is not None
        return float(self.train_rows.column("length").sum()) / self.micro_batches(1)

    def heaviest(self, count: int) -> Batch:
        """The largest so many micro-batches as one."""
        rows = self.train_rows
        assert rows is not None
        return collate([rows[row] for batch in self._heaviest_first(rows)[:count] for row in batch], self.pad_id)

    def largest_first(self) -> "QwenDataModule":
        """The same rows, with the largest micro-batches first; this one keeps its order."""
        made = copy.copy(self)
        made.heaviest_first = True
        return made

    def _heaviest_first(self, rows: Rows) -> list[list[int]]:
        lengths = rows.column("length")
        return sorted(self.batches(rows), key=lambda batch: -int(lengths[batch].sum()))

    def micro_batches(self, ranks: int) -> int:
        """Micro-batches of an epoch on each rank."""
        assert self.train_rows is not None
        return math.ceil(len(self.batches(self.train_rows)) / ranks)

    def _order(self, rows: Rows, shuffled: bool) -> EpochOrder:
        rank = self.trainer.global_rank if self.trainer else 0
        ranks = self.trainer.world_size if self.trainer else 1
        batches = self._heaviest_first(rows) if self.heaviest_first else self.batches(rows)
        # Overfitting is to see the same batches in every epoch.
        shuffled = shuffled and not self.heaviest_first and not (self.trainer and self.trainer.overfit_batches)  # type: ignore[attr-defined]
        return EpochOrder(batches, self.seed, rank, ranks, shuffled, self.per_step)

    @property
    def per_step(self) -> int:
        """Micro-batches of an optimizer step on each rank, which a loader hands out together."""
        return self.trainer.micro_batches_per_step if self.trainer else 1  # type: ignore[attr-defined]

    @property
    def pad_id(self) -> int:
        """The token that fills up what is shorter."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _loader(self, rows: Rows, shuffled: bool) -> DataLoader[Batch]:
        options: dict[str, Any] = {
            "dataset": MicroBatches(rows, self.pad_id),
            "collate_fn": list,
            "num_workers": self.num_workers,
            "worker_init_fn": leave_to_parent,
            "pin_memory": torch.cuda.is_available(),
        }
        order = self._order(rows, shuffled)
        if shuffled:
            return ResumableLoader(order, self._epoch, self._count_wait, **options)
        return DataLoader(batch_sampler=order, generator=torch.Generator().manual_seed(0), **options)

    def _epoch(self) -> int:
        return self.trainer.current_epoch if self.trainer else 0

    def _count_wait(self, seconds: float) -> None:
        self.waited += seconds

    def train_dataloader(self) -> DataLoader[Batch]:
        """Lists of the micro-batches of an optimizer step, in this epoch's order, from where the run stands."""
        assert self.train_rows is not None
        return self._loader(self.train_rows, shuffled=True)

    def val_dataloader(self) -> DataLoader[Batch] | list[Any]:
        """Lists of as many micro-batches of the validation rows, in their own order; nothing where there are none."""
        return self._loader(self.val_rows, shuffled=False) if self.val_rows is not None and len(self.val_rows) else []


def _checked(key: str, given: Any, cache: Path) -> list[Source]:
    try:
        sources = as_sources(given)
        for source in sources:
            check_fields(source.columns or {})
            if is_hub_name(source.path):
                from qwen_lit.data.hub import fetch

                source.copy = str(fetch(source, cache / "hub"))
            expand(source)
            folder = Path(expanded(source.path))
            if folder.is_dir() and (others := passed_over(folder)):
                log.warning("%s: not read: %s", source.path, ", ".join(others))
            if not 0 < source.weight < math.inf or (source.max_rows is not None and source.max_rows < 1):
                raise DataError(f"{source.path}: weight and max_rows must be above 0.")
    except DataError as error:
        raise UserError(f"data.{key}: {error}") from error
    return sources
