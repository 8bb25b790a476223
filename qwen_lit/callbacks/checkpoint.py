"""When the run is saved: rolling by steps, best by validation loss, on a signal, and at the end."""

import logging
import random
import signal
import time
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from qwen_lit.callbacks.checkpoint_io import AtomicCheckpointIO, clear_partial, remove, step_files, step_of
from qwen_lit.callbacks.resumed import has_ended
from qwen_lit.checks import check_ranges
from qwen_lit.data.datamodule import data_of
from qwen_lit.errors import RunError
from qwen_lit.lightning_internals import (
    begin_next_epoch,
    may_stop,
    stops_at_epoch_end,
    validate_now,
    validation_follows,
)
from qwen_lit.mixing import set_newer_aside
from qwen_lit.model.module import QwenModule
from qwen_lit.model.resume import settings
from qwen_lit.run import Run
from qwen_lit.seams import options_of
from qwen_lit.signals import INTERRUPTS

log = logging.getLogger(__name__)


class RunCheckpoint(Checkpoint):
    """Saves the run to ``output_dir/checkpoints``, always between two optimizer steps."""

    def __init__(self, run: Run, every_n_train_steps: int = 100, keep: int = 2) -> None:
        """Checks the numbers.

        Args:
            run: names the files.
            every_n_train_steps: optimizer steps between two checkpoints; one is also saved before each validation.
            keep: number of newest checkpoints that are kept; at least 2, as the newest may be incomplete yet.

        Raises:
            UserError: a number is out of range.
        """
        check_ranges("checkpoint", locals())
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.run = run
        self.saved_step = 0
        self.best, self.best_step = float("inf"), cast("int | None", None)
        """The lowest validation loss, in nats a token, and its step; None before a validation."""
        self.validation_due = False
        self.rng: list[dict[str, Any]] = []
        self.stalled = 0.0
        """Seconds that training has waited for saving."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clear away what a killed run has left half-written."""
        if stage == "fit" and trainer.is_global_zero:
            clear_partial(self.run.checkpoints)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the validation that is still due where the run stopped between a save and its validation.

        The random generators are restored last, because validation draws from them.
        """
        self._own_folder(trainer)
        INTERRUPTS.defer()
        begin_next_epoch(trainer)
        if self.validation_due:
            self.validation_due = False
            validate_now(trainer)
        if self.rng:
            _set_rng(self.rng[trainer.global_rank])
            self.rng = []

    def _own_folder(self, trainer: L.Trainer) -> None:
        """Leave no checkpoint of steps to come in the folder, and no best loss whose checkpoint is elsewhere."""
        if options_of(trainer).fast_dev_run:
            return
        if trainer.is_global_zero:
            set_newer_aside(self.run, trainer.global_step)
        if not trainer.strategy.broadcast(self.run.best.is_file()):
            self.best, self.best_step = float("inf"), None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each optimizer step: save when it is time, or when a signal asks to stop."""
        step = trainer.global_step
        stop = trainer.strategy.reduce_boolean_decision(INTERRUPTS.received is not None, all=False)
        due = validation_follows(trainer)
        # A failed write is tried again before the next one is due.
        retry = self._io(trainer).failure is not None and step % max(1, self.every_n_train_steps // 10) == 0
        if step != self.saved_step or retry:
            # Once the loops have ended, Lightning counts an epoch cut short as done.
            last = step == trainer.max_steps or (trainer.should_stop and may_stop(trainer))
            if stop or due or retry or last or step % self.every_n_train_steps == 0:
                self.validation_due = due
                self._save(trainer, pl_module)
                self.validation_due = False
        if stop:
            self._stop(trainer)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop at once on a signal: the step before the validation is saved already."""
        if trainer.state.fn == "fit" and trainer.strategy.reduce_boolean_decision(
            INTERRUPTS.received is not None, all=False
        ):
            self._stop(trainer)

    def _stop(self, trainer: L.Trainer) -> None:
        # Another rank may have been asked alone.
        INTERRUPTS.note(signal.SIGTERM)
        self._io(trainer).wait()
        if trainer.is_global_zero:
            log.info("stopped after step %d; go on with --ckpt_path last", self.saved_step)
        INTERRUPTS.check()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best checkpoint by validation loss."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        loss = trainer.callback_metrics.get("val/loss")
        if loss is None:
            return
        if float(loss) < self.best:
            self.best, self.best_step = float(loss), trainer.global_step
            if not options_of(trainer).fast_dev_run:
                trainer.save_checkpoint(self.run.best, storage_options={"manifest": _manifest(trainer)})
            if trainer.is_global_zero:
                log.info("best validation loss %.4f at step %d", self.best, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the run, wherever it falls between two periodic saves."""
        # What early stopping has counted at the end of the epoch belongs to it: the run stays ended.
        callbacks = options_of(trainer).callbacks
        stopped = any(has_ended(one) and stops_at_epoch_end(one) for one in callbacks)
        if trainer.global_step != self.saved_step or self._io(trainer).failure is not None or stopped:
            self._save(trainer, pl_module)
        self._io(trainer).wait()
        INTERRUPTS.release()
        INTERRUPTS.check()

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Report a last checkpoint that could not be written, after the export, which needs none.

        Raises:
            RunError: the last checkpoint could not be written.
        """
        failure = self._io(trainer).failure
        if failure is not None:
            raise RunError(
                f"the last checkpoint, step {trainer.global_step}, could not be written to {self.run.checkpoints} "
                f"({failure}); free the disk and run again with --ckpt_path last: it goes on from the one before."
            )

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Wait for a write that is under way."""
        INTERRUPTS.release()
        self._io(trainer).wait()

    @staticmethod
    def _io(trainer: L.Trainer) -> AtomicCheckpointIO:
        return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io)

    def _save(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if options_of(trainer).fast_dev_run:
            return
        started = time.perf_counter()
        trained = [p for p in pl_module.parameters() if p.requires_grad]
        if not bool(torch.stack([p.detach().isfinite().all() for p in trained]).all()):
            raise RunError(
                f"the adapter is not finite at step {trainer.global_step}, so it is not saved; go on from the "
                "checkpoint before it with --ckpt_path last and a lower model.learning_rate."
            )
        path = self.run.step_checkpoint(trainer.global_step)
        self.saved_step = trainer.global_step
        self.rng = _gather(trainer, _get_rng())

        def then(seconds: float) -> None:
            size = path.stat().st_size / 1e6
            log.info("checkpoint %s (%.1f MB, written in %.2f s, stalled %.3f s)", path, size, seconds, stall[0])
            # Of the checkpoints up to this one: what was just written always stays.
            done = step_files(self.run.checkpoints)
            for old in done[done.index(path) :][self.keep :]:
                remove(old)

        stall = [0.0]
        trainer.save_checkpoint(path, storage_options={"manifest": _manifest(trainer), "then": then})
        stall[0] = time.perf_counter() - started
        self.stalled += stall[0]
        self.rng = []

    def state_dict(self) -> dict[str, Any]:
        """The counters, the best loss and the random generators.

        They are tensors and plain values, so that reading them runs no code.
        """
        return {
            "saved_step": self.saved_step,
            "best": self.best,
            "best_step": self.best_step,
            "rng": self.rng,
            "validation_due": self.validation_due,
        }

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random generators of every rank to a file that Lightning's own ModelCheckpoint saves."""
        mine = checkpoint.get("callbacks", {}).get(self.state_key)
        if mine is not None and not self.rng:
            mine["rng"] = _gather(trainer, _get_rng())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counters; the generators follow in ``on_train_start``."""
        self.saved_step, self.best, self.rng = state_dict["saved_step"], state_dict["best"], state_dict["rng"]
        self.validation_due = state_dict["validation_due"]
        # A checkpoint that does not say has it in the file of the best.
        self.best_step = state_dict["best_step"] if "best_step" in state_dict else step_of(self.run.best)


def _manifest(trainer: L.Trainer) -> dict[str, Any]:
    config = settings(cast(QwenModule, trainer.lightning_module))
    compared = {"data": data_of(trainer).state_dict(), "config": {**config["frozen"], **config["config"]}}
    return {"step": trainer.global_step, "epoch": trainer.current_epoch, **compared}


def _gather(trainer: L.Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of all ranks, in the order of the ranks; all ranks call this."""
    if trainer.world_size == 1:
        return [mine]
    found: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(found, mine)
    return found


def _get_rng() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
