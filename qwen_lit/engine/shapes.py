"""Micro-batches of few tokens are filled up to one of few shapes, so that one recording serves many of them.

What fills a micro-batch up is a document of its own, of which nothing is supervised: no gradient comes from it, and
the products' further rows are zeros. Borders and targets have memory that stays, on the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen_lit.data.batches import Batch
from qwen_lit.kernels.loss import IGNORED

STEP = 256
"""Tokens of the smallest shape, and between two shapes up to 8 of these; beyond, a quarter of a power of two."""

PARTS = 4
"""Supervised tokens of a shape are so many quarters of its tokens."""

LONGEST = 1024
"""Tokens of the longest document of a shape: these, or 4, 16, … times as many. Attention takes no more memory by it,
and its blocks beyond a document's end return at once."""

DOCUMENTS = 8
"""Documents of a shape, one more that fills it up apart: these, or 2, 4, … times as many. With that one they are never
a divisor of a shape's tokens, so that attention does not take the documents for equally long."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a micro-batch's tensors."""

    tokens: int
    documents: int
    longest: int
    """A length that no document is longer than."""
    targets: int
    exact: bool
    """Nothing fills it up but targets: its documents are of one length, for which attention has kernels of its own."""


def tokens_of(tokens: int) -> int:
    """The tokens of the smallest shape that so many fit in."""
    step = max(STEP, 2 ** ((tokens - 1).bit_length() - 1) // 4)
    return max(1, -(-tokens // step)) * step


def most_tokens(tokens: int) -> int:
    """The tokens of the largest shape that has no more than so many; 0 for none."""
    while tokens >= STEP and tokens_of(tokens) > tokens:
        tokens -= tokens % STEP or STEP
    return tokens if tokens >= STEP else 0


def shape_of(batch: Batch) -> Shape:
    """The smallest shape that a micro-batch fits in."""
    given, documents, longest = batch["input_ids"].numel(), len(batch["lengths"]), batch["max_seqlen"]
    tokens = tokens_of(given)
    quarter = tokens // PARTS
    targets = max(1, -(-batch["targets"].numel() // quarter)) * quarter
    if given == tokens and documents * longest == given:
        return Shape(tokens, documents, longest, targets, True)
    longest, most, room = max(longest, tokens - given), LONGEST, DOCUMENTS
    while most < longest:
        most *= 4
    while room < documents:
        room *= 2
    return Shape(tokens, room + 1, min(most, tokens), targets, False)


class Inputs:
    """A micro-batch of one shape in memory that stays."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        """Takes the memory; ``fill`` writes to it.

        Args:
            shape: of all micro-batches that are written to it.
            device: of the model.
        """
        self.shape = shape
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        """Of dropout."""
        self.share = torch.zeros((), dtype=torch.float32, device=device)
        """What the summed loss is multiplied by."""
        # What fills the supervised tokens up lies apart, so that no sum of gradients waits for many of them.
        self.unsupervised = torch.arange(shape.tokens - 1, shape.tokens - 1 - shape.targets, -1, device=device)
        self.batch: Batch = {
            "input_ids": torch.zeros(1, shape.tokens, dtype=torch.int64, device=device),
            "position_ids": torch.zeros(1, shape.tokens, dtype=torch.int64, device=device),
            "target_index": self.unsupervised.clone(),
            "targets": torch.full((shape.targets,), IGNORED, dtype=torch.int64, device=device),
            "cu_seqlens": torch.zeros(shape.documents + 1, dtype=torch.int32, device=device),
            "lengths": [],
            "max_seqlen": shape.longest,
            "tokens": shape.tokens,
        }

    def fill(self, batch: Batch, seed: int, share: Tensor) -> None:
        """Write a micro-batch, without waiting for the device.

        Args:
            batch: whose shape this is.
            seed: of its dropout.
            share: a scalar on the device.
        """
        mine, tokens, targets = self.batch, batch["input_ids"].numel(), batch["targets"].numel()
        for name in ("input_ids", "position_ids"):
            mine[name][0, :tokens].copy_(batch[name][0], non_blocking=True)
            mine[name][0, tokens:].zero_()
        mine["target_index"][:targets].copy_(batch["target_index"], non_blocking=True)
        mine["target_index"][targets:].copy_(self.unsupervised[: self.shape.targets - targets])
        mine["targets"][:targets].copy_(batch["targets"], non_blocking=True)
        mine["targets"][targets:].fill_(IGNORED)
        borders = len(batch["cu_seqlens"])
        mine["cu_seqlens"][:borders].copy_(batch["cu_seqlens"], non_blocking=True)
        # The document that fills up, and those that are empty.
        mine["cu_seqlens"][borders:].fill_(self.shape.tokens)
        self.seed.fill_(seed)
        self.share.copy_(share)
