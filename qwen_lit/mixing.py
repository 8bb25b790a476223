"""An output folder is of one run: another is refused, and what an attempt has left is set aside."""

import logging
import shutil
from pathlib import Path

from qwen_lit.callbacks.checkpoint_io import STEP_FILE, manifest_of, step_files, step_of
from qwen_lit.errors import UserError
from qwen_lit.export.folder import ExportError, check_replaceable
from qwen_lit.run import Run, is_adapter, is_model

log = logging.getLogger(__name__)


def refuse_mixing(run: Run, source: Path | None) -> None:
    """Refuse to train into a folder that holds the results of another run.

    Args:
        run: that is about to begin.
        source: the checkpoint with which it goes on, if it does.

    Raises:
        UserError: the folder holds a run's results, and the checkpoint is none of them.
    """
    folder, output_dir = run.checkpoints, run.output_dir
    if source is not None and source.resolve().is_relative_to(output_dir.resolve()):
        return
    elsewhere = "or give another --output_dir."
    if steps := step_files(folder):
        raise UserError(
            f"output_dir: {output_dir} holds a run of {step_of(steps[0])} steps: add --ckpt_path last to go on with "
            f"it, {elsewhere}"
        )
    if run.best.is_file():
        raise UserError(
            f"output_dir: {output_dir} holds a run whose best.ckpt is left: add --ckpt_path best to go on with it, "
            f"{elsewhere}"
        )
    if any(folder.glob("*.corrupt")):
        raise UserError(f"output_dir: {output_dir} holds damaged checkpoints of a run; move them away, {elsewhere}")
    for result, there in ((run.adapter, is_adapter), (run.merged, is_model)):
        if there(result):
            raise UserError(
                f"output_dir: {output_dir} holds {result.name}/ of a run, and no checkpoint to go on from; to start "
                f"from its adapter, give model.init_adapter, and another --output_dir; or move {result.name}/ away."
            )


def refuse_foreign(run: Run) -> None:
    """Refuse a folder that the merged model could not replace, before anything is trained.

    Raises:
        UserError: ``final_model`` is there and not an earlier export.
    """
    try:
        check_replaceable(run.merged)
    except ExportError as error:
        raise UserError(f"output_dir: {error}; or set export.merge: false.") from error


def set_aside(run: Run) -> None:
    """Move what an attempt without results has left into a folder of its own, so that no two runs mix."""
    folders = (run.checkpoints, run.logs)
    # A file in the place of a folder is none of ours.
    left = [one for one in run.written_before_results() if one.exists() and (one not in folders or one.is_dir())]
    empty = [one for one in left if one.is_dir() and not any(one.iterdir())]
    if not set(left) - set(empty):
        return
    earlier = run.earlier_folder()
    for path in left:
        path.rename(earlier / path.name)
    for path in (run.config_file, *run.earlier_configs()):
        if path.is_file():
            shutil.copy2(path, earlier)
    log.info("what an earlier attempt left in %s is set aside in %s", run.output_dir, earlier.name)


def set_newer_aside(run: Run, step: int) -> None:
    """Move checkpoints of later steps away from a run that goes on at ``step``: it will make its own."""
    steps = [(STEP_FILE.match(path.name), path) for path in step_files(run.checkpoints)]
    newer = [path for match, path in steps if match and int(match[1]) > step]
    if run.best.is_file() and (step_of(run.best) or 0) > step:
        newer.append(run.best)
    if not newer:
        return
    earlier = run.earlier_folder() / run.checkpoints.name
    earlier.mkdir()
    for path in newer:
        for one in (path, manifest_of(path)):
            if one.is_file():
                one.rename(earlier / one.name)
    log.warning(
        "the run goes on at step %d; %d checkpoints of later steps are set aside in %s", step, len(newer), earlier
    )
