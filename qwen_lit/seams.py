"""What ``QwenTrainer`` has beside what Lightning's class declares, for those below it, which cannot import it."""

from typing import Protocol, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import GradClipAlgorithmType


class TrainerOptions(Protocol):
    """Options of a run that its trainer keeps as attributes."""

    micro_batches_per_step: int
    """``trainer.accumulate_grad_batches``: micro-batches of an optimizer step on each rank."""
    clip_value: int | float | None
    """``trainer.gradient_clip_val``; None does not clip."""
    gradient_clip_algorithm: GradClipAlgorithmType | None
    callbacks: list[Callback]
    fast_dev_run: bool | int
    log_every_n_steps: int
    overfit_batches: int | float
    interrupted: bool
    """Whether a signal or Ctrl-C has ended the fit."""


def options_of(trainer: L.Trainer) -> TrainerOptions:
    """The trainer as the type that declares its options.

    Args:
        trainer: a ``QwenTrainer``, which Lightning hands to hooks as its own class.
    """
    return cast(TrainerOptions, trainer)
