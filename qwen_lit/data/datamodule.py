"""The DataModule: rows to batches, the split, and a loader that resumes at the very next batch."""

import hashlib
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from qwen_lit.data.chatml import Example, check_tokenizer, encode
from qwen_lit.data.records import Conversation, DataError, Fault, RowError, expand_paths, read_file
from qwen_lit.errors import UserError

log = logging.getLogger(__name__)
IGNORED = -100


class Batch(TypedDict):
    """One micro-batch of ``b`` padded rows of ``t`` tokens; all int64."""

    input_ids: Tensor
    """``[b, t]``, padded on the right."""
    position_ids: Tensor
    """``[b, t]``, each row from 0."""
    target_index: Tensor
    """``[n]``, positions in the flattened ``[b * t]`` whose next token is supervised."""
    targets: Tensor
    """``[n]``, those next tokens."""


def collate(examples: Sequence[Example], pad_id: int) -> Batch:
    """Pad on the right; under a causal mask no real token sees the padding, so none is passed on."""
    width = max(len(example.input_ids) for example in examples)
    ids = torch.full((len(examples), width), pad_id)
    labels = torch.full((len(examples), width), IGNORED)
    for row, example in enumerate(examples):
        ids[row, : len(example.input_ids)] = torch.tensor(example.input_ids)
        labels[row, : len(example.labels)] = torch.tensor(example.labels)
    following = torch.full_like(labels, IGNORED)
    following[:, :-1] = labels[:, 1:]
    flat = following.flatten()
    index = (flat != IGNORED).nonzero().squeeze(1)
    positions = torch.arange(width).expand(len(examples), width).contiguous()
    return {"input_ids": ids, "position_ids": positions, "target_index": index, "targets": flat[index]}


class EpochOrder(Sampler[list[int]]):
    """Batches of row numbers, a pure function of (seed, epoch, position).

    Rows of like length share a batch. Which rows do is fixed by the seed; the order of the batches changes each epoch.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, rank: int = 0, ranks: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        ties = torch.randperm(len(lengths), generator=generator).tolist()
        by_length = sorted(ties, key=lambda row: lengths[row]) if batch_size > 1 else ties
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        self.batches = batches
        self.seed, self.rank, self.ranks = seed, rank, ranks
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return math.ceil(len(self.batches) / self.ranks)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.batches), generator=generator).tolist()
        mine = order[self.rank :: self.ranks]
        for number in mine[self.start :]:
            yield self.batches[number]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position is part of the checkpoint.

    Lightning saves and restores any loader that has ``state_dict``. The position counts batches handed out, not
    batches that workers have read ahead.
    """

    def __init__(self, data: "QwenDataModule", order: EpochOrder, **options: Any) -> None:
        # Its own generator: the workers' seed must not move the generator that dropout draws from.
        super().__init__(batch_sampler=order, generator=torch.Generator().manual_seed(order.seed), **options)
        self.data, self.order = data, order
        self.position, self.resumed = 0, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = self.data.trainer.current_epoch if self.data.trainer else 0
        if not (self.resumed and epoch == self.order.epoch and self.position < len(self.order)):
            self.position = 0
        self.resumed = False
        self.order.epoch, self.order.start = epoch, self.position
        for batch in super().__iter__():
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and the number of its batches already handed out."""
        return {"epoch": self.order.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after ``state['position']`` batches of ``state['epoch']``."""
        self.order.epoch, self.position, self.resumed = state["epoch"], state["position"], True


class QwenDataModule(L.LightningDataModule):
    """Instruction rows as batches of token ids."""

    def __init__(
        self,
        dataset_path: str | list[str],
        val_dataset_path: str | list[str] | None = None,
        val_size: float = 0.0,
        batch_size: int = 1,
        max_length: int = 2048,
        overlong: Literal["truncate", "drop", "error"] = "truncate",
        train_on: Literal["all", "last"] = "all",
        expand_turns: Literal["auto", "off"] = "auto",
        control_tokens: Literal["error", "escape"] = "error",
        on_bad_row: Literal["error", "skip"] = "error",
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        """Checks that the files are there; rows are read in ``setup``.

        Args:
            dataset_path: file, glob or list of them: JSONL (also .gz, .zst), JSON array or Parquet.
            val_dataset_path: rows for validation; null takes val_size of the training rows.
            val_size: rows held out, a share below 1 or a count, chosen by content so that no row changes side.
            batch_size: rows in a micro-batch.
            max_length: longest row, in tokens.
            overlong: what becomes of a longer row: truncate keeps the last question and the whole answer.
            train_on: all assistant turns, or the last one alone.
            expand_turns: auto trains each turn with the history it will really see; off takes a row as one.
            control_tokens: text like <|im_start|> inside a message: error, or escape it.
            on_bad_row: error stops with the faults named; skip counts them and goes on.
            num_workers: processes that build batches; 0 is enough for tokenised rows.
            seed: of the order of rows; set by seed_everything.

        Raises:
            UserError: a file is missing or a number is out of range.
        """
        super().__init__()
        if batch_size < 1:
            raise UserError(f"data.batch_size is {batch_size}; it must be at least 1.")
        if max_length < 8:
            raise UserError(f"data.max_length is {max_length}; it must be at least 8 tokens.")
        if val_size < 0:
            raise UserError(f"data.val_size is {val_size}; give a share below 1, or a count of rows.")
        try:
            self.paths = expand_paths(dataset_path)
            self.val_paths = expand_paths(val_dataset_path) if val_dataset_path else []
        except DataError as error:
            raise UserError(f"data.dataset_path: {error}") from error
        self.val_size, self.batch_size, self.max_length = val_size, batch_size, max_length
        self.options: dict[str, Any] = {
            "max_length": max_length,
            "overlong": overlong,
            "train_on": train_on,
            "expand_turns": expand_turns,
            "control_tokens": control_tokens,
        }
        self.on_bad_row, self.num_workers, self.seed = on_bad_row, num_workers, seed
        self.tokenizer: Any = None
        self.train_rows: list[Example] = []
        self.val_rows: list[Example] = []

    def setup(self, stage: str | None = None) -> None:
        """Read, check, split and tokenise all rows.

        Raises:
            UserError: faulty rows, named by path and line, or none left to train on.
        """
        if self.train_rows:
            return
        try:
            check_tokenizer(self.tokenizer)
        except DataError as error:
            raise UserError(str(error)) from error
        train, faults = self._read(self.paths)
        if self.val_paths:
            val, more = self._read(self.val_paths)
            faults += more
        else:
            train, val = self._split(train)
        self.train_rows = self._encode(train, faults)
        self.val_rows = self._encode(val, faults)
        self._report(faults)
        if not self.train_rows:
            raise UserError(f"no row of {', '.join(map(str, self.paths))} is left to train on.")
        log.info("%d rows to train on, %d to validate", len(self.train_rows), len(self.val_rows))

    def _read(self, paths: list[Path]) -> tuple[list[Conversation], list[Fault]]:
        rows: list[Conversation] = []
        faults: list[Fault] = []
        for path in paths:
            try:
                for row in read_file(path):
                    rows.append(row) if isinstance(row, Conversation) else faults.append(row)
            except DataError as error:
                raise UserError(str(error)) from error
        return rows, faults

    def _split(self, rows: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
        """Hold out rows by the hash of their content: equal rows are always on one side."""
        if not self.val_size:
            return rows, []

        def rank(row: Conversation) -> float:
            content = json.dumps([row.messages, row.tools], sort_keys=True, ensure_ascii=False)
            return int.from_bytes(hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64

        ranks = [rank(row) for row in rows]
        if self.val_size < 1:
            limit = self.val_size
        else:
            distinct = sorted(set(ranks))
            limit = distinct[min(int(self.val_size), len(distinct) - 1)]
        train = [row for row, r in zip(rows, ranks, strict=True) if r >= limit]
        return train, [row for row, r in zip(rows, ranks, strict=True) if r < limit]

    def _encode(self, rows: list[Conversation], faults: list[Fault]) -> list[Example]:
        examples: list[Example] = []
        for row in rows:
            try:
                examples += encode(row, self.tokenizer, **self.options)
            except RowError as error:
                faults.append(Fault(row.source, error.kind, str(error)))
        changed = Counter(example.note for example in examples if example.note)
        for note, count in changed.most_common():
            log.warning("%d rows changed: %s", count, note)
        return examples

    def _report(self, faults: list[Fault]) -> None:
        if not faults:
            return
        lines = [f"{fault.source}: {fault.message}" for fault in faults[:10]]
        counts = ", ".join(f"{kind}: {n}" for kind, n in Counter(fault.kind for fault in faults).most_common())
        text = "\n".join([f"{len(faults)} faulty rows ({counts})", *lines])
        if self.on_bad_row == "error":
            raise UserError(f"{text}\nmend them, or set data.on_bad_row: skip.")
        log.warning("skipped %s", text)

    def total_steps(self, trainer: L.Trainer) -> int:
        """Optimizer steps of the run, from the number of batches, the accumulation and the trainer's limits."""
        batches = math.ceil(math.ceil(len(self.train_rows) / self.batch_size) / trainer.world_size)
        limit = trainer.limit_train_batches
        if limit is not None:
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = math.ceil(batches / trainer.accumulate_grad_batches) * (trainer.max_epochs or 0)
        if trainer.max_epochs is None or trainer.max_epochs < 0:
            return max(1, trainer.max_steps)
        return max(1, min(steps, trainer.max_steps) if trainer.max_steps > 0 else steps)

    def _loader(self, rows: list[Example], shuffled: bool) -> DataLoader[Any]:
        pad = self.tokenizer.pad_token_id
        pad_id = pad if pad is not None else self.tokenizer.eos_token_id
        options: dict[str, Any] = {
            "dataset": rows,
            "collate_fn": _Collate(pad_id),
            "num_workers": self.num_workers,
            "pin_memory": torch.cuda.is_available(),
        }
        rank = self.trainer.global_rank if self.trainer else 0
        ranks = self.trainer.world_size if self.trainer else 1
        if shuffled:
            order = EpochOrder([len(row.input_ids) for row in rows], self.batch_size, self.seed, rank, ranks)
            return ResumableLoader(self, order, **options)
        return DataLoader(batch_size=self.batch_size, generator=torch.Generator().manual_seed(0), **options)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches of the training rows, in this epoch's order, from where the run stands."""
        return self._loader(self.train_rows, shuffled=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Batches of the validation rows in their own order, or nothing."""
        return self._loader(self.val_rows, shuffled=False) if self.val_rows else []


class _Collate:
    """``collate`` with its padding id, as a picklable callable for worker processes."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> Batch:
        return collate(examples, self.pad_id)
