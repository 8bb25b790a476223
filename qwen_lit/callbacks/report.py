"""What will be trained, in ten lines; and what came of it, as summary.json and a page to send to each other."""

import json
import logging
import os
import sys
import textwrap
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer

from qwen_lit.callbacks.export import Export
from qwen_lit.callbacks.metrics import Throughput, is_logged
from qwen_lit.export.card import LIBRARIES
from qwen_lit.hardware import product_dtype
from qwen_lit.model.duration import epoch_batches, epoch_steps, total_steps, warmup_steps
from qwen_lit.quantization import count_linears, described
from qwen_lit.report import page
from qwen_lit.signals import Stopped

log = logging.getLogger(__name__)
KEPT = {
    "train/loss": "loss", "train/lr": "lr", "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second", "val/loss": "val_loss",
}  # fmt: skip
LINE = 66
"""Columns of a line after the time and the level, of 80 in all."""
MOST_POINTS = 4000
"""Of a curve; beyond, every second point is dropped."""


class RunReport(Callback):
    """Prints the start and writes the end of a run; its curves are part of the checkpoint."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.history: dict[str, list[list[float]]] = {}
        self.step = -1
        self.first: int | None = None
        """Where this command began to train; None until it does."""
        self.resumed: list[int] = []
        self.begun: dict[str, str] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what will be trained."""
        self.step = self.first = trainer.global_step
        if trainer.global_step:
            self.resumed.append(trainer.global_step)
        if trainer.is_global_zero:
            self.begun = start_lines(trainer, pl_module)
            for name, text in self.begun.items():
                for line in textwrap.wrap(f"{name:<10} {text}", LINE, subsequent_indent=" " * 11):
                    log.info(line)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep what is logged."""
        step = trainer.global_step
        if step == self.step:
            return
        self.step = step
        # A step that is skipped has no loss; what stands there is the one's before.
        if (is_logged(trainer, step) or step <= 1) and not getattr(pl_module, "skipped_in_a_row", 0):
            self._keep_all(step, trainer.callback_metrics)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the validation loss."""
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
        """Plain lists."""
        return {"history": self.history, "resumed": self.resumed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves."""
        self.history, self.resumed = state_dict["history"], state_dict["resumed"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The last step, wherever the interval falls, and the panel of the whole run, while the device still knows."""
        throughput = _throughput(trainer)
        latest = {f"train/{name}": value for name, value in throughput.latest(trainer).items()}
        self.panel = throughput.whole(trainer)
        if not trainer.is_global_zero:
            return
        self._log_last(trainer, latest, skipped=bool(getattr(pl_module, "skipped_in_a_row", 0)))
        for line in [*loss_lines(self.history), *panel_lines(self.panel, getattr(pl_module, "skipped_steps", 0))]:
            log.info(line)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """A run that is stopped after a step has not logged it yet, and the resumed one will not make it again."""
        ends = isinstance(exception, Stopped) and trainer.training and trainer.global_step == self.step != self.first
        if ends and is_logged(trainer, self.step) and not getattr(pl_module, "skipped_in_a_row", 0):
            _log_to_all(trainer, _training_metrics(trainer))

    def _log_last(self, trainer: Any, latest: dict[str, float], skipped: bool) -> None:
        step = trainer.global_step
        if step == self.first or is_logged(trainer, step) or skipped:
            return
        metrics = _training_metrics(trainer) | latest
        self._keep_all(step, metrics)
        _log_to_all(trainer, metrics)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the summary and the page, after the export."""
        run: Any = trainer
        if trainer.is_global_zero and self.first in (None, trainer.global_step):
            log.warning("nothing was trained: %s", nothing_left(trainer))
        if trainer.is_global_zero and not run.fast_dev_run and not trainer.interrupted:
            for export in run.callbacks:
                if isinstance(export, Export):
                    try:
                        write(export.folder, self.summary(trainer, pl_module, export))
                    except OSError as error:
                        run.exit_code = 1
                        where = f"{export.folder} ({error.strerror or error})"
                        print(f"error: the report could not be written to {where}.", file=sys.stderr)

    def summary(self, trainer: Any, module: Any, export: Export) -> dict[str, Any]:
        """All of it as plain values."""
        samples = export.folder / "samples.jsonl"
        lines = samples.read_text(encoding="utf-8").splitlines() if samples.is_file() else []
        verdict = export.told.verdict if export.told else None
        panel = getattr(self, "panel", {})
        return {
            "run": self.begun or start_lines(trainer, module),
            "steps": trainer.global_step,
            "resumed_at": self.resumed,
            "skipped_steps": module.skipped_steps,
            "losses": {name: curve[-1][1] for name, curve in self.history.items() if name.endswith("loss")},
            "throughput": {name: float(f"{value:.6g}") for name, value in panel.items()},
            "data": trainer.datamodule.facts(),
            "verdict": verdict,
            "stopped": export.told.stopped if export.told else None,
            "history": self.history,
            "samples": [json.loads(line) for line in lines],
            "versions": {name: version(name) for name in LIBRARIES},
            "export": {"missing": export.missing, "again": export.again()} if export.missing else {},
            "config": export.training_config,
        }


def write(folder: Path, summary: dict[str, Any]) -> None:
    """``summary.json`` and ``report.html``, each whole or absent."""
    text = json.dumps(summary, indent=1, ensure_ascii=False, default=str)
    for name, content in (("summary.json", text), ("report.html", page(summary))):
        partial = folder / f"{name}.tmp"
        try:
            partial.write_text(content, encoding="utf-8")
            os.replace(partial, folder / name)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
    log.info("report written to %s", folder / "report.html")


def _training_metrics(trainer: Any) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/")}


def _log_to_all(trainer: Any, metrics: dict[str, float]) -> None:
    for logger in trainer.loggers:
        # Lightning's loggers count steps from 0.
        logger.log_metrics({**metrics, "epoch": trainer.current_epoch}, trainer.global_step - 1)


def nothing_left(trainer: Any) -> str:
    """Why a run has made no step."""
    step, epochs = trainer.global_step, trainer.max_epochs
    if trainer.should_stop:
        return f"the run was ended at step {step} before this command's first step"
    if 0 < trainer.max_steps <= step:
        return f"step {step} is made, and trainer.max_steps is {trainer.max_steps}; raise it to go on"
    return f"step {step} is made, and trainer.max_epochs is {epochs}; raise it to go on"


def _throughput(trainer: Any) -> Throughput:
    return next(one for one in trainer.callbacks if isinstance(one, Throughput))


def start_lines(trainer: Any, module: Any) -> dict[str, str]:
    """What is trained, and on what."""
    data = trainer.datamodule
    trained, total = module.model.get_nb_trainable_parameters()
    rows = data.train_rows
    tokens, supervised = int(rows.column("length").sum()), int(rows.column("supervised").sum())
    in_epoch = epoch_batches(trainer, data)
    of_epoch = epoch_steps(trainer, data)
    per_step = min(trainer.accumulate_grad_batches, in_epoch) * data.merge * trainer.world_size
    share = in_epoch * data.merge / data.micro_batches(trainer.world_size)
    device = trainer.strategy.root_device
    held = module.held_weights(device)
    lora = module.lora_config
    begun = module.run_config.get("model", {}).get("init_adapter")
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(sorted(lora.target_modules))
    return {
        "model": f"{module.name} ({_count(total)} parameters)",
        "trained": f"{trained:,} ({trained / total:.2%}): r={lora.r}, alpha={lora.lora_alpha} on {targets}"
        + (f", begun from {begun}" if begun else ""),
        "base": f"quantisation {described(held, count_linears(module.model), product_dtype(device))}",
        "engine": module.engine_told,
        "data": f"{len(rows):,} rows, {tokens:,} tokens, {supervised / max(1, tokens):.0%} supervised; "
        f"{len(data.val_rows):,} rows held out",
        "step": f"{per_step} micro-batches of {data.batch_size} x {data.max_length} tokens"
        + (", packed" if data.packing else " at most")
        + f", about {tokens * min(1.0, share) / max(1, of_epoch):,.0f} tokens",
        "run": run_line(trainer, data, module),
        "device": f"{trainer.world_size} x {device.type}, precision {trainer.precision}"
        + " (this CPU has no instructions for bf16)" * (product_dtype(device) == torch.float32),
        "output": str(next((one.folder for one in trainer.callbacks if isinstance(one, Export)), "")),
        "begins at": f"step {trainer.global_step}" + (" (resumed)" if trainer.global_step else ""),
    }


def run_line(trainer: Any, data: Any, module: Any) -> str:
    """How long the run is, and what the learning rate does in that time."""
    steps, of_epoch = total_steps(trainer, data), epoch_steps(trainer, data)
    limit = next((one._duration for one in trainer.callbacks if isinstance(one, Timer)), None)
    time = "" if limit is None else f"at most {timedelta(seconds=round(limit))}"
    warmup = warmup_steps(module.warmup_ratio, trainer, data)
    schedule = f"{module.schedule_name}, {warmup:,} of warmup"
    if steps is None:
        how_long = f"no known end, {time}; {_plural(of_epoch, 'optimizer step')} an epoch"
    else:
        cut = trainer.max_epochs < 0 or steps == trainer.max_steps
        epochs = f"{steps / of_epoch:.3g}" if cut else str(trainer.max_epochs)
        how_long = f"{_plural(steps, 'optimizer step')}, {epochs} epoch{'s' * (epochs != '1')} of {of_epoch:,}"
        how_long += f", {time} (the schedule is that of all steps)" if time else ""
    return f"{how_long}, learning rate {module.learning_rate:g} ({schedule}), {module.optimizer_name}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.1f} million"


def loss_lines(history: dict[str, list[list[float]]]) -> list[str]:
    """The last losses that are known, with their steps."""
    names = {"loss": "training", "val_loss": "validation"}
    told = [f"{text} {history[name][-1][1]:.4f} at step {history[name][-1][0]:,}" for name, text in names.items()
            if history.get(name)]  # fmt: skip
    return [f"loss         {', '.join(told)}"] if told else []


def panel_lines(panel: dict[str, float], skipped: int) -> list[str]:
    """The panel of a run, in lines of at most 80 columns."""
    use = f", {panel['flop_use']:.0%} of the card's peak" if "flop_use" in panel else ""
    lines = [
        f"throughput   {panel['tokens_per_second']:,.0f} tokens/s, "
        f"{panel['supervised_tokens_per_second']:,.0f} supervised, {panel['fill']:.1%} full",
        f"work         {panel['model_tflops']:.2f} TFLOP/s{use}, {panel['recompute_tflops']:.2f} recomputed",
        f"time         {panel['share_waiting_for_data']:.1%} waiting for data, {panel['share_saving']:.1%} saving, "
        f"{panel['share_validating']:.1%} validating",
    ]
    if "peak_memory_gib" in panel:
        lines.append(f"memory       {panel['memory_gib']:.2f} GiB now, {panel['peak_memory_gib']:.2f} GiB at the peak")
    return [*lines, f"skipped      {skipped} steps"]
