"""The DataModule: prepared rows, the split, and loaders over them."""

import copy
import hashlib
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from qwen_lit.checks import check_writable
from qwen_lit.data.batches import Batch, EpochOrder, MicroBatches, ResumableLoader, collate, group
from qwen_lit.data.columns import tell_unread
from qwen_lit.data.encoding import Task
from qwen_lit.data.examples import RAW_TEXT
from qwen_lit.data.faults import DataError
from qwen_lit.data.given import checked_sources
from qwen_lit.data.held_out import chosen, limit
from qwen_lit.data.overlong import CUT
from qwen_lit.data.prepare import prepare, raise_if_too_many_faults, read_report
from qwen_lit.data.report import LOSSES, Report
from qwen_lit.data.rows import Rows
from qwen_lit.data.settings import DataSettings
from qwen_lit.data.sources import Source
from qwen_lit.errors import UserError, refuse_changes
from qwen_lit.lines import plural
from qwen_lit.names import expanded
from qwen_lit.seams import options_of
from qwen_lit.signals import leave_to_parent
from qwen_lit.thinking import Form, trained_form

log = logging.getLogger(__name__)


class QwenDataModule(L.LightningDataModule):
    """Instruction rows and raw text as batches of token ids."""

    def __init__(self, settings: DataSettings, tokenizer: Any = None) -> None:
        """Checks that the files are there; rows are read in ``prepare_data``.

        Args:
            settings: the section ``data``.
            tokenizer: of the model, from transformers; rows cannot be read without it.

        Raises:
            UserError: a file is missing, or the cache cannot be written.
        """
        super().__init__()
        self.settings, self.tokenizer = settings, tokenizer
        cache_home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        self.cache = Path(expanded(settings.cache_dir or f"{cache_home}/qwen_lit"))
        check_writable("data.cache_dir", self.cache)
        self.sources = checked_sources("dataset_path", settings.dataset_path, self.cache)
        given = settings.val_dataset_path
        self.val_sources = checked_sources("val_dataset_path", given, self.cache) if given is not None else []
        self.heaviest_first = False
        self.waited = 0.0
        """Seconds that training has waited for batches."""
        self.folders: dict[int, Path] = {}
        """Folders of the prepared rows, so that files are read for their key once in a process."""
        self.train_rows: Rows | None = None
        self.val_rows: Rows | None = None
        self.report, self.val_report = Report(), Report()

    def prepare_data(self, refuse_faulty: bool = True) -> None:
        """Tokenise all rows into the cache, once per machine.

        Args:
            refuse_faulty: whether faulty rows are refused as ``on_bad_row`` says; an audit only counts them.

        Raises:
            UserError: faulty rows, named by path and line; or the files or the tokenizer cannot be used.
        """
        for sources in (self.sources, self.val_sources):
            if sources:
                self._prepare(sources, refuse_faulty)

    def _prepare(self, sources: list[Source], refuse_faulty: bool) -> Path:
        task = Task(sources, self.settings.encoder_options, self.settings.fields or {}, self.settings.odd_turns)
        try:
            folder = self.folders.get(id(sources)) or prepare(task, self.tokenizer, self.cache, self.settings.num_proc)
            self.folders[id(sources)] = folder
            if refuse_faulty:
                raise_if_too_many_faults(read_report(folder), self.settings.on_bad_row, self.settings.max_bad_share)
            return folder
        except DataError as error:
            raise UserError(str(error)) from error
        except OSError as error:
            reason = f"{self.cache} cannot be used ({error})"
            raise UserError(f"data.cache_dir: {reason}; set it to a folder that you can write to.") from error

    def setup(self, stage: str | None = None, refuse_faulty: bool = True) -> None:
        """Open the prepared rows and split them.

        Args:
            stage: of Lightning; the rows are the same in each.
            refuse_faulty: as of ``prepare_data``.

        Raises:
            UserError: no row is left to train on.
        """
        if self.train_rows is not None:
            return
        folder = self._prepare(self.sources, refuse_faulty)
        self.report = read_report(folder)
        if not len(Rows(folder)):
            raise UserError(self._nothing_left(folder))
        train = Rows(folder, chosen(Rows(folder), self.sources))
        hashes = train.column("hash")
        if self.val_sources:
            val_folder = self._prepare(self.val_sources, refuse_faulty)
            self.val_report = read_report(val_folder)
            val = Rows(val_folder, chosen(Rows(val_folder), self.val_sources))
            held_out = np.isin(hashes, val.column("hash"))
        else:
            held_out = hashes < limit(hashes, self.settings.val_size, self.sources, self.cache)
            val = Rows(folder, np.unique(train.chosen[held_out]))
        if self.val_sources and held_out.any():
            log.warning("%d training rows are left out: they are validation rows too", held_out.sum())
        self.train_rows, self.val_rows = Rows(folder, train.chosen[~held_out]), val
        if not len(self.train_rows):
            raise UserError(self._nothing_left(folder))
        if self.settings.val_size and not self.val_sources and not len(val):
            log.warning(
                "data.val_size is %s, which holds out none of %d distinct rows; give a larger share, or a count, such "
                "as data.val_size: %d",
                self.settings.val_size,
                len(np.unique(hashes)),
                min(8, max(1, len(hashes) // 10)),
            )
        self._log_report(folder)

    def _log_report(self, folder: Path) -> None:
        assert self.train_rows is not None and self.val_rows is not None
        if lost := self.losses():
            log.warning("not all is trained: %s (each is named in %s)", "; ".join(lost), folder / "rows.log")
        for kind, count in self.report.changed.items():
            if kind not in LOSSES:
                log.warning("%s changed: %s (named in %s)", plural(count, "row"), kind, folder / "rows.log")
        if blocks := self.report.examples_of.get(RAW_TEXT):
            log.info("raw text, trained as it is: %s", plural(blocks, "block"))
        if expanded := self.report.expanded():
            log.info("%s", expanded)
        if (form := self.form()) is not None and (told := form.told()):
            log.info("conversations %s: %s", form.shares(), told)
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
        """Lines on what will not be trained as it stands in the rows, each with the key that changes it."""
        overlong = self.settings.encoder_options["overlong"]
        found = self.report.losses(self.settings.max_length, overlong)
        return found + [f"validation: {one}" for one in self.val_report.losses(self.settings.max_length, overlong)]

    def form(self) -> Form | None:
        """In which form the training rows' conversations are trained; None where there are none."""
        assert self.train_rows is not None
        chats = ~self.train_rows.of_kind(RAW_TEXT)
        thought = int(self.train_rows.column("thought")[chats].sum())
        return trained_form(self.tokenizer, thought, int(chats.sum()) - thought)

    def batches(self, rows: Rows) -> list[list[int]]:
        """Row numbers of each micro-batch of an epoch, over all ranks."""
        budget = self.settings.batch_size * self.settings.max_length
        return group(
            rows.column("length"), self.settings.batch_size, budget, self.settings.packing, self.settings.seed
        )

    def facts(self) -> dict[str, Any]:
        """Facts on the data for the model card and ``summary.json``, as plain values."""
        assert self.train_rows is not None and self.val_rows is not None
        tokens, supervised = self.train_rows.column("length").sum(), self.train_rows.column("supervised").sum()
        blocks = int(self.train_rows.of_kind(RAW_TEXT).sum())
        thought = int(self.train_rows.column("thought").sum())
        return {
            "files": ", ".join(source.path for source in self.sources),
            "rows_read": self.report.rows,
            "examples_trained": len(self.train_rows),
            "examples_held_out": len(self.val_rows),
            **({"blocks_of_raw_text_trained": blocks} if blocks else {}),
            **({"examples_with_reasoning": thought} if thought else {}),
            "tokens_in_an_epoch": int(tokens),
            "supervised_tokens": int(supervised),
            "share_supervised": round(float(supervised / max(1, tokens)), 6),
            "faulty_skipped": sum(self.report.faults.values()),
            "dropped": sum(self.report.dropped.values()),
            "changed": sum(self.report.changed.values()),
            "fingerprint": self._rows_digest(),
        }

    def state_dict(self) -> dict[str, Any]:
        """All that the order of rows depends on; a run is resumed only where none of it has changed."""
        if self.train_rows is None or self.trainer is None:
            return {}
        return {
            "data.dataset_path": self._rows_digest(),
            "seed_everything": self.settings.seed,
            "data.batch_size": self.settings.batch_size,
            "data.max_length": self.settings.max_length,
            "data.packing": self.settings.packing,
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
        """The ``count`` largest micro-batches of an epoch joined to one, on the CPU."""
        rows = self.train_rows
        assert rows is not None
        return collate([rows[row] for batch in self._heaviest_first(rows)[:count] for row in batch], self.pad_id)

    def largest_first(self) -> "QwenDataModule":
        """A copy of this DataModule that hands out the largest micro-batches first."""
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
        shuffled = (
            shuffled and not self.heaviest_first and not (self.trainer and options_of(self.trainer).overfit_batches)
        )
        return EpochOrder(batches, self.settings.seed, rank, ranks, shuffled, self.per_step)

    @property
    def per_step(self) -> int:
        """Micro-batches of an optimizer step on each rank, which a loader hands out together."""
        return options_of(self.trainer).micro_batches_per_step if self.trainer else 1

    @property
    def pad_id(self) -> int:
        """Id of the token that pads shorter rows."""
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)

    def _loader(self, rows: Rows, shuffled: bool) -> DataLoader[Batch]:
        options: dict[str, Any] = {
            "dataset": MicroBatches(rows, self.pad_id),
            "collate_fn": list,
            "num_workers": self.settings.num_workers,
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


def data_of(trainer: L.Trainer) -> QwenDataModule:
    """The rows of a run, which its trainer has been given."""
    return cast(QwenDataModule, trainer.datamodule)  # type: ignore[attr-defined]
