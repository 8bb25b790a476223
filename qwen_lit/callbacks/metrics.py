"""Throughput, where the time goes, and memory: counted on the host without waiting for the device.

Each rank counts its own; at the logging interval they are added up. Tokens a second are the run's, of all its cards
together; where there are several, those of a card stand beside them.
"""

import time
from dataclasses import dataclass, field
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.data.batches import Batch
from qwen_lit.data.datamodule import data_of
from qwen_lit.model.facts import recomputed_share, training_flops
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.flops import peak_flops
from qwen_lit.seams import options_of


@dataclass
class Counts:
    """Tokens, steps and seconds that were counted since some moment."""

    tokens: int = 0
    supervised: int = 0
    computed: int = 0
    """Tokens that were computed, with all that pads or fills micro-batches up."""
    steps: int = 0
    waiting: float = 0.0
    """Seconds in the data loader."""
    saving: float = 0.0
    validating: float = 0.0
    seconds: float = 0.0

    def minus(self, other: "Counts") -> "Counts":
        """What has come since ``other``."""
        return Counts(**{name: value - getattr(other, name) for name, value in vars(self).items()})

    def over_ranks(self, trainer: L.Trainer) -> "Counts":
        """Tokens of all ranks; steps and seconds of one rank on average. All ranks call this."""
        if trainer.world_size == 1:
            return self
        sums = torch.tensor(list(vars(self).values()), dtype=torch.float64, device=trainer.strategy.root_device)
        torch.distributed.all_reduce(sums)
        summed = dict(zip(vars(self), sums.tolist(), strict=True))
        own = ("tokens", "supervised", "computed")
        return Counts(**{name: value if name in own else value / trainer.world_size for name, value in summed.items()})


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether an optimizer step is one of those at ``trainer.log_every_n_steps``; 0 logs none."""
    return bool(options_of(trainer).log_every_n_steps) and step % options_of(trainer).log_every_n_steps == 0


def memory(trainer: L.Trainer) -> dict[str, float]:
    """GPU memory in GiB of the rank that has most of it: now, and at most so far."""
    if trainer.strategy.root_device.type != "cuda":
        return {}
    used = torch.tensor([torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()], dtype=torch.float64)
    if trainer.world_size > 1:
        used = used.to(trainer.strategy.root_device)
        torch.distributed.all_reduce(used, op=torch.distributed.ReduceOp.MAX)
    return dict(zip(("memory_gib", "peak_memory_gib"), (used / 2**30).tolist(), strict=True))


def per_card(rate: float, cards: int) -> dict[str, float]:
    """Tokens a second of a card on average, by their name; empty where one card makes all of them.

    Args:
        rate: tokens a second of the run.
        cards: of the run.
    """
    return {"tokens_per_second_per_card": rate / cards} if cards > 1 else {}


@dataclass(eq=False)
class Throughput(Callback):
    """Logs throughput, time and memory at ``trainer.log_every_n_steps``, and keeps those of the whole run."""

    saver: RunCheckpoint | None = None
    """Knows how long training has waited for saving."""
    counts: Counts = field(default_factory=Counts)
    last: Counts = field(default_factory=Counts)
    started: float = 0.0
    validation_began: float = 0.0
    flops: tuple[float, float] = (0.0, 0.0)
    recomputed: float = 0.0
    """Share of the layers that are computed twice."""
    peak: float | None = None
    """Operations a second of all cards."""
    first: int = 0
    """Steps that were made before this run."""
    cards: int = 1
    """Ranks of the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; a resumed run counts from its own first step."""
        self.started, self.first, self.cards = time.perf_counter(), trainer.global_step, trainer.world_size
        self.counts, self.last = Counts(), Counts()
        module = cast(QwenModule, pl_module)
        data = data_of(trainer)
        assert data.train_rows is not None
        lengths, supervised = data.train_rows.column("length"), data.train_rows.column("supervised")
        # The mean of a token, not of a document: long documents hold more of them.
        length = float((lengths.astype(float) ** 2).sum() / max(1, lengths.sum()))
        self.flops = training_flops(module, length, float(supervised.sum() / max(1, lengths.sum())))
        self.recomputed = recomputed_share(module)
        device = trainer.strategy.root_device
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        self.peak = self.peak and self.peak * trainer.world_size

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock of the validation, which is timed apart."""
        self.validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock of the validation, which the samples belong to."""
        if not trainer.sanity_checking:
            self.counts.validating += time.perf_counter() - self.validation_began

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """Count the micro-batches of the step; log at the trainer's interval."""
        module = cast(QwenModule, pl_module)
        for one in batch:
            self.counts.tokens += one["tokens"]
            self.counts.supervised += one["targets"].numel()
        self.counts.computed += module.computed_tokens(batch)
        step = trainer.global_step
        self.counts.steps = step - self.first
        # A plan that is made anew in the run recomputes other layers.
        self.recomputed = recomputed_share(module)
        if is_logged(trainer, step):
            for name, value in self.latest(trainer).items():
                pl_module.log(f"train/{name}", value)

    def _now(self, trainer: L.Trainer) -> Counts:
        saved = self.saver.stalled if self.saver is not None else 0.0
        seconds, waited = time.perf_counter() - self.started, data_of(trainer).waited
        return Counts(**{**vars(self.counts), "waiting": waited, "saving": saved, "seconds": seconds})

    def latest(self, trainer: L.Trainer) -> dict[str, float]:
        """The metrics since the last call; empty where no step was made. All ranks call this."""
        now = self._now(trainer)
        since, self.last = now.minus(self.last), now
        return self.panel(since.over_ranks(trainer)) | memory(trainer) if since.steps else {}

    def whole(self, trainer: L.Trainer) -> dict[str, float]:
        """The metrics of the run so far. All ranks call this."""
        return self.panel(self._now(trainer).over_ranks(trainer)) | memory(trainer)

    def panel(self, counts: Counts) -> dict[str, float]:
        """Rates and shares of a stretch of training.

        ``model_tflops`` counts 4 operations a frozen parameter and token, without recomputing;
        ``recompute_tflops`` counts what that adds; ``flop_use`` is the first over the card's peak.
        """
        seconds = max(counts.seconds, 1e-9)
        training = max(seconds - counts.validating, 1e-9)
        panel = {
            "tokens_per_second": counts.tokens / training,
            **per_card(counts.tokens / training, self.cards),
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
        return panel
