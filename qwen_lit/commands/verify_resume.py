"""Proof that a killed run comes out as if nothing had happened, on the user's own model, data and card."""

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from safetensors.torch import load_file

from qwen_lit.callbacks.checkpoint_io import manifest_of
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.errors import RunError, UserError
from qwen_lit.model.duration import check_limits, total_steps
from qwen_lit.run import Run

LOSS_TOLERANCE = 1e-3
"""On CUDA, whose atomic additions come in any order; on the CPU every bit must be the same."""


@dataclass
class Verdict:
    """How a run that was killed differs from one that was not."""

    steps: int
    killed_at: int
    same_rows: bool
    loss_difference: float
    """Largest difference of a step's loss, in nats a token."""
    adapter_difference: float
    """Largest difference of an adapter weight."""
    exact: bool
    """Whether every bit has to be the same."""

    @property
    def good(self) -> bool:
        """Whether the runs are equal as far as the device allows."""
        tolerance = 0.0 if self.exact else LOSS_TOLERANCE
        return self.same_rows and self.loss_difference <= tolerance and (not self.exact or not self.adapter_difference)

    def __str__(self) -> str:
        return (
            f"{self.steps} steps, killed after step {self.killed_at} and resumed\n"
            f"rows        {'the same, in the same order' if self.same_rows else 'DIFFERENT'}\n"
            f"losses      differ by at most {self.loss_difference:.2e}\n"
            f"adapter     differs by at most {self.adapter_difference:.2e}\n"
            f"verdict     {'a resumed run is the same run' if self.good else 'a resumed run is ANOTHER run'}"
        )


def verify_resume(trainer: L.Trainer, data: QwenDataModule, run: Run, steps: int) -> int:
    """Print the verdict on a run of the user's own configuration; returns the exit code, 1 for another run.

    Args:
        trainer: with the limits of the run; nothing is trained by it.
        data: that is trained on; nothing of it is prepared yet.
        run: whose configuration it is.
        steps: optimizer steps of each run; fewer where the run has fewer.

    Raises:
        RunError: a run failed, or ended before it could be killed.
        UserError: the run has a single step.
    """
    data.prepare_data()
    data.setup()
    check_limits(trainer, data)
    steps = min(steps, total_steps(trainer, data) or steps)
    if steps < 2:
        raise UserError("verify-resume: the run has a single optimizer step; give more rows or epochs.")
    verdict = verify(run.yaml, run.verification, steps)
    print(verdict)
    return 0 if verdict.good else 1


def verify(config: str, folder: Path, steps: int) -> Verdict:
    """Train ``steps`` optimizer steps twice, once with a SIGKILL halfway and a resume, and compare.

    Args:
        config: the configuration of ``fit`` as YAML.
        folder: where both runs write; emptied first.
        steps: at least 2.

    Raises:
        RunError: a run failed, or ended before it could be killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    path = Run(folder).config_file
    path.write_text(config, encoding="utf-8")
    half = steps // 2

    def start(name: str, *options: str) -> subprocess.Popen[bytes]:
        out = folder / name
        command = [
            sys.executable,
            "-m",
            "qwen_lit",
            "fit",
            "--config",
            str(path),
            "--output_dir",
            str(out),
            "--trainer.max_steps",
            str(steps),
            "--trainer.limit_val_batches",
            "0",
            "--trainer.log_every_n_steps",
            "1",
            "--trainer.enable_progress_bar",
            "false",
            "--checkpoint.every_n_train_steps",
            str(half),
            "--export.merge",
            "false",
            "--export.checkpoint",
            "last",
            "--trainer.callbacks+=qwen_lit.callbacks.trace.Trace",
            f"--trainer.callbacks.path={out / 'trace.jsonl'}",
            *options,
        ]
        return subprocess.Popen(command)

    def finish(process: subprocess.Popen[bytes]) -> None:
        with _ended(process):
            process.wait()
        if process.returncode:
            raise RunError(f"a run ended with exit code {process.returncode}; its messages stand above.")

    finish(start("whole"))
    checkpoint = Run(folder / "killed").step_checkpoint(half)
    with _ended(start("killed")) as killed:
        while not (checkpoint.is_file() and manifest_of(checkpoint).is_file()):
            if killed.poll() is not None:
                raise RunError(
                    f"the run ended with exit code {killed.returncode} before its checkpoint at step {half}."
                )
            time.sleep(0.005)
    finish(start("killed", "--ckpt_path", "last"))
    return compare(folder / "whole", folder / "killed", half)


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Whatever happens meanwhile, the process is gone afterwards, by SIGKILL."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def compare(whole: Path, killed: Path, half: int) -> Verdict:
    """The verdict from what both runs have left."""
    first, second = _steps(whole), _steps(killed)
    rows = [[line["rows"] for line in lines.values()] for lines in (first, second)]
    # A step that was skipped has no loss on either side.
    pairs = [(first[n]["loss"], second[n]["loss"]) for n in first if n in second]
    losses = [abs((a or 0.0) - (b or 0.0)) for a, b in pairs]
    left, right = (load_file(Run(one).adapter / "adapter_model.safetensors") for one in (whole, killed))
    weights = [float((left[name] - right[name]).abs().max()) for name in left]
    return Verdict(
        len(first), half, rows[0] == rows[1], max(losses), max(weights), exact=not torch.cuda.is_available()
    )


def _steps(folder: Path) -> dict[int, dict[str, Any]]:
    """The last line of each step: what was trained again after the kill counts."""
    lines = [json.loads(line) for line in (folder / "trace.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: line for line in lines}
