"""How long a run is: its limits, its optimizer steps, and whether they have an end."""

import logging
import math
from typing import Any

import lightning as L

from qwen_lit.callbacks.accepted import TRAINING
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.errors import UserError
from qwen_lit.lines import plural
from qwen_lit.model.schedules import ENDLESS
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)
EPOCHS = 3
"""Where nothing else ends the run."""


def check_duration(config: Any, command: str) -> None:
    """Give the run an end where the configuration names none, and refuse one whose schedule would have none.

    Args:
        config: of the command, with the sections ``trainer`` and ``model``; changed in place.
        command: whose configuration it is.

    Raises:
        UserError: nothing would be trained, or nobody could say when the learning rate has to be down.
    """
    trainer = config.trainer
    trainer.max_steps = -1 if trainer.max_steps is None else trainer.max_steps
    limit = _max_time(trainer)
    if trainer.max_epochs is None and trainer.max_steps == -1 and limit is None:
        trainer.max_epochs = EPOCHS
        if command in TRAINING:
            log.info("trainer.max_epochs is not given: the run takes %d epochs", EPOCHS)
    if command not in TRAINING:
        return
    for name in ("max_steps", "max_epochs"):
        value = getattr(trainer, name)
        if value is not None and (value == 0 or value < -1):
            raise UserError(f"trainer.{name} is {value}, so nothing would be trained; give a number above 0.")
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}; it must be at least 1."
        )
    if trainer.limit_train_batches == 0:
        raise UserError("trainer.limit_train_batches is 0, so nothing would be trained; leave it out.")
    if isinstance(trainer.val_check_interval, int) and trainer.val_check_interval == 0:
        raise UserError(
            "trainer.val_check_interval is 0, but it counts the optimizer steps between two validations; give a "
            "number above 0, or trainer.limit_val_batches: 0 for no validation."
        )
    epochs = trainer.max_epochs if trainer.max_epochs is not None else -1
    if trainer.min_epochs and 0 < epochs < trainer.min_epochs:
        raise UserError(f"trainer.min_epochs is {trainer.min_epochs}, above trainer.max_epochs {epochs}; lower it.")
    if epochs > 0 or trainer.max_steps > 0 or trainer.fast_dev_run:
        return
    if limit is None:
        raise UserError(
            "trainer.max_epochs is -1, so the run has no end and the learning rate none to fall to; set "
            "trainer.max_steps, or a number of epochs."
        )
    if config.model.lr_scheduler not in ENDLESS:
        raise UserError(
            f"trainer.max_time is {limit}, but without trainer.max_epochs or trainer.max_steps nobody knows how many "
            f"steps the learning rate has to fall over ({config.model.lr_scheduler}); set one of them, or "
            f"model.lr_scheduler: {', '.join(ENDLESS[:-1])} or {ENDLESS[-1]}."
        )
    trainer.max_epochs = -1


def _max_time(trainer: Any) -> Any:
    """The time after which the run ends, by the option or by a Timer."""
    callbacks = trainer.callbacks if isinstance(trainer.callbacks, list) else []
    timers = [one.init_args.duration for one in callbacks if one.class_path.endswith(".Timer")]
    return next((one for one in (trainer.max_time, *timers) if one is not None), None)


def check_limits(trainer: L.Trainer, data: QwenDataModule) -> None:
    """Refuse limits that the data cannot fill, once its rows are counted and before the model is loaded.

    Raises:
        UserError: nothing would be trained, or validation would never come.
    """
    batches, limit = _full_epoch(trainer, data), trainer.limit_train_batches
    if isinstance(limit, float) and limit < 1 and not int(batches * limit):
        raise UserError(
            f"trainer.limit_train_batches is {limit} of {plural(batches, 'optimizer step')}, which is none; give a "
            "larger share, or their number."
        )
    check_validation_share(trainer, data)
    batches, every = epoch_steps(trainer, data), trainer.val_check_interval
    validates = trainer.limit_val_batches and trainer.check_val_every_n_epoch is not None
    if isinstance(every, int) and not isinstance(every, bool) and every > batches and validates:
        raise UserError(
            f"trainer.val_check_interval is {every}, but an epoch has {plural(batches, 'optimizer step')}; lower "
            "it, or set trainer.check_val_every_n_epoch: null to count over epochs."
        )
    total, least = total_steps(trainer, data), trainer.min_steps
    if total is not None and least and least > total:
        raise UserError(
            f"trainer.min_steps is {least}, but the run has {total} optimizer steps; raise trainer.max_epochs, or "
            "lower it."
        )


def check_validation_share(trainer: L.Trainer, data: QwenDataModule) -> None:
    """Refuse a share of the validation that is no whole batch, once its rows are counted.

    Raises:
        UserError: it is.
    """
    limit, per_step = trainer.limit_val_batches, options_of(trainer).micro_batches_per_step
    if not isinstance(limit, float) or not 0 < limit < 1 or data.val_rows is None or not len(data.val_rows):
        return
    micro_batches = math.ceil(len(data.batches(data.val_rows)) / trainer.world_size)
    batches = math.ceil(micro_batches / per_step)
    if not int(batches * limit):
        # Lightning takes the share that is overfitted for that of the validation too.
        key = "overfit_batches" if options_of(trainer).overfit_batches else "limit_val_batches"
        raise UserError(
            f"trainer.{key} is {limit} of {plural(batches, 'validation batch')}, each of up to "
            f"{per_step} micro-batches, which is none; give a larger share, or their number."
        )


def _full_epoch(trainer: L.Trainer, data: QwenDataModule) -> int:
    """Optimizer steps of an epoch without a limit; its last one may have fewer micro-batches."""
    return math.ceil(data.micro_batches(trainer.world_size) / options_of(trainer).micro_batches_per_step)


def epoch_steps(trainer: L.Trainer, data: QwenDataModule) -> int:
    """Optimizer steps of an epoch, as Lightning counts its batches."""
    steps, limit = _full_epoch(trainer, data), trainer.limit_train_batches
    if limit is None:
        return steps
    return min(steps, limit) if isinstance(limit, int) else int(steps * limit)


def epoch_share(trainer: L.Trainer, data: QwenDataModule) -> float:
    """Share of an epoch's micro-batches that its optimizer steps train."""
    trained = epoch_steps(trainer, data) * options_of(trainer).micro_batches_per_step
    return min(1.0, trained / data.micro_batches(trainer.world_size))


def total_steps(trainer: L.Trainer, data: QwenDataModule) -> int | None:
    """Optimizer steps of the whole run: those that are made, and those to come by the limits of now.

    Counted from the data's length: ``trainer.estimated_stepping_batches`` builds the loaders early, and then their
    restored position is lost.

    Returns:
        The number; None where the run has no known end.
    """
    epochs, loop = trainer.max_epochs, trainer.fit_loop
    if epochs is None or epochs < 0:
        return trainer.max_steps if trainer.max_steps > 0 else None
    of_epoch = epoch_steps(trainer, data)
    progress: Any = loop.epoch_progress.current
    inside = progress.ready > progress.processed
    ready = loop.epoch_loop.batch_progress.current.ready
    left = of_epoch - ready if inside and ready < of_epoch else 0
    epochs_left = max(0, epochs - (progress.ready if inside else progress.processed))
    total = int(trainer.global_step + left + epochs_left * of_epoch)
    return min(total, max(trainer.max_steps, trainer.global_step)) if trainer.max_steps > 0 else total


def warmup_steps(ratio: float, trainer: L.Trainer, data: QwenDataModule) -> int:
    """Steps over which the learning rate rises: a share of the run's, or of an epoch's where no end is known.

    At least one where there is a share, and fewer than the run has.
    """
    total = total_steps(trainer, data) or epoch_steps(trainer, data)
    # A share such as 0.07 of 100 is a little above 7 in binary.
    return min(math.ceil(round(total * ratio, 6)), max(total - 1, 0))
