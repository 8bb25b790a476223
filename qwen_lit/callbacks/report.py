"""What will be trained, in ten lines; and what came of it, as summary.json and a page to send to each other."""

import json
import logging
import os
import sys
import textwrap
import time
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.facts import flat, run_facts
from qwen_lit.callbacks.logger import RunLogger
from qwen_lit.callbacks.metrics import Throughput, is_logged
from qwen_lit.callbacks.trackers import log_config
from qwen_lit.data.datamodule import data_of
from qwen_lit.environment import git, hardware, versions
from qwen_lit.lines import end_lines, loss_lines, panel_lines, start_lines
from qwen_lit.model.coverage import left_out
from qwen_lit.model.module import QwenModule
from qwen_lit.report import page
from qwen_lit.run import PARTIAL, Run
from qwen_lit.seams import options_of
from qwen_lit.signals import Interrupted

log = logging.getLogger(__name__)
KEPT = {
    "train/loss": "loss",
    "train/lr": "lr",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
    "val/loss": "val_loss",
}
LINE = 66
"""Columns of a line after the time and the level, of 80 in all."""
MOST_POINTS = 4000
"""Of a curve; beyond, every second point is dropped."""


class RunReport(Callback):
    """Prints the start and writes the end of a run; its curves are part of the checkpoint."""

    def __init__(self, run: Run, saver: RunCheckpoint, exporter: Export, throughput: Throughput) -> None:
        """Keeps what the report is made of; the files are written in ``on_fit_end``.

        Args:
            run: names the files, and has the configuration and the time when it all began.
            saver: knows the best checkpoint.
            exporter: knows what was exported.
            throughput: measures speed, time and memory.
        """
        self.run, self.saver, self.exporter, self.throughput = run, saver, exporter, throughput
        self.unwritten: OSError | None = None
        """Why the report could not be written."""
        self.history: dict[str, list[list[float]]] = {}
        self.step = -1
        self.first: int | None = None
        """The optimizer step at which this command began to train; None until it does."""
        self.resumed: list[int] = []
        self.facts: dict[str, Any] = {}
        self.panel: dict[str, float] = {}
        self.trained = 0.0
        """Seconds of training of earlier attempts, up to where this one goes on."""
        self.began: float | None = None
        self.done: float | None = None
        """Seconds of ``time.perf_counter`` at which this attempt's training ended; None until it has."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what will be trained."""
        self.step = self.first = trainer.global_step
        self.began = time.perf_counter()
        if trainer.global_step:
            self.resumed.append(trainer.global_step)
        if trainer.is_global_zero:
            module = cast(QwenModule, pl_module)
            self.facts = run_facts(trainer, module)
            for name, text in start_lines(self.facts, self.run.output_dir).items():
                for line in textwrap.wrap(f"{name:<10} {text}", LINE, subsequent_indent=" " * 11):
                    log.info(line)
            assert module.model is not None
            if reason := left_out(module.model, module.lora_config):
                log.warning(reason)
            if not options_of(trainer).fast_dev_run:
                log_config(trainer.loggers, flat({**self.run.config, "run": self.facts}))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Append the logged metrics of the step to the curves."""
        step = self.step = trainer.global_step
        # A skipped step logs no loss; ``callback_metrics`` still holds the loss of the step before.
        if (is_logged(trainer, step) or step <= 1) and not getattr(pl_module, "skipped_in_a_row", 0):
            self._keep_all(step, trainer.callback_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Append the validation loss to its curve."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and "val/loss" in trainer.callback_metrics:
            self._keep("val/loss", trainer.global_step, float(trainer.callback_metrics["val/loss"]))

    def _keep_all(self, step: int, metrics: Any) -> None:
        for name in KEPT:
            if name != "val/loss" and name in metrics:
                self._keep(name, step, float(metrics[name]))

    def _keep(self, name: str, step: int, value: float) -> None:
        curve = self.history.setdefault(KEPT[name], [])
        if not curve or curve[-1][0] < step:
            curve.append([step, value])
        if len(curve) > MOST_POINTS:
            del curve[1:-1:2]

    def state_dict(self) -> dict[str, Any]:
        """The curves, the steps at which the run was resumed, and the seconds of training."""
        return {"history": self.history, "resumed": self.resumed, "trained_seconds": self._trained()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves and the clock; a checkpoint that does not say starts the clock over."""
        self.history, self.resumed = state_dict["history"], state_dict["resumed"]
        self.trained = state_dict.get("trained_seconds", 0.0)

    def _trained(self) -> float:
        """Seconds of training of all attempts that led here."""
        return self.trained if self.began is None else self.trained + (self.done or time.perf_counter()) - self.began

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the last step, wherever the interval falls, and the throughput of the whole run, while the device still
        knows its peak memory."""
        latest = {f"train/{name}": value for name, value in self.throughput.latest(trainer).items()}
        self.panel = self.throughput.whole(trainer)
        self.done = time.perf_counter()
        if not trainer.is_global_zero:
            return
        best = best_of(self.saver)
        if best:
            log_to_all(trainer, {"val/best_loss": best["val_loss"]}, best["step"])
        self._log_last(trainer, latest, skipped=bool(getattr(pl_module, "skipped_in_a_row", 0)))
        for line in loss_lines(self.history, best) + panel_lines(self.panel, getattr(pl_module, "skipped_steps", 0)):
            log.info(line)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that is stopped after a step has not logged it yet, and the resumed one will not make it again."""
        ends = (
            isinstance(exception, Interrupted) and trainer.training and trainer.global_step == self.step != self.first
        )
        if ends and is_logged(trainer, self.step) and not getattr(pl_module, "skipped_in_a_row", 0):
            log_to_all(trainer, _training_metrics(trainer), trainer.global_step)

    def _log_last(self, trainer: L.Trainer, latest: dict[str, float], skipped: bool) -> None:
        step = trainer.global_step
        if step == self.first or is_logged(trainer, step) or skipped:
            return
        metrics = _training_metrics(trainer) | latest
        self._keep_all(step, metrics)
        log_to_all(trainer, metrics, step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary and the page, after the export."""
        if trainer.is_global_zero and self.first in (None, trainer.global_step):
            log.warning("nothing was trained: %s", nothing_left(trainer))
        if not trainer.is_global_zero or options_of(trainer).fast_dev_run or options_of(trainer).interrupted:
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.end_hyperparams()
        summary = self.summary(trainer, cast(QwenModule, pl_module))
        try:
            write(self.run, summary)
        except OSError as error:
            self.unwritten = error
            where = f"{self.run.output_dir} ({error.strerror or error})"
            print(f"error: the report could not be written to {where}.", file=sys.stderr)
            return
        for line in end_lines(summary):
            log.info(line)

    def summary(self, trainer: L.Trainer, module: QwenModule) -> dict[str, Any]:
        """What ``summary.json`` holds, as plain values; docs/summary.md explains each."""
        run, export, ended = self.run, self.exporter, datetime.now().astimezone()
        data = data_of(trainer)
        lines = run.samples.read_text(encoding="utf-8").splitlines() if run.samples.is_file() else []
        exported = run.adapter.is_dir() and run.adapter.name not in export.missing
        project, last = git(Path.cwd()), {name: curve[-1][1] for name, curve in self.history.items() if curve}
        return {
            "output_dir": str(run.output_dir),
            "started": run.started.isoformat(timespec="seconds"),
            "ended": ended.isoformat(timespec="seconds"),
            "duration_seconds": round(time.perf_counter() - run.clock, 1),
            "trained_seconds": round(self._trained(), 1),
            "attempts": 1 + len(self.resumed),
            "resumed_at": self.resumed,
            "run": (self.facts or run_facts(trainer, module)) | {"products": module.products.told},
            "hardware": hardware(trainer.strategy.root_device, trainer.world_size),
            "versions": versions(),
            **({"git": project} if project else {}),
            "steps": trainer.global_step,
            "skipped_steps": module.skipped_steps,
            "last": {"step": trainer.global_step}
            | {name: value for name, value in last.items() if name in ("loss", "val_loss")},
            "best": best_of(self.saver),
            "throughput": {name: float(f"{value:.6g}") for name, value in self.panel.items()},
            "data": data.facts(),
            "verdict": export.facts.verdict if export.facts else None,
            "stopped": export.facts.stopped if export.facts else None,
            "exported": export.made if exported else {},
            "export": {"missing": export.missing, "again": export.again()} if export.missing else {},
            "files": _files(run, trainer.loggers),
            "history": self.history,
            "samples": [json.loads(line) for line in lines],
            "config": run.config,
        }


def _files(run: Run, loggers: list[Any]) -> dict[str, str]:
    """The paths of what a run has left."""
    paths = {
        "lora_adapter": run.adapter,
        "final_model": run.merged,
        "checkpoints": run.checkpoints,
        "config": run.config_file,
        "samples": run.samples,
    }
    found = {name: str(path) for name, path in paths.items() if path.exists()}
    logs = {"logs": str(run.logs)} if any(isinstance(one, RunLogger) for one in loggers) else {}
    return found | logs | {"summary": str(run.summary), "report": str(run.report)}


def best_of(saver: RunCheckpoint) -> dict[str, Any] | None:
    """Step and loss of the best validation; None where none has come."""
    return None if saver.best_step is None else {"step": saver.best_step, "val_loss": saver.best}


def write(run: Run, summary: dict[str, Any]) -> None:
    """``summary.json`` and ``report.html``, each whole or absent."""
    text = json.dumps(summary, indent=1, ensure_ascii=False, default=str)
    for path, content in ((run.summary, text), (run.report, page(summary))):
        partial = path.with_name(path.name + PARTIAL)
        try:
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    log.info("report written to %s", run.report)


def _training_metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def log_to_all(trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
    """Beside what Lightning logs by itself.

    Args:
        trainer: whose loggers these are.
        metrics: by name.
        step: counted from 1, which Lightning's loggers count from 0.
    """
    for logger in trainer.loggers:
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, step - 1)


def nothing_left(trainer: L.Trainer) -> str:
    """Why a run has made no step."""
    step, epochs = trainer.global_step, trainer.max_epochs
    if trainer.should_stop:
        return f"the run was ended at step {step} before this command's first step"
    if 0 < trainer.max_steps <= step:
        return f"step {step} is made, and trainer.max_steps is {trainer.max_steps}; raise it to go on"
    return f"step {step} is made, and trainer.max_epochs is {epochs}; raise it to go on"
