"""Wrong keys of a command line and of its YAML files, all at once, each with the key that was meant.

Needs no parser, so that a misspelt key is reported before torch is loaded.
"""

import difflib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import yaml

from qwen_lit.convert import hint

SWITCHES = ("help", "print_config")
"""Options that are no keys."""
ALIASES = {
    "accumulation_steps": "trainer.accumulate_grad_batches",
    "adapter_name_or_path": "model.init_adapter",
    "alpha": "model.lora_config.lora_alpha",
    "base_model": "model.model_name_or_path",
    "bf16": "trainer.precision",
    "cutoff_len": "data.max_length",
    "dataset": "data.dataset_path",
    "dataset_dir": "data.dataset_path",
    "datasets": "data.dataset_path",
    "do_eval": "data.val_size",
    "dropout": "model.lora_config.lora_dropout",
    "epochs": "trainer.max_epochs",
    "eval_steps": "trainer.val_check_interval",
    "eval_strategy": "trainer.val_check_interval",
    "evaluation_strategy": "trainer.val_check_interval",
    "fp16": "trainer.precision",
    "grad_clip": "trainer.gradient_clip_val",
    "gradient_accumulation": "trainer.accumulate_grad_batches",
    "gradient_accumulation_steps": "trainer.accumulate_grad_batches",
    "gradient_clip": "trainer.gradient_clip_val",
    "load_best_model_at_end": "export.checkpoint",
    "logging_dir": "output_dir",
    "logging_steps": "trainer.log_every_n_steps",
    "lora": "model.lora_config",
    "lora_modules_to_save": "model.lora_config.modules_to_save",
    "lora_r": "model.lora_config.r",
    "lora_rank": "model.lora_config.r",
    "lora_target": "model.lora_config.target_modules",
    "lora_target_linear": "model.lora_config.target_modules",
    "lora_target_modules": "model.lora_config.target_modules",
    "loraplus_lr_ratio": "model.lora_plus_ratio",
    "lr": "model.learning_rate",
    "lr_scheduler_type": "model.lr_scheduler",
    "max_grad_norm": "trainer.gradient_clip_val",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "micro_batch_size": "data.batch_size",
    "model_id": "model.model_name_or_path",
    "model_name": "model.model_name_or_path",
    "neftune_alpha": "model.neftune_noise_alpha",
    "num_epochs": "trainer.max_epochs",
    "num_train_epochs": "trainer.max_epochs",
    "optim": "model.optimizer",
    "overwrite_output_dir": "output_dir",
    "per_device_eval_batch_size": "data.batch_size",
    "per_device_train_batch_size": "data.batch_size",
    "pissa_init": "model.lora_config.init_lora_weights",
    "preprocessing_num_workers": "data.num_proc",
    "pretrained_model_name_or_path": "model.model_name_or_path",
    "quantization_bit": "model.quantization_config",
    "rank": "model.lora_config.r",
    "report_to": "trainer.logger",
    "resume_from_checkpoint": "ckpt_path",
    "sample_packing": "data.packing",
    "save_steps": "checkpoint.every_n_train_steps",
    "save_total_limit": "checkpoint.keep",
    "seed": "seed_everything",
    "sequence_len": "data.max_length",
    "train_file": "data.dataset_path",
    "validation_file": "data.val_dataset_path",
    "val_file": "data.val_dataset_path",
    "val_set_size": "data.val_size",
    "warmup_steps": "model.warmup_ratio",
}
"""What other trainers call a key, by its last part."""
REMOVED = {
    "model.shard_base": "with model.engine: auto, 4-bit layers that a card has no room for wait in host memory, in "
    "one copy for all cards of a machine",
}
"""What does the work of a key that once was."""


def wrong_keys(args: list[str], known: Collection[str], all_keys: Collection[str]) -> list[str]:
    """One line for each key that a command does not know; what is wrong otherwise is left to its parser.

    Args:
        args: the command's arguments.
        known: its keys and options; what lies below one of them, such as ``init_args``, is its class's to judge.
        all_keys: what can have been meant.
    """
    if hints := list(filter(None, map(hint, configurations(args)))):
        return hints
    lines = []
    for place, key in _given(args, known):
        text = f"there is no key {key}{meant(key, all_keys)}"
        lines.append(f"{place}: {text}" if place else text)
    return list(dict.fromkeys(lines))


def configurations(args: list[str]) -> list[str]:
    """The files that are given as ``--config``."""
    split = [args[number + 1] for number, arg in enumerate(args[:-1]) if arg == "--config"]
    return [*split, *(arg.partition("=")[2] for arg in args if arg.startswith("--config="))]


def meant(key: str, all_keys: Collection[str]) -> str:
    """What ends a message about a key: what is done in its place, or which key was meant, or where all are listed."""
    if key in REMOVED:
        return f" any more, leave it out: {REMOVED[key]}"
    found = nearest(key, all_keys)
    return f"; did you mean {found}?" if found else "; --help lists all"


def nearest(key: str, all_keys: Collection[str]) -> str | None:
    """The key that was most likely meant: by another trainer's name, in another section, or by its letters."""
    section, _, last = key.rpartition(".")
    lasts: dict[str, list[str]] = {}
    for one in all_keys:
        lasts.setdefault(one.rpartition(".")[2], []).append(one)
    if last in ALIASES:
        return ALIASES[last]
    if last in lasts:
        return min(lasts[last], key=len)
    near = [one for one in all_keys if one.rpartition(".")[0] == section]
    letters = difflib.get_close_matches(key, near, 1, 0.8) or difflib.get_close_matches(key, all_keys, 1, 0.8)
    if not letters and (found := next(iter(difflib.get_close_matches(last, lasts, 1, 0.75)), None)):
        letters = [min(lasts[found], key=len)]
    return letters[0] if letters else None


def _given(args: list[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Each wrong key with the file it stands in; the command line has no name."""
    for number, arg in enumerate(args):
        name, equals, value = arg.removeprefix("--").partition("=")
        name = name.removesuffix("+")
        if not arg.startswith("--") or not name or " " in name or name.split(".")[-1] in SWITCHES:
            continue
        if not equals:
            value = args[number + 1] if number + 1 < len(args) else ""
        if name == "config":
            yield from _in_text(value, "", known)
        elif _is_section(name, known):
            yield from _in_text(value, name + ".", known)
        elif not _is_known(name, known):
            yield "", name


def _in_text(value: str, prefix: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    inline, path = value.lstrip().startswith("{"), Path(value)
    # A section takes no other files.
    if not inline and prefix and path.suffix not in (".yaml", ".yml"):
        return
    try:
        # What comes through a pipe can be read once; a name can be too long to look for.
        if not inline and not path.is_file():
            return
        text = value if inline else path.read_text(encoding="utf-8-sig")
        content = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return
    for key in _in_mapping(content, prefix, known):
        yield "" if inline else value, key


def _in_mapping(content: Any, prefix: str, known: Collection[str]) -> Iterator[str]:
    for key, value in content.items() if isinstance(content, dict) else ():
        name = f"{prefix}{key}".removesuffix("+")
        if _is_section(name, known):
            yield from _in_mapping(value, name + ".", known)
        elif not _is_known(name, known):
            yield name


def _is_section(name: str, known: Collection[str]) -> bool:
    return any(one.startswith(name + ".") for one in known)


def _is_known(name: str, known: Collection[str]) -> bool:
    return name in known or any(name.startswith(one + ".") and not _is_section(one, known) for one in known)
