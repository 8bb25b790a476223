"""What a checkpoint remembers of its configuration, and what may differ when it is resumed."""

import logging
import math
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from qwen_lit.errors import refuse_changes

log = logging.getLogger(__name__)
LORA = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights")
FREE = {
    "model.learning_rate": "learning_rate",
    "model.lr_scheduler": "schedule_name",
    "model.warmup_ratio": "warmup_ratio",
    "model.weight_decay": "weight_decay",
    "model.model_name_or_path": "name",
}


def settings(module: Any) -> dict[str, Any]:
    """The configuration of a ``QwenModule`` as plain values.

    ``frozen`` is what the adapter and the optimizer are made by, ``free`` what may change on resume, ``merge`` the
    micro-batches that are computed as one.
    """
    lora = module.lora_config.to_dict()
    targets = lora["target_modules"]
    frozen = {f"model.lora_config.{key}": lora[key] for key in LORA}
    frozen["model.lora_config.target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    frozen["model.lora_config.modules_to_save"] = sorted(lora["modules_to_save"] or [])
    frozen["model.optimizer"] = module.optimizer_name
    free = {key: getattr(module, name) for key, name in FREE.items()}
    free["trainer.max_epochs"] = module.trainer.max_epochs
    free["model.lora_config.lora_dropout"] = lora["lora_dropout"]
    return {"frozen": frozen, "free": free, "merge": module.trainer.datamodule.merge}


def merge_of(checkpoint: Path | None) -> int | None:
    """Micro-batches that were computed as one when it was written; None where it does not say.

    What is wrong with a file is told where it is restored.
    """
    if checkpoint is None:
        return None
    with suppress(OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        return int(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["settings"]["merge"])
    return None


def compare(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse another adapter or optimizer; log what else has changed.

    Raises:
        UserError: a frozen setting differs.
    """
    refuse_changes({k: (v, now["frozen"][k]) for k, v in then["frozen"].items() if v != now["frozen"][k]})
    for key, value in then["free"].items():
        if value != now["free"][key]:
            log.warning("%s was %s until here, and is %s from here on", key, value, now["free"][key])


def recount(progress: dict[str, Any], then: int, now: int, micro_batches: int) -> None:
    """Count Lightning's batches anew where another number of micro-batches is computed as one.

    Args:
        progress: of the training batches, as in a checkpoint; changed in place.
        then: micro-batches in a batch when it was saved.
        now: the same, from here on.
        micro_batches: of an epoch.
    """
    current, total = progress["current"], progress["total"]
    epochs = (total["ready"] - current["ready"]) // math.ceil(micro_batches / then)
    ready = math.ceil(min(current["ready"] * then, micro_batches) / now)
    for counts, new in ((current, ready), (total, epochs * math.ceil(micro_batches / now) + ready)):
        old = counts["ready"]
        for name, count in counts.items():
            counts[name] = new + count - old
