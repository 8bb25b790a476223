"""One optimizer step: what its forward passes have found, the clipping of its gradient, and whom to blame."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

SHOWN = 8
"""Rows that a message names."""


@dataclass(frozen=True)
class StepSums:
    """What the forward passes of an optimizer step have found on this rank, kept on the device so that none waits."""

    number: int
    """The step's number in its epoch, counted from 0."""
    losses: list[Tensor]
    """Summed loss of each forward pass, float32 scalars in nats."""
    at_once: int
    """Micro-batches of each forward pass; of the last one, those that are left."""
    tokens: Tensor
    """Supervised tokens of the step over all ranks, a float32 scalar."""

    def blamed(self, places: Sequence[Sequence[str]], alone: bool) -> list[str]:
        """The rows of the micro-batches whose loss is not finite; all of them where every loss is.

        Args:
            places: ``path:line`` of the rows in each micro-batch of the step.
            alone: no other rank can be to blame. Where one can, a rank whose own losses are finite blames nothing.
        """
        finite = torch.stack(self.losses).isfinite().tolist()
        every = all(finite) and alone
        guilty = [rows for number, rows in enumerate(places) if every or not finite[number // self.at_once]]
        return [row for rows in guilty for row in rows]


def first_of(rows: Sequence[str]) -> str:
    """The first rows, and how many more there are."""
    return ", ".join(rows[:SHOWN]) + (f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else "")


def clip_gradients(
    parameters: Sequence[nn.Parameter], norm: Tensor, limit: float | None, algorithm: GradClipAlgorithmType | None
) -> None:
    """Shorten gradients to ``trainer.gradient_clip_val``, by their norm together or each number by itself.

    Args:
        parameters: with their gradients, which are changed.
        norm: of all gradients together, a scalar on their device.
        limit: the longest norm or the largest number; None, 0 or less clips nothing.
        algorithm: by the norm, or by ``value``.
    """
    if not limit or limit < 0:
        return
    if algorithm == GradClipAlgorithmType.VALUE:
        nn.utils.clip_grad_value_(parameters, limit)
    else:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
