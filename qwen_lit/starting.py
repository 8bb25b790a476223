"""Before any class is built: what can be known to be wrong, and what the command works on."""

import dataclasses
import os
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only

from qwen_lit.callbacks.accepted import check_trainer
from qwen_lit.checkpoints import exported_from, find_checkpoint
from qwen_lit.checks import check_paths, check_values
from qwen_lit.errors import UserError
from qwen_lit.gpu import check_gpu
from qwen_lit.mixing import refuse_foreign, refuse_mixing, set_aside
from qwen_lit.model.duration import check_duration
from qwen_lit.model.trained import Trained, begin_from, find_adapter, read, take_over
from qwen_lit.parsing import expand_paths
from qwen_lit.planner.plan import parse_bytes
from qwen_lit.run import Run

FROM_CHECKPOINT = ("fit", "validate", "export", "predict")
"""Commands that take a checkpoint; the others find its key in the configuration of a run."""
USING = ("validate", "export", "predict")
"""Commands that take an adapter as it was trained."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What a command works on, as far as its configuration and its folder tell."""

    run: Run
    """Without its configuration, which is settled by the adapter that is used."""
    trained: Trained | None = None
    """What the adapter that is exported, asked or measured was trained with."""
    lock: IO[str] | None = None
    """Keeps other processes out of the folder while it is open."""


def start(command: str, config: Any) -> Start:
    """Check a command's configuration, and find what it goes on from.

    Args:
        command: whose configuration it is.
        config: changed in place where a key is left open, or an adapter says what it was trained with.

    Raises:
        UserError: something cannot work, or the folder is in use.
    """
    expand_paths(config)
    check_values(config)
    check_paths(command, config)
    if config.get("memory_budget"):
        parse_bytes(config.memory_budget)
        config.model.memory_budget = config.memory_budget
    run = Run(Path(config.output_dir))
    check_duration(config, command)
    check_trainer(config, command, run)
    first = getattr(rank_zero_only, "rank", 0) == 0 and os.environ.get("NODE_RANK", "0") == "0"
    check_gpu(config.trainer.accelerator, warn=first and command != "inspect")
    writes = command in ("fit", "export") and not config.trainer.fast_dev_run
    lock = run.lock() if writes and first else None
    given = config.get("ckpt_path") if command in FROM_CHECKPOINT else None
    source = find_checkpoint(given, run, fresh=command == "fit")
    if command == "fit":
        _begin(config, run, source, first)
    if command not in USING:
        return Start(dataclasses.replace(run, checkpoint=source), lock=lock)
    checkpoint, trained = _use_trained(command, config, run, source)
    return Start(dataclasses.replace(run, checkpoint=checkpoint), trained, lock)


def _begin(config: Any, run: Run, source: Path | None, first: bool) -> None:
    """Whether the run may begin, or go on, in its folder and with its adapter."""
    if source is not None and source.is_dir():
        raise UserError(
            f"ckpt_path: {source} is an adapter, which holds no optimizer and no position to go on from; "
            f"to start a new run from it, set model.init_adapter: {source}."
        )
    if config.model.init_adapter:
        begin_from(config.model, read(source or find_adapter(config.model.init_adapter)))
    if config.trainer.fast_dev_run:
        return
    refuse_mixing(run, source)
    if config.export.merge:
        refuse_foreign(run)
    if first and source is None:
        set_aside(run)


def _use_trained(command: str, config: Any, run: Run, source: Path | None) -> tuple[Path | None, Trained | None]:
    """Use an adapter with what it was trained with, whatever the configuration says.

    Returns:
        Its checkpoint, or the folder that ``--ckpt_path`` names; and what it was trained with.
    """
    checkpoint = source
    if source is None and command != "validate":
        source = exported_from(run, config.export.checkpoint if command == "export" else "last")
        checkpoint = source if source.is_file() else None
    if source is None and config.model.init_adapter:
        source = find_adapter(config.model.init_adapter)
    config.model.init_adapter = None
    if source is None:
        return None, None
    if command == "export" and source.is_file():
        refuse_mixing(run, source)
    trained = read(source)
    take_over(config.model, trained)
    if command == "validate" and (checkpoint is None or checkpoint.is_dir()):
        # Lightning reads no adapter, and no checkpoint that --ckpt_path does not name.
        config.model.init_adapter, checkpoint = str(source), None
    return checkpoint, trained
