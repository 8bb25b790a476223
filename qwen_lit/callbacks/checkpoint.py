"""Checkpoints: whole or absent, rolling by steps, best by validation loss, and one at the end."""

import logging
import os
import random
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qwen_lit.errors import UserError

log = logging.getLogger(__name__)
STEP_FILE = re.compile(r"step=(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, flushes to disk, renames; reads without executing anything."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``; a kill at any moment leaves the old file or the new one."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.tmp-{os.getpid()}")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values; pickled code in it is refused, never run."""
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)


def is_whole(path: Path) -> bool:
    """Whether every member of the checkpoint's archive is there and has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return False


def step_files(folder: Path) -> list[Path]:
    """Step checkpoints in ``folder``, newest step first."""
    found = [(int(match[1]), path) for path in folder.glob("*.ckpt") if (match := STEP_FILE.search(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint by step; damaged ones are named and set aside as ``.corrupt``.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    files = step_files(folder)
    for path in files:
        if is_whole(path):
            return path
        log.warning("%s is damaged; it is set aside as %s.corrupt", path, path.name)
        path.rename(path.with_name(path.name + ".corrupt"))
    if files:
        raise UserError(f"no checkpoint in {folder} is whole; to start afresh, give another output_dir.")
    return None


class RunCheckpoint(Checkpoint):
    """Saves the run to ``output_dir/checkpoints``, always between two optimizer steps."""

    def __init__(self, every_n_train_steps: int = 100, keep: int = 2, output_dir: str = "output") -> None:
        """Checks the numbers.

        Args:
            every_n_train_steps: optimizer steps between two checkpoints.
            keep: newest checkpoints that stay; at least 2, as the newest can be in the making.
            output_dir: set by the top-level output_dir.

        Raises:
            UserError: a number is out of range.
        """
        if every_n_train_steps < 1:
            raise UserError(f"checkpoint.every_n_train_steps is {every_n_train_steps}; it must be at least 1.")
        if keep < 2:
            raise UserError(f"checkpoint.keep is {keep}; keep at least 2, as the newest can be in the making.")
        self.every_n_train_steps, self.keep = every_n_train_steps, keep
        self.folder = Path(output_dir) / "checkpoints"
        self.saved_step = 0
        self.best = float("inf")
        self.rng: dict[str, Any] | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Restore the random generators last, when nothing before the first batch draws from them any more."""
        if self.rng is not None:
            _set_rng(self.rng)
            self.rng = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when the step count says so and no accumulation is under way."""
        step = trainer.global_step
        if step != self.saved_step and step % self.every_n_train_steps == 0:
            self._save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the best checkpoint by validation loss."""
        loss = trainer.callback_metrics.get("val/loss")
        if loss is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if float(loss) < self.best:
            self.best = float(loss)
            trainer.save_checkpoint(self.folder / "best.ckpt")
            log.info("best validation loss %.4f at step %d", self.best, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of the run, wherever it falls between two periodic saves."""
        if trainer.global_step != self.saved_step:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        started = time.perf_counter()
        path = self.folder / f"step={trainer.global_step:08d}.ckpt"
        self.saved_step = trainer.global_step
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            size = path.stat().st_size / 1e6
            log.info("checkpoint %s (%.1f MB, %.2f s)", path, size, time.perf_counter() - started)
            for old in step_files(self.folder)[self.keep :]:
                old.unlink(missing_ok=True)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only, so that reading never runs code."""
        return {"saved_step": self.saved_step, "best": self.best, "rng": _get_rng()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counters; the generators follow in ``on_train_start``."""
        self.saved_step, self.best, self.rng = state_dict["saved_step"], state_dict["best"], state_dict["rng"]


def _get_rng() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"python": [version, list(numbers), gauss], "torch": torch.get_rng_state(), "cuda": cuda}


def _set_rng(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([one.cpu() for one in state["cuda"]])
