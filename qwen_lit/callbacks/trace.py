"""One line for each optimizer step: what was trained and what came of it, to compare runs by."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.data.batches import Batch
from qwen_lit.names import expanded


class Trace(Callback):
    """Appends ``{"step", "epoch", "loss", "rows"}`` to a file after every optimizer step."""

    def __init__(self, path: str) -> None:
        """Keeps the path; the file is opened at the first step.

        Args:
            path: the JSONL file; a resumed run appends to it. Ranks but the first add their number to its name.
        """
        self.path = Path(expanded(path))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add the rank's number to the file name on all ranks but the first."""
        if trainer.global_rank:
            self.path = self.path.with_name(f"{self.path.name}.{trainer.global_rank}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """Write the line of the step: what each document of its micro-batches says, and the loss."""
        rows = []
        for one in batch:
            ids, starts = one["input_ids"].flatten().cpu().numpy(), one["cu_seqlens"].tolist()
            for begin, end in zip(starts, starts[1:], strict=False):
                rows.append(hashlib.blake2b(ids[begin:end].tobytes(), digest_size=8).hexdigest())
        # A skipped step logs no loss; ``logged_metrics`` still holds the loss of the step before.
        loss = None if getattr(pl_module, "skipped_in_a_row", 0) else trainer.logged_metrics.get("train/loss")
        value = float(loss) if loss is not None else None
        line = {"step": trainer.global_step, "epoch": trainer.current_epoch, "loss": value, "rows": rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
