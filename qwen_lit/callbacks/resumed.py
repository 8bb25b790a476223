"""Lightning's own callbacks across a resume: what they restore must not end or spoil the run that goes on."""

import logging
from typing import Any, TypeGuard, cast

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from qwen_lit.callbacks.accepted import check_held_out
from qwen_lit.data.datamodule import data_of
from qwen_lit.errors import UserError
from qwen_lit.lightning_internals import mark_saved, save_between_steps
from qwen_lit.model.module import QwenModule
from qwen_lit.run import Run
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)


def has_ended(callback: object) -> TypeGuard[EarlyStopping]:
    """Whether a callback is an EarlyStopping that has stopped its run."""
    if not isinstance(callback, EarlyStopping):
        return False
    wanted = callback.stopping_threshold
    reached = wanted is not None and bool(callback.monitor_op(callback.best_score, wanted))
    return reached or callback.wait_count >= max(1, callback.patience)


class Resumed(Callback):
    """Looks after the callbacks that the configuration names."""

    def __init__(self, run: Run) -> None:
        """Keeps what it is given; the callbacks are read in ``setup``.

        Args:
            run: that trains or is measured.
        """
        self.run = run

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Once the rows are split, before the model is loaded: will there be what is monitored?

        Raises:
            UserError: a callback monitors a validation that has no rows, or ``validate`` has none.
        """
        data = data_of(trainer)
        assert data.val_rows is not None
        if stage == "fit":
            for one in options_of(trainer).callbacks:
                if isinstance(one, ModelCheckpoint):
                    save_between_steps(one)
            check_held_out(options_of(trainer).callbacks, len(data.val_rows))
        if stage == "validate":
            if not len(data.val_rows):
                raise UserError("validate: no row is held out; set data.val_size or data.val_dataset_path.")
            if self.run.checkpoint is None and cast(QwenModule, pl_module).init_adapter is None:
                log.warning("no --ckpt_path is given: this measures the base with an adapter that has learnt nothing")

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """What the configuration says of these callbacks holds, not what it said when the checkpoint was written.

        Each command has its own ``max_time``: time that an earlier one has used up is not counted again.
        """
        states = checkpoint.get("callbacks", {})
        states.pop("Timer", None)
        for one in options_of(trainer).callbacks:
            if isinstance(one, EarlyStopping) and one.state_key in states:
                states[one.state_key]["patience"] = one.patience

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop at once where early stopping has ended the run before."""
        for one in options_of(trainer).callbacks:
            if has_ended(one):
                log.warning(
                    "early stopping by %s has ended this run already; to go on, raise its patience, or leave it out",
                    one.monitor,
                )
                trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell each ModelCheckpoint that a resumed run's step is saved already.

        It would save that step within the next one.
        """
        for one in options_of(trainer).callbacks:
            if isinstance(one, ModelCheckpoint):
                mark_saved(one, trainer.global_step)
