"""Rows to micro-batches, and micro-batches to optimizer steps, in an order that resumes at the very next step."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from qwen_lit.data.packing import best_fit
from qwen_lit.data.rows import Rows


class Batch(TypedDict):
    """One micro-batch of ``b`` rows of ``t`` tokens.

    Loaders hand out documents end to end, so that ``b`` is 1; ``padded`` gives each document a row of its own.
    """

    input_ids: Tensor
    """int64 ``[b, t]``: whole documents end to end, or one document a row, padded on the right."""
    position_ids: Tensor
    """int64 ``[b, t]``, each document from 0."""
    target_index: Tensor
    """int64 ``[n]``, positions in the flattened ``[b * t]`` whose next token is supervised."""
    targets: Tensor
    """int64 ``[n]``, those next tokens."""
    cu_seqlens: Tensor
    """int32 ``[documents + 1]``, where each document starts in ``[b * t]``; padding belongs to the row's document."""
    lengths: list[int]
    """What ``cu_seqlens`` says, on the host: tokens of each document."""
    max_seqlen: int
    """The longest document."""
    tokens: int
    """Real tokens, without padding."""


def collate(examples: Sequence[tuple[Any, Any]], pad_id: int) -> Batch:
    """One micro-batch from (token ids ``[t]``, trained ranges ``[k, 2]``) of each document, end to end.

    No document is a micro-batch of one padding token that trains nothing.
    """
    lengths = [len(ids) for ids, _ in examples] or [1]
    starts = np.cumsum([0, *lengths])
    ids = torch.full((sum(lengths),), pad_id, dtype=torch.int64)
    positions = torch.zeros(sum(lengths), dtype=torch.int64)
    index: list[np.ndarray] = []
    for start, (tokens, spans) in zip(starts.tolist(), examples, strict=False):
        ids[start : start + len(tokens)] = torch.as_tensor(np.asarray(tokens, dtype=np.int64))
        positions[start : start + len(tokens)] = torch.arange(len(tokens))
        # The position before each trained token predicts it; a document's first token has none before it.
        index += [np.arange(max(begin, 1) - 1, end - 1) + start for begin, end in spans]
    where = torch.as_tensor(np.concatenate(index) if index else np.zeros(0, dtype=np.int64))
    return {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "target_index": where,
        "targets": ids[where + 1],
        "cu_seqlens": torch.as_tensor(starts.astype(np.int32)),
        "lengths": lengths,
        "max_seqlen": max(lengths),
        "tokens": sum(len(tokens) for tokens, _ in examples),
    }


def join(parts: Sequence[Batch]) -> Batch:
    """Micro-batches as one, their documents end to end; those without a document are left out where others have some.

    Made on the device of the parts, without waiting for it.
    """
    filled = [part for part in parts if part["tokens"]] or list(parts[:1])
    if len(filled) == 1:
        return filled[0]
    ends = np.cumsum([part["input_ids"].numel() for part in filled]).tolist()
    starts = [0, *ends[:-1]]
    return {
        "input_ids": torch.cat([part["input_ids"] for part in filled], 1),
        "position_ids": torch.cat([part["position_ids"] for part in filled], 1),
        "target_index": torch.cat([part["target_index"] + at for part, at in zip(filled, starts, strict=True)]),
        "targets": torch.cat([part["targets"] for part in filled]),
        "cu_seqlens": torch.cat(
            [
                filled[0]["cu_seqlens"][:1],
                *(part["cu_seqlens"][1:] + at for part, at in zip(filled, starts, strict=True)),
            ]
        ),
        "lengths": [length for part in filled for length in part["lengths"]],
        "max_seqlen": max(part["max_seqlen"] for part in filled),
        "tokens": sum(part["tokens"] for part in filled),
    }


def prefix(batch: Batch, tokens: int) -> Batch:
    """The first tokens of a micro-batch: whole documents, but for the last, which is cut.

    Args:
        batch: documents end to end.
        tokens: at least 1.
    """
    if batch["input_ids"].numel() <= tokens:
        return batch
    ends = np.cumsum(batch["lengths"])
    count = int(np.searchsorted(ends, tokens)) + 1
    lengths = batch["lengths"][:count]
    lengths[-1] -= int(ends[count - 1]) - tokens
    inside = batch["target_index"] < tokens
    return {
        "input_ids": batch["input_ids"][:, :tokens],
        "position_ids": batch["position_ids"][:, :tokens],
        "target_index": batch["target_index"][inside],
        "targets": batch["targets"][inside],
        "cu_seqlens": batch["cu_seqlens"][: count + 1].clamp(max=tokens),
        "lengths": lengths,
        "max_seqlen": max(lengths),
        "tokens": tokens,
    }


def padded(batch: Batch, pad_id: int) -> Batch:
    """The documents of a micro-batch as rows ``[documents, max_seqlen]``, padded on the right.

    Under a causal mask no real token sees the padding on its right, so no mask is passed on. Made on the device of
    the micro-batch, without waiting for it.
    """
    documents, width, starts = len(batch["cu_seqlens"]) - 1, batch["max_seqlen"], batch["cu_seqlens"].long()
    device = starts.device
    row = torch.repeat_interleave(
        torch.arange(documents, device=device), starts.diff(), output_size=batch["input_ids"].numel()
    )
    place = row * width + batch["position_ids"][0]
    ids = torch.full((documents * width,), pad_id, dtype=torch.int64, device=device)
    ids[place] = batch["input_ids"][0]
    return {
        "input_ids": ids.view(documents, width),
        "position_ids": torch.arange(width, device=device).repeat(documents, 1),
        "target_index": place[batch["target_index"]],
        "targets": batch["targets"],
        "cu_seqlens": (torch.arange(documents + 1, device=device) * width).int(),
        "lengths": [width] * documents,
        "max_seqlen": width,
        "tokens": batch["tokens"],
    }


class MicroBatches(Dataset[Batch]):
    """Micro-batches by the numbers of their rows, as a picklable dataset for worker processes."""

    def __init__(self, rows: Rows, pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id

    def __getitem__(self, numbers: list[int]) -> Batch:
        return collate([self.rows[number] for number in numbers], self.pad_id)


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


class EpochOrder(Sampler[list[list[int]]]):
    """The micro-batches of each optimizer step: a pure function of (seed, epoch, position).

    Which rows share a micro-batch is fixed by the seed; the order of the micro-batches changes each epoch. Every rank
    has equally many; where they do not divide, the last ones are empty. The last step of an epoch may have fewer.
    """

    def __init__(
        self,
        batches: list[list[int]],
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        shuffled: bool = True,
        per_step: int = 1,
    ) -> None:
        """Keeps the micro-batches; an epoch's order is drawn when it is iterated.

        Args:
            batches: row numbers of each micro-batch of an epoch, over all ranks.
            seed: of the order.
            rank: of this process.
            ranks: processes that share the micro-batches.
            shuffled: False keeps the given order in every epoch.
            per_step: micro-batches of a step on each rank.
        """
        self.batches, self.seed, self.rank, self.ranks, self.shuffled = batches, seed, rank, ranks, shuffled
        self.per_step = per_step
        self.epoch, self.start = 0, 0

    def __len__(self) -> int:
        return math.ceil(math.ceil(len(self.batches) / self.ranks) / self.per_step)

    def __iter__(self) -> Iterator[list[list[int]]]:
        generator = torch.Generator("cpu").manual_seed(self.seed * 1_000_003 + self.epoch)
        count = len(self.batches)
        order = list(range(count))
        if self.shuffled:
            order = torch.randperm(count, generator=generator, device="cpu").tolist()
        mine = [self.batches[number] for number in order[self.rank :: self.ranks]]
        mine += [[] for _ in range(math.ceil(count / self.ranks) - len(mine))]
        for at in range(self.start * self.per_step, len(mine), self.per_step):
            yield mine[at : at + self.per_step]


class ResumableLoader(DataLoader[Batch]):
    """A DataLoader of optimizer steps whose position is part of the checkpoint.

    Lightning saves and restores any loader that has ``state_dict``. The position counts steps handed out, not steps
    that workers have read ahead.
    """

    def __init__(
        self, order: EpochOrder, epoch: Callable[[], int], waited: Callable[[float], None], **options: Any
    ) -> None:
        """Makes the loader; rows are read when it is iterated.

        Args:
            order: the steps.
            epoch: asked when the steps of an epoch begin to be handed out: which one it is.
            waited: called with the seconds that each step took to come.
            options: of a ``DataLoader``.
        """
        # Its own generator: the workers' seed must not move the generator that dropout draws from.
        super().__init__(batch_sampler=order, generator=torch.Generator().manual_seed(order.seed), **options)
        self.order, self.epoch, self.waited = order, epoch, waited
        self.position, self.resumed = 0, False

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        epoch = self.epoch()
        if not (self.resumed and epoch == self.order.epoch and self.position < len(self.order)):
            self.position = 0
        self.resumed = False
        self.order.epoch, self.order.start = epoch, self.position
        steps = super().__iter__()
        while True:
            started = time.perf_counter()
            step = next(steps, None)
            self.waited(time.perf_counter() - started)
            if step is None:
                return
            self.position += 1
            yield step

    def state_dict(self) -> dict[str, int]:
        """Epoch and the number of its steps already handed out."""
        return {"epoch": self.order.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after ``state['position']`` steps of ``state['epoch']``."""
        self.order.epoch, self.position, self.resumed = state["epoch"], state["position"], True
