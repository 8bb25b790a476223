"""Throughput and memory, for the progress bar and TensorBoard."""

import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback


class Throughput(Callback):
    """Tokens per second and peak memory, counted on the host without waiting for the device."""

    def __init__(self) -> None:
        self.tokens = 0
        self.since = time.perf_counter()
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed run counts from its own first step, and writes its config as text."""
        self.tokens, self.since, self.step = 0, time.perf_counter(), trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log at the trainer's own interval, once per optimizer step."""
        self.tokens += batch["tokens"]
        steps = trainer.global_step - self.step
        if steps >= trainer.log_every_n_steps:  # type: ignore[attr-defined]
            now = time.perf_counter()
            rate = self.tokens / (now - self.since)
            pl_module.log("train/tokens_per_second", rate, prog_bar=True)
            pl_module.log("train/lr", trainer.optimizers[0].param_groups[0]["lr"], prog_bar=True)
            if torch.cuda.is_available():
                pl_module.log("train/peak_memory_gib", torch.cuda.max_memory_allocated() / 2**30)
            self.tokens, self.since, self.step = 0, now, trainer.global_step
