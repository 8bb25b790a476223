"""Throughput, where the time goes, and memory: counted on the host without waiting for the device."""

import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.flops import peak_flops, token_flops


@dataclass
class Counts:
    """What has been done since some moment."""

    tokens: int = 0
    supervised: int = 0
    computed: int = 0
    """Tokens with the padding."""
    steps: int = 0
    waiting: float = 0.0
    """Seconds in the data loader."""
    saving: float = 0.0
    validating: float = 0.0
    seconds: float = 0.0

    def minus(self, other: "Counts") -> "Counts":
        """What has come since ``other``."""
        return Counts(**{name: value - getattr(other, name) for name, value in vars(self).items()})


@dataclass(eq=False)
class Throughput(Callback):
    """Logs the panel at the trainer's own interval, and keeps the whole run's for its summary."""

    counts: Counts = field(default_factory=Counts)
    last: Counts = field(default_factory=Counts)
    started: float = 0.0
    validation_began: float = 0.0
    flops: tuple[float, float] = (0.0, 0.0)
    recomputed: float = 0.0
    """Share of the layers that are computed twice."""
    peak: float | None = None
    step: int = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed run counts from its own first step."""
        self.started, self.step = time.perf_counter(), trainer.global_step
        self.counts, self.last = Counts(), Counts()
        module: Any = pl_module
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        lengths, supervised = data.train_rows.column("length"), data.train_rows.column("supervised")
        # The mean of a token, not of a document: long documents hold more of them.
        length = float((lengths.astype(float) ** 2).sum() / max(1, lengths.sum()))
        self.flops = token_flops(module.model, length, float(supervised.sum() / max(1, lengths.sum())))
        layers = module.config.num_hidden_layers
        again = module.fast.recompute_layers if module.fast else layers * module.gradient_checkpointing
        self.recomputed = again / layers
        device = trainer.strategy.root_device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation is timed apart."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Samples belong to it."""
        if not trainer.sanity_checking:
            self.counts.validating += time.perf_counter() - self.validation_began

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count; log once the interval is full, on an optimizer step."""
        self.counts.tokens += batch["tokens"]
        self.counts.supervised += batch["targets"].numel()
        self.counts.computed += batch["input_ids"].numel()
        self.counts.steps = trainer.global_step - self.step
        since = self.counts.steps - self.last.steps
        if since >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            now = self._now(trainer)
            for name, value in self.panel(now.minus(self.last)).items():
                pl_module.log(f"train/{name}", value)
            pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"])
            self.last = now

    def _now(self, trainer: Any) -> Counts:
        loader = trainer.train_dataloader
        saved = next((one.stalled for one in trainer.callbacks if isinstance(one, RunCheckpoint)), 0.0)
        seconds = time.perf_counter() - self.started
        return Counts(
            **{**vars(self.counts), "waiting": getattr(loader, "waited", 0.0), "saving": saved, "seconds": seconds}
        )

    def whole(self, trainer: Any) -> dict[str, float]:
        """The panel of the run so far."""
        return self.panel(self._now(trainer))

    def panel(self, counts: Counts) -> dict[str, float]:
        """Rates and shares of a stretch of training.

        ``model_tflops`` counts 4 operations a frozen parameter and token, without recomputing;
        ``recompute_tflops`` counts what that adds; ``flop_use`` is the first over the card's peak.
        """
        seconds = max(counts.seconds, 1e-9)
        training = max(seconds - counts.validating, 1e-9)
        panel = {
            "tokens_per_second": counts.tokens / training,
            "supervised_tokens_per_second": counts.supervised / training,
            "fill": counts.tokens / max(1, counts.computed),
            "model_tflops": counts.tokens * self.flops[0] / training / 1e12,
            "recompute_tflops": counts.tokens * self.flops[1] * self.recomputed / training / 1e12,
            "share_waiting_for_data": counts.waiting / seconds,
            "share_saving": counts.saving / seconds,
            "share_validating": counts.validating / seconds,
        }
        if self.peak:
            panel["flop_use"] = panel["model_tflops"] * 1e12 / self.peak
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            panel["memory_gib"] = torch.cuda.memory_allocated() / 2**30
            panel["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return panel
