"""How far the run is: one bar for all of it on a terminal, plain lines in a log file."""

import contextlib
import logging
import time
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from qwen_lit.callbacks.metrics import is_logged
from qwen_lit.data.datamodule import data_of
from qwen_lit.model.duration import total_steps
from qwen_lit.progress import Progress
from qwen_lit.screen import Bar, drawn, on_screen, printing_above

log = logging.getLogger(__name__)
SHOWN = {"train/loss": "loss", "val/loss": "val", "train/lr": "lr", "train/tokens_per_second": "tok/s"}
EACH = "train/tokens_per_second_per_card"
"""What stands beside the speed of a run of several cards."""
SPARE = ("lr", "tok/s", "val")
"""What a narrow terminal leaves out, in this order."""


class RunProgress(ProgressBar):
    """A bar of optimizer steps; where no terminal is, a line at each logged step instead."""

    def __init__(self) -> None:
        """Looks whether there is a terminal or a notebook."""
        super().__init__()
        self.enabled, self.screen = True, on_screen()
        self.began, self.last, self.first, self.step = 0.0, 0.0, 0, 0
        """Seconds when training began and at the last step; steps made before this run, and until now."""
        self.total: int | None = None
        self.metrics: dict[str, str] = {}
        self.each = ""
        """Speed of a card, in words; empty where there is one."""
        self.validated: tuple[int, int] | None = None
        """Batches of a validation under way: those done, and all."""
        self.bar: Bar | None = None
        self.validation: Progress | None = None
        self.printing = contextlib.ExitStack()

    def disable(self) -> None:
        """Show nothing; Lightning calls this on every rank but the first."""
        self.enabled = False

    def enable(self) -> None:
        """Show the progress; Lightning's counterpart of ``disable``."""
        self.enabled = True

    def print(self, *items: Any, sep: str = " ", **options: Any) -> None:
        """Write to the log, above the bar, what a module or a callback prints."""
        log.info("%s", sep.join(map(str, items)))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed run counts from the step of its checkpoint."""
        self.began = self.last = time.perf_counter()
        self.first = self.step = trainer.global_step
        self.total = total_steps(trainer, data_of(trainer))
        if self.screen and self.enabled:
            self.printing.enter_context(printing_above())
            self.bar = Bar(self._line)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step; in a log file at each logged step, and after the last one."""
        if not self.enabled:
            return
        step, self.last = trainer.global_step, time.perf_counter()
        self.step = step
        logged = is_logged(trainer, step) or step == self.total
        # Reading a metric waits for the GPU.
        if logged or step == self.first + 1:
            self._read(trainer, pl_module)
        if self.bar is not None:
            self.bar.draw()
        elif logged:
            of, left = (f" of {self.total}", f"{self._left()} left") if self.total else ("", "no known end")
            shown = [f"{name} {value}" + self.each * (name == "tok/s") for name, value in self.metrics.items()]
            log.info("step %d%s  %s", step, of, "  ".join([*shown, left]))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A validation is counted in the bar of the run; outside a run it has its own."""
        batches = sum(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)
        self.validated = 0, int(min(batches, 10**9))
        if trainer.state.fn == "validate" and self.enabled:
            self.validation = Progress("validating", self.validated[1], "batches")

    def on_validation_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Count a validation batch and draw the bar."""
        if self.validated is not None:
            self.validated = self.validated[0] + 1, self.validated[1]
        if self.bar is not None:
            self.bar.draw()
        if self.validation is not None:
            self.validation.advance(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show the validation loss."""
        self.validated = None
        if self.validation is not None:
            self.validation.close()
        if self.bar is not None and not trainer.sanity_checking:
            self._read(trainer, pl_module)
            self.bar.refresh()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar off the screen; the report says what the run has come to."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Take the bar off the screen before the error is printed."""
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the bar off the screen however the run has ended."""
        self._close()

    def _close(self) -> None:
        for bar in (self.bar, self.validation):
            if bar is not None:
                bar.close()
        self.bar = self.validation = None
        self.printing.close()

    def _read(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        found = trainer.callback_metrics
        values = {short: float(found[name]) for name, short in SHOWN.items() if name in found}
        self.metrics = {name: f"{one:,.0f}" if name == "tok/s" else _number(one) for name, one in values.items()}
        self.each = f" ({float(found[EACH]):,.0f} a card)" if EACH in found else ""
        if getattr(module, "skipped_in_a_row", 0):
            self.metrics["loss"] = "none, skipped"

    def _left(self) -> timedelta:
        """Time until the end of the run, at the pace of this one."""
        pace = (self.last - self.began) / max(1, self.step - self.first)
        left = pace * ((self.total or 0) - self.step) - (time.perf_counter() - self.last)
        return timedelta(seconds=max(0, round(left)))

    def _line(self, width: int) -> str:
        parts = {name: f"{name} {value}" for name, value in self.metrics.items()}
        if "tok/s" in parts:
            parts["tok/s"] = f"{self.metrics['tok/s']} tok/s{self.each}"
        if self.validated is not None:
            parts["time"] = f"validating {self.validated[0]}/{self.validated[1]}"
        elif self.total is None:
            parts["time"] = str(timedelta(seconds=round(time.perf_counter() - self.began)))
        elif self.step > self.first:
            parts["time"] = f"{self._left()} left"
        head = f"step {self.step:,}" + (f"/{self.total:,}" if self.total else "")
        return drawn(width, head, self.step / self.total if self.total else None, parts, SPARE)


def _number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.01 else f"{value:.1e}"
