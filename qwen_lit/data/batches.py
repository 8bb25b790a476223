"""Rows to batches: padded or packed, in an order that resumes at the very next batch."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from qwen_lit.data.packing import best_fit


class Batch(TypedDict):
    """One micro-batch of ``b`` rows of ``t`` tokens."""

    input_ids: Tensor
    """int64 ``[b, t]``: one document a row, padded on the right; or ``b = 1`` with whole documents end to end."""
    position_ids: Tensor
    """int64 ``[b, t]``, each document from 0."""
    target_index: Tensor
    """int64 ``[n]``, positions in the flattened ``[b * t]`` whose next token is supervised."""
    targets: Tensor
    """int64 ``[n]``, those next tokens."""
    cu_seqlens: Tensor
    """int32 ``[documents + 1]``, where each document starts in ``[b * t]``; padding belongs to the row's document."""
    max_seqlen: int
    """The longest document."""
    tokens: int
    """Real tokens, without padding."""


def collate(examples: Sequence[tuple[Any, Any]], pad_id: int, packed: bool = False) -> Batch:
    """One micro-batch from (token ids ``[t]``, trained ranges ``[k, 2]``) of each document.

    Under a causal mask no real token sees the padding on its right, so no mask is passed on. No document is a batch
    of one padding token that trains nothing.
    """
    lengths = [len(ids) for ids, _ in examples] or [1]
    width = sum(lengths) if packed else max(lengths)
    stride = 0 if packed else width
    count = 1 if packed else len(lengths)
    ids = torch.full((count * width,), pad_id, dtype=torch.int64)
    positions = torch.arange(width).repeat(count)
    starts = np.cumsum([0, *lengths[:-1]]) if packed else np.arange(len(lengths)) * stride
    index: list[np.ndarray] = []
    for start, (tokens, spans) in zip(starts.tolist(), examples, strict=False):
        ids[start : start + len(tokens)] = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        if packed:
            positions[start : start + len(tokens)] = torch.arange(len(tokens))
        # The position before each trained token predicts it; a document's first token has none before it.
        index += [np.arange(max(begin, 1) - 1, end - 1) + start for begin, end in spans]
    where = torch.as_tensor(np.concatenate(index) if index else np.zeros(0, dtype=np.int64))
    return {
        "input_ids": ids.view(count, width),
        "position_ids": positions.view(count, width),
        "target_index": where,
        "targets": ids[where + 1],
        "cu_seqlens": torch.tensor([*starts.tolist(), count * width], dtype=torch.int32),
        "max_seqlen": max(lengths),
        "tokens": sum(len(tokens) for tokens, _ in examples),
    }


class Collate:
    """``collate`` with its settings, as a picklable callable for worker processes."""

    def __init__(self, pad_id: int, packed: bool) -> None:
        self.pad_id, self.packed = pad_id, packed

    def __call__(self, examples: Sequence[tuple[Any, Any]]) -> Batch:
        return collate(examples, self.pad_id, self.packed)


def group(lengths: np.ndarray, batch_size: int, budget: int, packing: bool, seed: int) -> list[list[int]]:
    """Row numbers of every batch, each row in exactly one.

    Args:
        lengths: int ``[rows]``, tokens of each.
        batch_size: rows of a padded batch; rows of like length share one.
        budget: tokens of a packed batch.
        packing: pack, or pad.
        seed: chooses among rows of equal length.
    """
    # While Lightning builds the model, new tensors go to the GPU unless they say otherwise.
    generator = torch.Generator("cpu").manual_seed(seed)
    ties = torch.randperm(len(lengths), generator=generator, device="cpu").numpy()
    if packing:
        packs = best_fit(lengths[ties].tolist(), budget)
        return [ties[pack].tolist() for pack in packs]
    by_length = ties[np.argsort(lengths[ties], kind="stable")] if batch_size > 1 else ties
    return [by_length[i : i + batch_size].tolist() for i in range(0, len(by_length), batch_size)]


class EpochOrder(Sampler[list[int]]):
    """The order of the batches: a pure function of (seed, epoch, position).

    Which rows share a batch is fixed by the seed; the order of the batches changes each epoch. Every rank has equally
    many; where they do not divide, the last ones are empty.
    """

    def __init__(
        self,
        batches: list[list[int]],
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        shuffled: bool = True,
        merge: int = 1,
    ) -> None:
        """Nothing is drawn before the first batch.

        Args:
            batches: row numbers of each.
            seed: of the order.
            rank: of this process.
            ranks: processes that share the batches.
            shuffled: False keeps the given order in every epoch.
            merge: so many consecutive batches of a rank are handed out as one.
        """
        self.batches, self.seed, self.rank, self.ranks, self.shuffled = batches, seed, rank, ranks, shuffled
        self.merge = merge
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.batches) / self.ranks) / self.merge)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.batches)
        order = list(range(count))
        if self.shuffled:
            order = torch.randperm(count, generator=generator, device="cpu").tolist()
        mine = order[self.rank :: self.ranks]
        mine += [-1] * (math.ceil(count / self.ranks) - len(mine))
        for at in range(self.start * self.merge, len(mine), self.merge):
            yield [row for number in mine[at : at + self.merge] if number >= 0 for row in self.batches[number]]


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose position is part of the checkpoint.

    Lightning saves and restores any loader that has ``state_dict``. The position counts batches handed out, not
    batches that workers have read ahead.
    """

    def __init__(self, data: Any, order: EpochOrder, **options: Any) -> None:
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
        batches = super().__iter__()
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.data.waited += time.perf_counter() - started
            if batch is None:
                return
            self.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and the number of its batches already handed out."""
        return {"epoch": self.order.epoch, "position": self.position * self.order.merge}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after ``state['position']`` batches of ``state['epoch']``, counted before merging."""
        self.order.epoch, self.resumed = state["epoch"], True
        self.position = math.ceil(state["position"] / self.order.merge)
