"""How far the run is: a bar on a terminal, plain lines in a log file."""

import logging
import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from qwen_lit.callbacks.metrics import is_logged
from qwen_lit.model.duration import total_steps

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
        self.began, self.first, self.shown_step = 0.0, 0, 0
        self.total: int | None = None

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
        self.shown_step = self.first
        self.total = total_steps(trainer, trainer.datamodule)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """In a log file: a line after each logged step, and after the last one."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        step = trainer.global_step
        if not self.plain or not trainer.is_global_zero or step == self.shown_step:
            return
        if is_logged(trainer, step) or step == self.total:
            self.shown_step = step
            metrics = self.get_metrics(trainer, pl_module)
            if getattr(pl_module, "skipped_in_a_row", 0):
                metrics["loss"] = "none, skipped"
            shown = "  ".join(f"{name} {value}" for name, value in metrics.items())
            if self.total is None:
                log.info("step %d  %s  no known end", step, shown)
                return
            left = (time.perf_counter() - self.began) / max(1, step - self.first) * max(0, self.total - step)
            log.info("step %d of %d  %s  %s left", step, self.total, shown, timedelta(seconds=round(left)))


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
