"""The few optimizer steps that ``plan`` trains on a GPU, and what is measured of them."""

import time
from dataclasses import asdict
from typing import Any, cast

import lightning as L
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy

from qwen_lit.callbacks.checkpoint_io import AtomicCheckpointIO
from qwen_lit.data.batches import Batch
from qwen_lit.data.datamodule import data_of
from qwen_lit.model.fidelity import Fidelity, compared, measure
from qwen_lit.model.module import QwenModule
from qwen_lit.model.products import floor_of
from qwen_lit.seams import options_of

STEPS = 4
"""Optimizer steps that are measured; the first one warms up and is left out."""
NEVER = 10**9
"""Steps between two checkpoints of a trial, which saves at its end alone."""


class StepTimer(Callback):
    """Times each optimizer step and one validation batch, compares products in 8 bits with bf16, and takes the peak of
    memory."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.validation = 0.0
        self.peak = 0
        self.compared: Batch | None = None
        """Whose gradient is compared."""
        self.fidelity: Fidelity | None = None
        """Of the gradient after the last step; None for products in bf16."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        """Start the clock of an optimizer step."""
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """Stop the clock of an optimizer step, after its update."""
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.tokens.append(sum(one["tokens"] for one in batch))
        self.compared = compared(batch) or self.compared

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare a gradient, time the first validation batch, which is the heaviest, and read the peak of memory.

        By now B is not zero any more, and the gradient by A is not either.
        """
        module = cast(QwenModule, pl_module)
        if self.compared is not None and module.products.used != "bf16":
            self.fidelity = measure(module, trainer.precision_plugin, self.compared)
        loader = data_of(trainer).val_dataloader()
        for step in loader:
            moved = move_data_to_device(step, module.device)
            module.eval()
            module.on_validation_epoch_start()
            started = time.perf_counter()
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                module.validation_step(moved, 0)
            torch.cuda.synchronize()
            self.validation = (time.perf_counter() - started) * len(loader)
            break
        self.peak = torch.cuda.max_memory_allocated()


def products_told(module: QwenModule, found: Fidelity | None) -> dict[str, Any]:
    """What products in 8 bits are computed in, the floor of the cosine, and the cosine and error where they are known.

    Args:
        module: whose products are asked for in 8 bits.
        found: of its gradient; None where that was not compared.
    """
    told: dict[str, Any] = {"told": module.products.told, "floor": floor_of(module.settings)}
    told |= {"left_in_bf16": [list(one) for one in module.products.wide or ()]}
    return told if found is None else told | asdict(found)


def trial(trainer: L.Trainer, callbacks: list[Callback], steps: int) -> L.Trainer:
    """A Trainer of its own for a few steps, on the same devices and in the same precision.

    Args:
        trainer: of the run, which stays as it is.
        callbacks: of the trial.
        steps: optimizer steps at most.
    """
    device, strategy = trainer.strategy.root_device, trainer.strategy
    return type(trainer)(
        accelerator=trainer.accelerator,
        devices=trainer.num_devices if device.type == "cpu" else trainer.device_ids,
        num_nodes=trainer.num_nodes,
        strategy="auto" if isinstance(strategy, SingleDeviceStrategy) else "ddp",
        plugins=[strategy.precision_plugin, AtomicCheckpointIO()],
        max_steps=steps,
        accumulate_grad_batches=options_of(trainer).micro_batches_per_step,
        gradient_clip_val=options_of(trainer).clip_value,
        limit_train_batches=trainer.limit_train_batches,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
