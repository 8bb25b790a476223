"""Lightning's own callbacks across a resume: what they restore must not end or spoil the run that goes on."""

import logging
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from qwen_lit.callbacks.accepted import check_held_out

log = logging.getLogger(__name__)


class Resumed(Callback):
    """Looks after the callbacks that the configuration names."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Once the rows are split, before the model is loaded: will there be what is monitored?

        Raises:
            UserError: a callback monitors a validation that has no rows.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit":
            check_held_out(trainer.callbacks, len(data.val_rows))  # type: ignore[attr-defined]

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Each command has its own ``max_time``: time that an earlier one has used up is not counted again."""
        checkpoint.get("callbacks", {}).pop("Timer", None)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A run that early stopping has ended stays ended."""
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(one, EarlyStopping) and one.wait_count >= one.patience > 0:
                log.warning(
                    "early stopping has ended this run: %s is no better for %d checks; to go on, raise its patience",
                    one.monitor, one.wait_count,
                )  # fmt: skip
                trainer.should_stop = True

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What is done when the run goes on is saved already; a file must not fall into the next optimizer step."""
        for one in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(one, ModelCheckpoint):
                one._last_global_step_saved = trainer.global_step
