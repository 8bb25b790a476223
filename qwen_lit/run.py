"""The output folder of a run: its names, its lock, what it holds, and which checkpoint is meant."""

import fcntl
import json
import logging
import os
import shutil
from datetime import datetime
from pathlib import Path
from typing import Any

from qwen_lit.callbacks.checkpoint_io import (
    STEP_FILE,
    best_of,
    is_whole,
    last_checkpoint,
    manifest_of,
    step_files,
    step_of,
)
from qwen_lit.errors import UserError
from qwen_lit.export.folder import ExportError, check_replaceable
from qwen_lit.names import TRAINED_AT, expanded

log = logging.getLogger(__name__)
CHECKPOINTS, ADAPTER, MERGED, CONFIG = "checkpoints", "lora_adapter", "final_model", "config.yaml"
BEST = "best.ckpt"
WRITTEN = (CHECKPOINTS, "logs", "samples.jsonl", "summary.json", "report.html", ADAPTER + ".tmp", MERGED + ".tmp")
"""What a run writes before it has results; ``config.yaml`` is copied, as other processes may yet read it."""
NAMED = ("last", "best")


def find_checkpoint(given: str | None, output_dir: Path, fresh: bool = False, key: str = "ckpt_path") -> Path | None:
    """What ``--ckpt_path`` means: the newest whole checkpoint for ``last``, the one of the lowest validation loss for
    ``best``, else the file or the adapter folder that is named.

    Args:
        given: the option.
        output_dir: where ``last`` and ``best`` are looked for.
        fresh: whether ``last`` may find nothing.
        key: that asks for it.

    Raises:
        UserError: there is no such file, or none that is whole.
    """
    folder = output_dir / CHECKPOINTS
    if given == "last":
        found = last_checkpoint(folder)
        if found is None and not fresh:
            raise UserError(f"ckpt_path: there is no checkpoint in {output_dir}; run fit first or give a file.")
        log.info("going on from %s", found) if found else log.info("no checkpoint in %s: starting fresh", folder)
        return found
    if given == "best":
        best = folder / BEST
        if not best.is_file():
            raise UserError(
                f"{key}: there is no best.ckpt in {folder}; a fit with validation rows (data.val_size) keeps one. "
                "Give last, or a file."
            )
        if not is_whole(best):
            raise UserError(f"{key}: {best} is damaged; give last, or a file.")
        log.info("best checkpoint: %s, step %s", best, step_of(best))
        return best
    if not given:
        return None
    path = Path(expanded(given))
    if path.is_dir() and not is_adapter(path):
        raise UserError(
            f"ckpt_path: {given} is a folder without an adapter; give a checkpoint file, an adapter folder, or "
            "--output_dir and last or best."
        )
    if not path.exists():
        raise UserError(f"ckpt_path: no such file: {given}; give a file, last or best.")
    return path


def exported_from(output_dir: Path, checkpoint: str) -> Path:
    """What ``export`` takes where no ``--ckpt_path`` is given.

    Args:
        output_dir: of the run.
        checkpoint: ``export.checkpoint``: ``last`` takes ``lora_adapter/`` as it is; ``best`` takes the best
            checkpoint, or ``lora_adapter/`` where that was made of it.

    Raises:
        UserError: there is no adapter, or no best checkpoint.
    """
    adapter = output_dir / ADAPTER
    if checkpoint == "best":
        made, best = trained_at(adapter), step_of(output_dir / CHECKPOINTS / BEST)
        if made.get("checkpoint") != "best" or best not in (None, made["step"]):
            found = find_checkpoint("best", output_dir, key="export.checkpoint")
            assert found is not None
            return found
    if not is_adapter(adapter):
        raise UserError(f"no adapter in {adapter}; run fit first, or give --ckpt_path.")
    return adapter


def trained_at(source: Path) -> dict[str, Any]:
    """Of which checkpoint an adapter is, as ``checkpoint`` (``last``, ``best`` or a file's name), ``step`` and, where
    it is known, ``val_loss``; empty where nothing says.

    Args:
        source: an adapter folder, or a whole checkpoint of ours.
    """
    if not source.is_file():
        return read_object(source / TRAINED_AT)
    name = "best" if source.name == BEST else source.name
    return {"checkpoint": name, "step": step_of(source)} | best_of(source)


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's."""
    return (path / "adapter_config.json").is_file()


def refuse_mixing(output_dir: Path, source: Path | None) -> None:
    """Refuse to train into a folder that holds the results of another run.

    Args:
        output_dir: of the run that is about to begin.
        source: the checkpoint with which it goes on, if it does.

    Raises:
        UserError: the folder holds a run's results, and the checkpoint is none of them.
    """
    folder = output_dir / CHECKPOINTS
    if source is not None and source.resolve().is_relative_to(output_dir.resolve()):
        return
    elsewhere = "or give another --output_dir."
    if steps := step_files(folder):
        raise UserError(
            f"output_dir: {output_dir} holds a run of {step_of(steps[0])} steps: add --ckpt_path last to go on with "
            f"it, {elsewhere}"
        )
    if (folder / BEST).is_file():
        raise UserError(
            f"output_dir: {output_dir} holds a run whose best.ckpt is left: add --ckpt_path best to go on with it, "
            f"{elsewhere}"
        )
    if any(folder.glob("*.corrupt")):
        raise UserError(f"output_dir: {output_dir} holds damaged checkpoints of a run; move them away, {elsewhere}")
    for name, file in ((ADAPTER, "adapter_config.json"), (MERGED, "config.json")):
        if (output_dir / name / file).is_file():
            raise UserError(
                f"output_dir: {output_dir} holds {name}/ of a run, and no checkpoint to go on from; to start from its "
                f"adapter, give model.init_adapter, and another --output_dir; or move {name}/ away."
            )


def refuse_foreign(output_dir: Path) -> None:
    """Refuse a folder that the merged model could not replace, before anything is trained.

    Raises:
        UserError: ``final_model`` is there and not an earlier export.
    """
    try:
        check_replaceable(output_dir / MERGED)
    except ExportError as error:
        raise UserError(f"output_dir: {error}; or set export.merge: false.") from error


def set_aside(output_dir: Path) -> None:
    """Move what an attempt without results has left into a folder of its own, so that no two runs mix."""
    # A file in the place of a folder is none of ours.
    left = [name for name in WRITTEN if (output_dir / name).exists() and ("." in name or (output_dir / name).is_dir())]
    empty = [name for name in left if (output_dir / name).is_dir() and not any((output_dir / name).iterdir())]
    if not set(left) - set(empty):
        return
    earlier = earlier_folder(output_dir)
    for name in left:
        (output_dir / name).rename(earlier / name)
    for path in (output_dir / CONFIG, *output_dir.glob("config-*.yaml")):
        if path.is_file():
            shutil.copy2(path, earlier)
    log.info("what an earlier attempt left in %s is set aside in %s", output_dir, earlier.name)


def set_newer_aside(output_dir: Path, step: int) -> None:
    """Move checkpoints of later steps away from a run that goes on at ``step``: it will make its own."""
    folder = output_dir / CHECKPOINTS
    newer = [path for path in step_files(folder) if int(STEP_FILE.match(path.name)[1]) > step]  # type: ignore[index]
    best = folder / BEST
    if best.is_file() and (step_of(best) or 0) > step:
        newer.append(best)
    if not newer:
        return
    earlier = earlier_folder(output_dir) / CHECKPOINTS
    earlier.mkdir()
    for path in newer:
        for one in (path, manifest_of(path)):
            if one.is_file():
                one.rename(earlier / one.name)
    log.warning(
        "the run goes on at step %d; %d checkpoints of later steps are set aside in %s", step, len(newer), earlier
    )


def earlier_folder(output_dir: Path) -> Path:
    """A new folder, named by the time, for what is set aside."""
    name = f"earlier-{datetime.now():%Y%m%d-%H%M%S}"
    for number in range(1000):
        path = output_dir / (name + f"-{number}" * bool(number))
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise UserError(f"output_dir: no folder {name} can be made in {output_dir}; give another.")


def training_config(adapter: Path) -> dict[str, Any]:
    """The configuration with which an adapter was trained, as it stands beside it; empty where it does not."""
    return read_object(adapter / "training_config.json")


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def lock_output_dir(output_dir: Path) -> Any:
    """Lock the output folder for this process; the file returned holds the lock while it is open.

    Raises:
        UserError: another process writes there, or nobody can.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / ".lock").open("a+")
        file.seek(0)
        owner = file.read().strip()
    except OSError as error:
        reason = error.strerror
        raise UserError(f"output_dir: cannot write to {output_dir} ({reason}); give another folder.") from error
    try:
        # Of the process, not of the open file: the workers it forks do not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"output_dir: process {owner} already trains into {output_dir}; wait for it, or give another folder."
        ) from None
    except OSError as error:
        log.warning("output_dir: %s cannot be locked (%s); let no second process write there", output_dir, error)
        return file
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file
