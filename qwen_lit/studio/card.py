"""The card of this machine, as its driver tells."""

import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """A GPU."""

    name: str
    total: int
    """MiB of its memory."""
    used: int
    """MiB that are taken."""


def cards() -> list[Card]:
    """The GPUs; none where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = [tool, "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return read(found)


def read(output: str) -> list[Card]:
    """The cards in what the driver's tool prints; a line of another form is none."""
    lines = [[part.strip() for part in line.rsplit(",", 2)] for line in output.splitlines()]
    return [
        Card(one[0], int(one[1]), int(one[2])) for one in lines if len(one) == 3 and all(map(str.isdigit, one[1:]))
    ]
