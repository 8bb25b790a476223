"""Which checkpoint or adapter of a run is meant."""

import logging
from pathlib import Path
from typing import Any

from qwen_lit.callbacks.checkpoint_io import best_of, is_whole, last_checkpoint, step_of
from qwen_lit.errors import UserError
from qwen_lit.model.products import ProductsInUse
from qwen_lit.model.resume import stored
from qwen_lit.names import TRAINED_AT, expanded
from qwen_lit.run import Run, is_adapter, read_object

log = logging.getLogger(__name__)


def find_checkpoint(given: str | None, run: Run, fresh: bool = False, key: str = "ckpt_path") -> Path | None:
    """What ``--ckpt_path`` means: the newest whole checkpoint for ``last``, the one of the lowest validation loss for
    ``best``, else the file or the adapter folder that is named.

    Args:
        given: the option.
        run: where ``last`` and ``best`` are looked for.
        fresh: whether ``last`` may find nothing.
        key: that asks for it.

    Raises:
        UserError: there is no such file, or none that is whole.
    """
    folder = run.checkpoints
    if given == "last":
        found = last_checkpoint(folder)
        if found is None and not fresh:
            raise UserError(f"ckpt_path: there is no checkpoint in {run.output_dir}; run fit first or give a file.")
        log.info("going on from %s", found) if found else log.info("no checkpoint in %s: starting fresh", folder)
        return found
    if given == "best":
        if not run.best.is_file():
            raise UserError(
                f"{key}: there is no best.ckpt in {folder}; a fit with validation rows (data.val_size) keeps one. "
                "Give last, or a file."
            )
        if not is_whole(run.best):
            raise UserError(f"{key}: {run.best} is damaged; give last, or a file.")
        log.info("best checkpoint: %s, step %s", run.best, step_of(run.best))
        return run.best
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


def exported_from(run: Run, checkpoint: str) -> Path:
    """What ``export`` takes where no ``--ckpt_path`` is given.

    Args:
        run: of which it is.
        checkpoint: ``export.checkpoint``: ``last`` takes ``lora_adapter/`` as it is; ``best`` takes the best
            checkpoint, or ``lora_adapter/`` where that was made of it.

    Raises:
        UserError: there is no adapter, or no best checkpoint.
    """
    if checkpoint == "best":
        made, best = trained_at(run.adapter), step_of(run.best)
        if made.get("checkpoint") != "best" or best not in (None, made["step"]):
            found = find_checkpoint("best", run, key="export.checkpoint")
            assert found is not None
            return found
    if not is_adapter(run.adapter):
        raise UserError(f"no adapter in {run.adapter}; run fit first, or give --ckpt_path.")
    return run.adapter


def trained_at(source: Path) -> dict[str, Any]:
    """The checkpoint that an adapter is from, as ``checkpoint`` (``last``, ``best`` or a file's name), ``step`` and,
    where it is known, ``val_loss``, and for products in 8 bits ``products`` in words; empty where nothing says.

    Args:
        source: an adapter folder, or a whole checkpoint of ours.
    """
    if not source.is_file():
        return read_object(source / TRAINED_AT)
    name = "best" if source.name == Run(source.parent).best.name else source.name
    made = {"checkpoint": name, "step": step_of(source)} | best_of(source)
    then = stored(source).get("products")
    told = ProductsInUse.of(then["asked"], then).told if then else None
    return made | {"products": told} if told else made
