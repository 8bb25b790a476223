"""How far the run is: a bar on a terminal, plain lines in a log file."""

import logging
import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

log = logging.getLogger(__name__)
SHOWN = {"train/loss": "loss", "val/loss": "val", "train/lr": "lr", "train/tokens_per_second": "tok/s"}


class RunProgress(TQDMProgressBar):
    """Lightning's bar with short names; where no terminal is, a line at each logged step instead."""

    def __init__(self) -> None:
        """Looks whether there is a terminal or a notebook."""
        super().__init__(leave=True)
        self.plain = not (sys.stderr.isatty() or "ipykernel" in sys.modules)
        if self.plain:
            self.disable()
        self.began, self.first, self.total = 0.0, 0, 0
        self.shown_step = 0

    def enable(self) -> None:
        """A bar, where it can be drawn."""
        if not self.plain:
            super().enable()

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Loss, learning rate and speed, in a few characters."""
        metrics = trainer.callback_metrics
        return {short: _number(float(metrics[name])) for name, short in SHOWN.items() if name in metrics}

    def on_train_start(self, *arguments: Any) -> None:
        """Time is counted from here."""
        super().on_train_start(*arguments)
        trainer = arguments[0]
        self.began, self.first = time.perf_counter(), trainer.global_step
        self.total = trainer.datamodule.total_steps(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In a log file: a line after each logged step."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.plain and trainer.is_global_zero and step != self.shown_step and step % every == 0:
            self.shown_step = step
            left = (time.perf_counter() - self.began) / max(1, step - self.first) * (self.total - step)
            shown = "  ".join(f"{name} {value}" for name, value in self.get_metrics(trainer, pl_module).items())
            log.info("step %d of %d  %s  %s left", step, self.total, shown, timedelta(seconds=round(left)))


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
