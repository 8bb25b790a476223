"""A run: the output folder with its lock and the names below it, its configuration, and what it goes on from."""

import fcntl
import json
import logging
import os
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from qwen_lit.errors import UserError
from qwen_lit.names import ADAPTER, TRAINING_CONFIG

log = logging.getLogger(__name__)
PARTIAL = ".tmp"
"""At the end of the name of a folder in the making."""


@dataclass(frozen=True)
class Run:
    """What a command works on. The command line makes one; callbacks and commands are given it.

    With nothing but ``output_dir`` it names what another run has left there.
    """

    output_dir: Path
    checkpoint: Path | None = None
    """What the command goes on from, measures or exports: a checkpoint file, or the adapter folder that is named as
    one; None where there is none."""
    config: dict[str, Any] = field(default_factory=dict)
    """The whole configuration as plain values: for a command that uses an adapter, the one it was trained with."""
    given: tuple[str, ...] = ()
    """What followed the command on the command line."""
    yaml: str = ""
    """The configuration of ``fit`` as config.yaml holds it, without the options of any other command."""
    started: datetime = field(default_factory=lambda: datetime.now().astimezone())
    clock: float = field(default_factory=time.perf_counter)
    """``started`` on the clock of ``time.perf_counter``, in seconds."""

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.output_dir / "checkpoints"

    @property
    def best(self) -> Path:
        """Checkpoint of the lowest validation loss."""
        return self.checkpoints / "best.ckpt"

    def step_checkpoint(self, step: int) -> Path:
        """Checkpoint after so many optimizer steps."""
        return self.checkpoints / f"step={step:08d}.ckpt"

    @property
    def model_checkpoints(self) -> Path:
        """Folder in which Lightning's own ``ModelCheckpoint`` saves where it names none."""
        return self.output_dir / "model_checkpoints"

    @property
    def adapter(self) -> Path:
        """Folder of the trained adapter."""
        return self.output_dir / ADAPTER

    @property
    def merged(self) -> Path:
        """Folder of the merged model."""
        return self.output_dir / "final_model"

    @property
    def logs(self) -> Path:
        """Folder of the TensorBoard files."""
        return self.output_dir / "logs"

    @property
    def samples(self) -> Path:
        """Answers to fixed prompts, a JSON object a line."""
        return self.output_dir / "samples.jsonl"

    @property
    def summary(self) -> Path:
        """What came of the run, as JSON."""
        return self.output_dir / "summary.json"

    @property
    def report(self) -> Path:
        """The report of the run as an HTML page."""
        return self.output_dir / "report.html"

    @property
    def config_file(self) -> Path:
        """The configuration as YAML."""
        return self.output_dir / "config.yaml"

    def config_until(self, step: int) -> Path:
        """A free name for the configuration with which the run was trained until a step."""
        number, path = 1, self.output_dir / f"config-{step}.yaml"
        while path.exists():
            number += 1
            path = self.output_dir / f"config-{step}-{number}.yaml"
        return path

    def earlier_configs(self) -> list[Path]:
        """All that ``config_until`` has named."""
        return sorted(self.output_dir.glob("config-*.yaml"))

    @property
    def verification(self) -> Path:
        """Folder in which ``verify-resume`` trains."""
        return self.output_dir / "verify_resume"

    def written_before_results(self) -> list[Path]:
        """What a run writes before it has results; config.yaml is none of it, as other processes may yet read it."""
        partial = [one.with_name(one.name + PARTIAL) for one in (self.adapter, self.merged)]
        return [self.checkpoints, self.logs, self.samples, self.summary, self.report, *partial]

    def earlier_folder(self) -> Path:
        """A new folder, named by the time, for what is set aside.

        Raises:
            UserError: none can be made.
        """
        name = f"earlier-{datetime.now():%Y%m%d-%H%M%S}"
        for number in range(1000):
            path = self.output_dir / (name + f"-{number}" * bool(number))
            try:
                path.mkdir()
            except FileExistsError:
                continue
            return path
        raise UserError(f"output_dir: no folder {name} can be made in {self.output_dir}; give another.")

    def lock(self) -> IO[str]:
        """Lock the output folder for this process; the file returned holds the lock while it is open.

        Raises:
            UserError: another process writes there, or nobody can.
        """
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            file = (self.output_dir / ".lock").open("a+")
            file.seek(0)
            owner = file.read().strip()
        except OSError as error:
            reason = error.strerror
            raise UserError(
                f"output_dir: cannot write to {self.output_dir} ({reason}); give another folder."
            ) from error
        try:
            # Of the process, not of the open file: the workers it forks do not keep it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"output_dir: process {owner} already trains into {self.output_dir}; wait for it, or give another "
                "folder."
            ) from None
        except OSError as error:
            log.warning(
                "output_dir: %s cannot be locked (%s); let no second process write there", self.output_dir, error
            )
            return file
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        return file


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (path / "adapter_config.json").is_file()


def is_model(path: Path) -> bool:
    """Whether a folder is a model's."""
    return (path / "config.json").is_file()


def training_config(folder: Path) -> dict[str, Any]:
    """The configuration with which an adapter or a merged model was trained, as it stands in its folder; empty where
    it does not."""
    return read_object(folder / TRAINING_CONFIG)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
