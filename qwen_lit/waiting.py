"""Ranks of this machine that load their libraries beside the first one, and wait until it has come to train.

Lightning starts them only then, and loading would take as long once more. Needs no torch.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

WAITS = "QWEN_LIT_WAITS"
"""Names the pipe, in the environment of a rank that waits, out of which it reads the environment that it trains in."""
EXTERNAL = ("LOCAL_RANK", "RANK", "TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""In the environment of a rank that something else starts."""
ASKED = ("devices", "strategy")


class WaitingRanks:
    """All ranks of a machine but the first."""

    def __init__(self, command: Sequence[str], count: int) -> None:
        """Starts them.

        Args:
            command: of the run, which each of them runs too.
            count: of them.
        """
        self.processes: list[subprocess.Popen[Any]] = []
        self.pipes: list[int] = []
        for rank in range(1, count + 1):
            read, write = os.pipe()
            environment = {**os.environ, "LOCAL_RANK": str(rank), WAITS: str(read)}
            self.processes.append(subprocess.Popen(command, env=environment, pass_fds=[read]))
            os.close(read)
            self.pipes.append(write)

    def begin(self, environment: Mapping[str, str]) -> list[subprocess.Popen[Any]]:
        """Let them train; returns their processes.

        Args:
            environment: of all of them, but for their own rank.
        """
        for rank, pipe in enumerate(self.pipes, 1):
            with os.fdopen(pipe, "w") as file:
                json.dump({**environment, "LOCAL_RANK": str(rank)}, file)
        self.pipes = []
        return self.processes

    def dismiss(self) -> None:
        """Let them end: the run has no use for them."""
        for pipe in self.pipes:
            os.close(pipe)
        self.pipes = []


started: list[WaitingRanks] = []
"""Those of this process, until a trainer takes them; at most one."""


def start_others(args: Sequence[str]) -> None:
    """Start the ranks that a command line asks for, where it says how many and nothing else starts them.

    Args:
        args: of the process.
    """
    count = ranks_of(args)
    if count > 1 and not any(name in os.environ for name in EXTERNAL):
        started.append(WaitingRanks(own_command(args), count - 1))


def own_command(args: Sequence[str]) -> list[str]:
    """What starts this process once more."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.executable, *([os.path.abspath(sys.argv[0])] if spec is None else ["-m", "qwen_lit"]), *args]


def ranks_of(args: Sequence[str]) -> int:
    """Ranks on this machine of a ``fit`` by DDP, as its options and its YAML files say; 1 where they leave it open.

    Args:
        args: of the command line.
    """
    said: dict[str, Any] = {}
    words = [part for one in args for part in (one.split("=", 1) if one.startswith("--") else [one])]
    for name, value in zip(words, words[1:], strict=False):
        if name == "--config":
            said |= _trainer_of(value)
        elif name.removeprefix("--trainer.") in ASKED and name.startswith("--trainer."):
            said[name.removeprefix("--trainer.")] = value
    if "fit" not in args or str(said.get("strategy")) not in ("ddp", "ddp_find_unused_parameters_true"):
        return 1
    devices = said.get("devices")
    if isinstance(devices, str):
        try:
            devices = yaml.safe_load(f"[{devices}]" if "," in devices and "[" not in devices else devices)
        except yaml.YAMLError:
            return 1
    return len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1


def _trainer_of(path: str) -> dict[str, Any]:
    """What a YAML file says of the trainer's devices; what it cannot be read for, the parser says."""
    try:
        with open(path, encoding="utf-8") as file:
            found = yaml.safe_load(file)
        trainer = found.get("trainer") or found.get("fit", {}).get("trainer") or {}
        return {name: trainer[name] for name in ASKED if name in trainer}
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return {}


def environment_given() -> dict[str, str] | None:
    """Wait, in a rank that does, for the environment that it trains in; None where the run has no use for it."""
    with os.fdopen(int(os.environ.pop(WAITS))) as file:
        text = file.read()
    return dict(json.loads(text)) if text else None
