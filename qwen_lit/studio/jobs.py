"""Commands as processes of their own session: they outlive the page, and are found again by their files."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from qwen_lit.run import read_object

KEEPER = (
    'cd "$2" || exit 2; folder=$1; shift 2; echo $$ > "$folder/keeper"; '
    '"$@" & echo $! > "$folder/pid"; wait $!; echo $? > "$folder/code"'
)
"""Runs a command, and writes its number and its exit code; a shell does it, as it outlives the page with it."""
TAIL = 200_000
"""Bytes of an output that are shown."""


def shown_command(arguments: list[str]) -> str:
    """The command line as one types it."""
    return shlex.join(["qwen-lit", *arguments])


@dataclass(frozen=True)
class Job:
    """One command that was started from the page."""

    folder: Path

    @property
    def arguments(self) -> list[str]:
        """Of the command line, beginning with the command."""
        return [str(one) for one in read_object(self.folder / "job.json").get("arguments", [])]

    @property
    def kind(self) -> str:
        """The command, such as ``fit``."""
        return self.arguments[0] if self.arguments else ""

    @property
    def output_dir(self) -> Path | None:
        """The output folder that it writes; None for a command that writes none."""
        found = read_object(self.folder / "job.json").get("output_dir")
        return Path(found) if isinstance(found, str) else None

    @property
    def pid(self) -> int | None:
        """Of the command's process; None while there is none."""
        return _number(self.folder / "pid")

    @property
    def code(self) -> int | None:
        """What the command ended with; None while it runs, or where it was killed with its keeper."""
        return _number(self.folder / "code")

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        if self.code is not None:
            return False
        pid = self.pid
        if pid is None:
            # The keeper has not come to it yet.
            return time.time() - self.folder.stat().st_mtime < 10
        # The keeper is there until it has written the code.
        both = (pid, _number(self.folder / "keeper"))
        return any(one is not None and str(self.folder).encode() in _environment(one) for one in both)

    def stop(self) -> None:
        """Ask it to stop: while it trains, it finishes the step and saves."""
        if self.alive and self.pid is not None:
            os.kill(self.pid, signal.SIGTERM)

    def output(self, name: str = "log") -> str:
        """The end of what it has written to ``log``, its stderr, or ``out``, its stdout."""
        try:
            with (self.folder / name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""


class Jobs:
    """All commands that were started from the page, in one folder."""

    def __init__(self, folder: Path, workdir: Path) -> None:
        """Makes the folder.

        Args:
            folder: for the jobs.
            workdir: in which the commands run.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.workdir = folder, workdir

    def start(self, arguments: list[str], output_dir: Path | None = None) -> Job:
        """Start a command in a session of its own.

        Args:
            arguments: of ``qwen-lit``.
            output_dir: that it writes.
        """
        folder = self._new_folder()
        about = {"arguments": arguments, "output_dir": str(output_dir) if output_dir else None}
        (folder / "job.json").write_text(json.dumps(about), encoding="utf-8")
        command = [sys.executable, "-m", "qwen_lit", *arguments]
        # By the variable a process is told from another one that has got its number.
        environment = {**os.environ, "QWEN_LIT_STUDIO_JOB": str(folder), "PYTHONPATH": _path()}
        with (folder / "log").open("wb") as log, (folder / "out").open("wb") as out:
            subprocess.Popen(
                ["sh", "-c", KEEPER, "sh", str(folder), str(self.workdir), *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return Job(folder)

    def all(self) -> list[Job]:
        """The newest first."""
        return [Job(one.parent) for one in sorted(self.folder.glob("*/job.json"), reverse=True)]

    def newest(self, kind: str) -> Job | None:
        """The newest of one command."""
        return next((one for one in self.all() if one.kind == kind), None)

    def of_run(self, output_dir: Path) -> list[Job]:
        """Those that write an output folder, the newest first."""
        return [one for one in self.all() if one.output_dir == output_dir]

    def _new_folder(self) -> Path:
        for number in range(1000):
            path = self.folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{number:03}"
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise RuntimeError(f"no folder for a job can be made in {self.folder}")


def _path() -> str:
    """Where Python finds this package from any folder, also where it is not installed."""
    given = [os.path.abspath(one) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    return os.pathsep.join([str(Path(__file__).resolve().parents[2]), *given])


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _environment(pid: int) -> bytes:
    """Of a process; empty where there is none, or it has ended and waits for its parent."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return b""
