"""All that is taken from Lightning's private parts, read in Lightning 2.6.6; each function says why it is needed.

A new version of Lightning is read here first.
"""

import os
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.strategies import DDPStrategy

from qwen_lit.waiting import WaitingRanks


def validation_follows(trainer: L.Trainer) -> bool:
    """Whether Lightning validates once the callbacks of this batch are done.

    It decides by val_check_interval, check_val_every_n_epoch, the last batch of an epoch, the clock and a stop that is
    asked for. The checkpoint that is saved before the validation has to say that it is still due.
    """
    loop = trainer.fit_loop
    return bool(trainer.enable_validation and loop.epoch_loop._should_check_val_fx(cast(Any, loop._data_fetcher)))


def may_stop(trainer: L.Trainer) -> bool:
    """Whether ``trainer.should_stop`` ends the run by now: min_epochs and min_steps are reached.

    Once the loops have ended, Lightning counts an epoch that was cut short as done; what is saved has to be of before.
    """
    return bool(trainer.fit_loop._can_stop_early)


def begin_next_epoch(trainer: L.Trainer) -> None:
    """Count the next epoch as begun where the checkpoint was saved after the last step of one.

    Lightning closes that epoch when it resumes, but takes the next one for the one that it was in the middle of, and
    would not count it as begun: a checkpoint in it would then be read as one of an epoch that is done, and its rows
    be trained twice.
    """
    loop = trainer.fit_loop
    progress: Any = loop.epoch_progress.current
    if loop.restarted_mid_epoch and progress.processed == progress.ready:
        loop.reset_restart_stage()


def validate_now(trainer: L.Trainer) -> None:
    """Run the validation of the step that is done, before the next one.

    Lightning runs a validation of its own accord only after a batch. What it logs belongs to the step before the
    next, and the loggers' memory of whether this is the first batch has to be as before.
    """
    connector, loop = trainer._logger_connector, trainer.fit_loop.epoch_loop
    first = connector._first_loop_iter
    trainer.validating = True
    loop._batches_that_stepped -= 1
    loop.val_loop.restarting = False
    loop.val_loop.run()
    loop._batches_that_stepped += 1
    trainer.training = True
    connector._first_loop_iter = first


def stops_at_epoch_end(callback: EarlyStopping) -> bool:
    """Whether early stopping looks at its monitor at the end of an epoch, where its own argument leaves that open."""
    return bool(callback._check_on_train_epoch_end)


class _Automatic:
    """A module as it is, but for what it says of who steps its optimizer."""

    automatic_optimization = True

    def __init__(self, module: L.LightningModule) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def save_between_steps(callback: ModelCheckpoint) -> None:
    """Let a ModelCheckpoint act after each batch as it does where Lightning steps the optimizer.

    Where the module does, it goes another way: it warns at every file that the weights are those after the step,
    compares by the loss of an earlier validation where a new one follows, and never looks at train_time_interval.
    """
    after_batch = callback.on_train_batch_end

    def on_train_batch_end(trainer: L.Trainer, module: L.LightningModule, *rest: Any, **more: Any) -> None:
        after_batch(trainer, cast(Any, _Automatic(module)), *rest, **more)

    setattr(callback, "on_train_batch_end", on_train_batch_end)  # noqa: B010


def mark_saved(callback: ModelCheckpoint, step: int) -> None:
    """Tell a ModelCheckpoint that a step is saved: it takes a resumed run's first step for one that is not."""
    callback._last_global_step_saved = step


def seconds_of(timer: Timer) -> float | None:
    """After which a Timer ends the run; None where it does not."""
    return timer._duration


def set_ddp_options(strategy: DDPStrategy, options: dict[str, Any]) -> None:
    """Give options of torch's DDP to a strategy that the Trainer has made of its name, where it has none."""
    strategy._ddp_kwargs = options | strategy._ddp_kwargs


def launch(strategy: DDPStrategy, ranks: WaitingRanks) -> None:
    """Let ranks that are there begin where Lightning would start them, in the environment that it would give them."""
    launcher: Any = strategy.launcher
    others = getattr(launcher, "num_processes", 0) - 1
    if others != len(ranks.processes) or launcher.cluster_environment.creates_processes_externally:
        ranks.dismiss()
        return

    def begin() -> None:
        launcher._check_can_spawn_children()
        around = launcher.cluster_environment
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = around.main_address, str(around.main_port)
        os.environ["NODE_RANK"], os.environ["LOCAL_RANK"] = str(around.node_rank()), str(around.local_rank())
        os.environ["WORLD_SIZE"] = str(launcher.num_processes * launcher.num_nodes)
        launcher.procs = ranks.begin(os.environ)

    launcher._call_children_scripts = begin
