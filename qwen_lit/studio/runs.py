"""Runs as their output folders show them, whoever has started them."""

import fcntl
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwen_lit.run import Run, read_object
from qwen_lit.studio.folders import Folders

FLOCK = "hhqqi"
"""``struct flock`` on Linux: type, whence, start, length, pid."""


@dataclass(frozen=True)
class Sample:
    """One answer to a fixed prompt."""

    step: int
    prompt: str
    answer: str
    wanted: str | None


def holder(lock: Path) -> int | None:
    """The process that holds the lock of an output folder; None where none does.

    It is asked for and not tried: whoever tries a lock holds it for a moment, and keeps a run from starting.
    """
    try:
        with lock.open("r+b") as file:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, 0, 0, 0, 0)
            kind, _, _, _, pid = struct.unpack(FLOCK, fcntl.fcntl(file, fcntl.F_GETLK, asked))
    except OSError:
        return None
    return None if kind == fcntl.F_UNLCK else int(pid)


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's output."""
    return (folder / ".lock").is_file() and not (folder / ".lock").is_symlink()


def find_runs(folders: Folders) -> list[Run]:
    """The runs in the folders, the newest first."""
    found = [Run(one) for one in folders.walk() if is_run(one)]
    return sorted(found, key=lambda run: _time(run.output_dir / ".lock"), reverse=True)


def state(run: Run) -> str:
    """``running``, ``finished`` where it has left a summary, ``stopped`` where it can go on, or ``begun``."""
    if holder(run.output_dir / ".lock") is not None:
        return "running"
    if run.summary.is_file():
        return "finished"
    return "stopped" if any(run.checkpoints.glob("step=*.ckpt")) else "begun"


def facts(run: Run) -> dict[str, Any]:
    """The configuration with the facts of the run, flat, as the logger writes it at the start."""
    try:
        found = yaml.safe_load((run.logs / "hparams.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return found if isinstance(found, dict) else {}


def steps_of(run: Run) -> int | None:
    """Optimizer steps of the whole run; None where it is not known."""
    found = facts(run).get("run.steps")
    return found if isinstance(found, int) else None


def summary(run: Run) -> dict[str, Any]:
    """What came of it; empty before its end."""
    return read_object(run.summary)


def samples(run: Run) -> list[Sample]:
    """Answers to fixed prompts, in the order of the steps."""
    try:
        lines = run.samples.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines]
        return [Sample(one["step"], one["prompt"], one["answer"], one.get("wanted")) for one in found]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def before_and_after(run: Run) -> list[tuple[Sample, Sample]]:
    """The first and the latest answer to each prompt."""
    first: dict[str, Sample] = {}
    last: dict[str, Sample] = {}
    for one in samples(run):
        first.setdefault(one.prompt, one)
        last[one.prompt] = one
    return [(first[prompt], last[prompt]) for prompt in first]


def checkpoints(run: Run) -> list[Path]:
    """The checkpoints, by name."""
    return sorted(one for one in run.checkpoints.glob("*.ckpt") if one.is_file())


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
