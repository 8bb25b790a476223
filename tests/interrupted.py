"""Run as a script: a command in process groups of its own, each of which is disturbed while its workers run.

Arguments: the cache folder, the disturbances by name, and the command. The output is JSON: for each disturbance the
exit code (null: still there after 60 s), whether a process of the group was left, and what is left in the cache.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from qwen_lit.cli import main
from qwen_lit.data import encoding
from qwen_lit.data.encoding import Worker

WORKERS = 3


class Endless(Worker):
    """Tokenises its second chunk over and over, so that no command ends before it is disturbed."""

    chunks = 0

    def __call__(self, chunk):
        """As of ``Worker``; of the second chunk on it never returns."""
        self.chunks += 1
        encoded = super().__call__(chunk)
        while self.chunks > 1:
            super().__call__(chunk)
        return encoded


def children(process: int) -> list[int]:
    """Of all its threads: a process may be begun by any of them."""
    found = []
    for listed in Path(f"/proc/{process}/task").glob("*/children"):
        found += map(int, listed.read_text().split())
    return found


def disturb(what: str, process: int) -> None:
    target, _, name = what.partition(" ")
    number = getattr(signal, name)
    if target == "group":
        os.killpg(process, number)
    else:
        os.kill(process if target == "main" else children(process)[0], number)


def end(process: int, seconds: float) -> int | None:
    """Its exit code."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    return None


def group_is_there(group: int, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.05)
    return True


def run(what: str, cache: Path, command: list[str]) -> dict[str, object]:
    process = os.fork()
    if not process:
        os.setpgid(0, 0)
        encoding.Worker = Endless
        os._exit(main(command))
    limit = time.monotonic() + 60
    while len(children(process)) < WORKERS and time.monotonic() < limit:
        time.sleep(0.02)
    time.sleep(0.3)
    disturb(what, process)
    code = end(process, 60)
    left = group_is_there(process, 10)
    if left:
        os.killpg(process, signal.SIGKILL)
    kept = sorted(path.name.rpartition(".")[2] for path in cache.glob("*") if path.suffix != ".lock")
    return {"code": code, "left": left, "cache": kept}


if __name__ == "__main__":
    folder, asked = Path(sys.argv[1]), sys.argv[2].split(",")
    print(json.dumps({what: run(what, folder, sys.argv[3:]) for what in asked}))
