"""What a checkpoint remembers of its configuration, and what may differ when it is resumed."""

import logging
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import lightning as L
import torch
from peft import LoraConfig

from qwen_lit.errors import UserError, refuse_changes
from qwen_lit.keys import REMOVED
from qwen_lit.model.base import fingerprint
from qwen_lit.model.settings import ModelSettings
from qwen_lit.run import Run

log = logging.getLogger(__name__)
REFUSE, WARN, FREE = "refuse", "warn", "free"
KEYS = {
    "seed_everything": REFUSE,
    # What the adapter is made by, and what its weights were trained against.
    "model.lora_config": REFUSE,
    "model.lora_config.lora_dropout": WARN,
    **dict.fromkeys(
        [
            f"model.lora_config.{key}"
            for key in (
                "task_type",
                "peft_type",
                "auto_mapping",
                "peft_version",
                "base_model_name_or_path",
                "revision",
                "inference_mode",
                "runtime_config",
                "megatron_core",
                "loftq_config",
                "eva_config",
                "corda_config",
                "lora_ga_config",
            )
        ],
        FREE,
    ),
    "model.quantization_config": REFUSE,
    "model.quantization_config.bnb_4bit_quant_storage": WARN,
    "trainer.precision": REFUSE,
    "model.products": REFUSE,
    # The optimizer's state, which a checkpoint holds with its betas and its groups.
    "model.optimizer": REFUSE,
    "model.adam_beta1": REFUSE,
    "model.adam_beta2": REFUSE,
    "model.lora_plus_ratio": REFUSE,
    # What backward takes for gate and up.
    "model.kept": REFUSE,
    # The base is compared by what is in its files.
    "model.model_name_or_path": WARN,
    "model.hub": FREE,
    "model.max_skipped_steps": FREE,
    "model.memory_budget": FREE,
    "model.base_cache": FREE,
    "model": WARN,
    # The rows of a step; the data's own digest is compared as well.
    "data.batch_size": REFUSE,
    "data.max_length": REFUSE,
    "data.packing": REFUSE,
    **dict.fromkeys([f"data.{key}" for key in ("dataset_path", "val_dataset_path")], WARN),
    **dict.fromkeys([f"data.{key}" for key in ("cache_dir", "num_proc", "num_workers", "seed")], FREE),
    "data": WARN,
    "trainer.accumulate_grad_batches": REFUSE,
    "trainer.limit_train_batches": REFUSE,
    "trainer.overfit_batches": REFUSE,
    **dict.fromkeys(
        [
            f"trainer.{key}"
            for key in (
                "max_epochs",
                "max_steps",
                "min_epochs",
                "min_steps",
                "gradient_clip_val",
                "gradient_clip_algorithm",
                "limit_val_batches",
                "val_check_interval",
                "check_val_every_n_epoch",
                "strategy",
                "accelerator",
                "reload_dataloaders_every_n_epochs",
                "use_distributed_sampler",
                "sync_batchnorm",
            )
        ],
        WARN,
    ),
    "trainer": FREE,
    "checkpoint": FREE,
    "export": FREE,
    "samples": FREE,
    "output_dir": FREE,
    "ckpt_path": FREE,
}
"""What a change on resume means, by key or by the section that holds it; the longest name counts.

``refuse``: it would be another run. ``warn``: it is taken, with a warning. ``free``: it changes nothing that is
trained. Devices and nodes are compared by the data, as the number of processes.
"""
UNSAID = {"model.products": "bf16"}
"""What a run had whose configuration does not know the key."""
LORA = ("r", "lora_alpha", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "init_lora_weights")


class Configured(Protocol):
    """What is asked of a ``QwenModule`` here."""

    name: str
    settings: ModelSettings
    optimizer_name: str
    run: Run

    @property
    def lora_config(self) -> LoraConfig:
        """The adapter's settings."""

    @property
    def micro_batches_at_once(self) -> int:
        """Micro-batches of an optimizer step that are computed in one forward and backward pass."""

    @property
    def graph_tokens(self) -> int:
        """Tokens up to which a forward and backward pass is a CUDA graph; 0 for none."""


def settings(module: Configured) -> dict[str, Any]:
    """The configuration of a module as plain values.

    ``frozen`` is what the adapter and the optimizer are made by, ``micro_batches_at_once`` how many of a step are
    computed together, ``graph_tokens`` up to how many tokens they are CUDA graphs,
    ``config`` the whole configuration, ``base`` the fingerprint of the base's files.
    """
    lora = module.lora_config.to_dict()
    targets = lora["target_modules"]
    frozen = {f"model.lora_config.{key}": lora[key] for key in LORA}
    frozen["model.lora_config.target_modules"] = targets if isinstance(targets, str) else sorted(targets)
    frozen["model.lora_config.modules_to_save"] = sorted(lora["modules_to_save"] or [])
    frozen["model.optimizer"] = module.optimizer_name
    return {
        "frozen": frozen,
        "micro_batches_at_once": module.micro_batches_at_once,
        "graph_tokens": module.graph_tokens,
        "config": module.run.config,
        "base": fingerprint(module.name, module.settings.hub),
    }


def stored(checkpoint: Path | None) -> dict[str, Any]:
    """The settings that a checkpoint remembers; empty where it does not say.

    A damaged file is reported where it is restored.
    """
    if checkpoint is None or not checkpoint.is_file():
        return {}
    with suppress(OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        return dict(torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)["settings"])
    return {}


def meaning(key: str) -> str:
    """What a change of a key means on resume."""
    while key not in KEYS:
        key, dot, _ = key.rpartition(".")
        if not dot:
            return WARN
    return KEYS[key]


def flat(config: dict[str, Any], before: str = "") -> dict[str, Any]:
    """The keys of nested dicts joined by dots; names in lists are in order, as their order means nothing."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{before}{key}"
        if isinstance(value, dict) and value and not name.endswith("_pattern") and name != "data.fields":
            found |= flat(value, name + ".")
        else:
            names = isinstance(value, list) and all(isinstance(one, str) for one in value)
            found[name] = sorted(value) if names and value else _plain(value)
    return found


def _plain(value: Any) -> Any:
    """A number as it is; what is empty or off as None."""
    return value if value or (value == 0 and value is not False) else None


def canonical(config: dict[str, Any]) -> dict[str, Any]:
    """``flat``, with a quantisation that quantises nothing, and a limit that limits nothing, as none."""
    model = config.get("model", {})
    quantization = model.get("quantization_config") or {}
    if not (quantization.get("load_in_4bit") or quantization.get("load_in_8bit")):
        config = config | {"model": {key: value for key, value in model.items() if key != "quantization_config"}}
    found = flat(config)
    # All of it, which Lightning also takes for null.
    return {
        key: None if key.startswith("trainer.limit_") and value == 1.0 and isinstance(value, float) else value
        for key, value in found.items()
    }


def shared(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that must be equal on every rank of a run."""
    return {key: value for key, value in canonical(config).items() if meaning(key) == REFUSE}


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Keys of two configurations that are not equal, with both values; a key that one of them never knew is not."""
    sections = {key.split(".")[0] for key in then}
    old = {key for key in now if key.split(".")[0] not in sections}
    missing = "model.quantization_config."
    keys = [
        key
        for key in [*then, *(key for key in now if key not in then)]
        if key not in old and (key in then and key in now or key.startswith(missing))
    ]
    return {key: (then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)}


def compare(then: dict[str, Any], config: dict[str, Any], base: str | None) -> None:
    """Refuse to resume a run as another one; log what else has changed.

    Args:
        then: the settings in the checkpoint.
        config: of this run.
        base: fingerprint of its base model.

    Raises:
        UserError: a key whose change makes another run has changed, or the base has, or the checkpoint is of a version
            that counts otherwise.
    """
    _refuse_earlier(then)
    known = canonical(then.get("config", {}))
    old = {**UNSAID, **known} if known else known
    changes = differences(old, canonical(config))
    refused = {key: change for key, change in changes.items() if meaning(key) == REFUSE}
    name = "model.model_name_or_path"
    if name in changes and then.get("base") and base and then["base"] != base:
        refused[name] = (f"{changes[name][0]} ({then['base'][:8]})", f"{changes[name][1]} ({base[:8]})")
    elif then.get("base") and base and then["base"] != base:
        refused["the files of " + name] = (then["base"][:8], base[:8])
    refuse_changes(refused)
    for key, (before, after) in changes.items():
        if meaning(key) == WARN:
            log.warning("%s was %s until here, and is %s from here on", key, before, after)
    for key, value in old.items():
        if key in REMOVED and value:
            log.warning("%s was %s until here, and there is no such key any more: %s", key, value, REMOVED[key])


def check_end(checkpoint: dict[str, Any], trainer: L.Trainer) -> None:
    """Refuse limits that lie before the checkpoint: nothing would be trained, and what is there be exported.

    Raises:
        UserError: fewer epochs or steps than have been trained, or begun.
    """
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
    begun = epochs["ready"] if epochs["ready"] > epochs["processed"] else epochs["processed"]
    for name, limit, there in (
        ("max_epochs", trainer.max_epochs, begun),
        ("max_steps", trainer.max_steps, checkpoint["global_step"]),
    ):
        if limit is not None and 0 <= limit < there:
            raise UserError(
                f"trainer.{name} is {limit}, but the checkpoint is at {there}; raise it, or use export "
                "with --ckpt_path."
            )


def compare_module(then: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to resume with another adapter or optimizer, where a checkpoint holds no other configuration.

    Raises:
        UserError: one of these has changed.
    """
    refuse_changes({k: (v, now["frozen"][k]) for k, v in then["frozen"].items() if v != now["frozen"].get(k)})


def _refuse_earlier(then: dict[str, Any]) -> None:
    """Refuse settings of a version in which a batch was a micro-batch: its loops and its position count other things.

    Raises:
        UserError: they are.
    """
    if "merge" in then:
        raise UserError(
            "ckpt_path: an earlier version of qwen_lit wrote this checkpoint and counted micro-batches in it where "
            "optimizer steps are counted here; end the run with that version, or set model.init_adapter to the "
            "checkpoint, which begins a new run from its weights."
        )


def go_on(module: Configured, trainer: L.Trainer, checkpoint: dict[str, Any]) -> tuple[int, int | None]:
    """Compare the run of a checkpoint with this one.

    Args:
        module: with the settings of now.
        trainer: Lightning's, in ``fit``.
        checkpoint: as Lightning has read it.

    Returns:
        Steps that were skipped so far, and optimizer steps of the run as the checkpoint knows them; None where it had
        no known end, 0 where it does not say.

    Raises:
        UserError: the adapter or the optimizer is another, or the checkpoint is of weights alone, or of a version that
            counts otherwise.
    """
    if "optimizer_states" not in checkpoint:
        raise UserError(
            "ckpt_path: this checkpoint was saved with save_weights_only, and no run can go on from it; export "
            "and predict can use it."
        )
    then, now = checkpoint["settings"], settings(module)
    _refuse_earlier(then)
    compare_module(then, now)
    check_end(checkpoint, trainer)
    return then["skipped_steps"], then.get("total_steps", 0)
