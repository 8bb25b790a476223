"""One line for each optimizer step: what was trained and what came of it, to compare runs by."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.names import expanded


class Trace(Callback):
    """Appends ``{"step", "epoch", "loss", "rows"}`` to a file after every optimizer step."""

    def __init__(self, path: str) -> None:
        """Opens nothing yet.

        Args:
            path: the JSONL file; a resumed run appends to it. Ranks but the first add their number to its name.
        """
        self.path = Path(expanded(path))
        self.rows: list[str] = []
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Steps count from where the run stands."""
        self.step, self.rows = trainer.global_step, []
        if trainer.global_rank:
            self.path = self.path.with_name(f"{self.path.name}.{trainer.global_rank}")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remember what each document of the micro-batch says; write the line after the step."""
        ids, starts = batch["input_ids"].flatten().cpu().numpy(), batch["cu_seqlens"].tolist()
        for begin, end in zip(starts, starts[1:], strict=False):
            self.rows.append(hashlib.blake2b(ids[begin:end].tobytes(), digest_size=8).hexdigest())
        if trainer.global_step == self.step:
            return
        self.step = trainer.global_step
        # A step that is skipped logs no loss; what stands there is that of the step before.
        loss = None if getattr(pl_module, "skipped_in_a_row", 0) else trainer.logged_metrics.get("train/loss")
        value = float(loss) if loss is not None else None
        line = {"step": self.step, "epoch": trainer.current_epoch, "loss": value, "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.rows = []
