"""What a run stands on, so that it can be made again: versions, the machine, and the user's own project."""

import platform
import re
import subprocess
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from qwen_lit import __version__

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "lightning")
DRIVER = re.compile(r"Kernel Module(?: for \S+)?\s+(\d[\d.]*)")
"""The version in /proc/driver/nvidia/version."""
PATIENCE = 10
"""Seconds that git may take."""


def versions() -> dict[str, str | None]:
    """Versions of this package, of Python, of torch's CUDA (None for a build without), and of the libraries that
    compute."""
    found: dict[str, str | None] = {"qwen_lit": __version__, "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES} | {"cuda": torch.version.cuda}


def hardware(device: torch.device, count: int) -> dict[str, Any]:
    """The devices of a run: ``type``, ``count``, ``name``; of a GPU also ``memory_gib`` and, if known, ``driver``.

    Args:
        device: of this process.
        count: of all processes.
    """
    if device.type != "cuda":
        return {"type": device.type, "count": count, "name": _processor()}
    properties = torch.cuda.get_device_properties(device)
    found = {"type": "cuda", "count": count, "name": properties.name}
    found["memory_gib"] = round(properties.total_memory / 2**30, 2)
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if match := DRIVER.search(text):
            found["driver"] = match[1]
    return found


def _processor() -> str:
    """The CPU's name, as the system gives it."""
    with suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        if match := re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE):
            return match[1].strip()
    return platform.processor() or platform.machine()


def git(folder: Path) -> dict[str, Any] | None:
    """The git checkout that holds ``folder``: its ``commit``, and whether tracked files differ from it, as ``dirty``.

    None where there is no checkout, no commit or no git.
    """
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=PATIENCE, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no"))
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return {"commit": commit, "dirty": bool(changes)}
