"""What no configuration can hold: numbers out of range, words for null, paths that cannot be what they should."""

import os
import re
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from qwen_lit.errors import UserError

RANGES: dict[str, tuple[float, float, str]] = {
    "model.learning_rate": (0, inf, "above 0, for example 2.0e-4"),
    "model.warmup_ratio": (0, 1, "at least 0 and below 1"),
    "model.weight_decay": (0, inf, "at least 0"),
    "model.adam_beta1": (0, 1, "at least 0 and below 1"),
    "model.adam_beta2": (0, 1, "at least 0 and below 1"),
    "model.lora_plus_ratio": (0, inf, "above 0; 1 is plain LoRA"),
    "model.neftune_noise_alpha": (0, inf, "at least 0; 0 is off"),
    "model.max_skipped_steps": (1, inf, "at least 1"),
    "model.products_check_every": (0, inf, "at least 0; 0 is off"),
    "model.products_floor": (0, 1, "a cosine of at least 0 and below 1, or null"),
    "model.lora_config.r": (1, inf, "above 0, for example 32"),
    "model.lora_config.lora_alpha": (0, inf, "above 0, for example twice r"),
    "model.lora_config.lora_dropout": (0, 1, "at least 0 and below 1"),
    "data.val_size": (0, inf, "a share below 1, or a whole count of rows"),
    "data.batch_size": (1, inf, "at least 1"),
    "data.max_length": (8, inf, "at least 8"),
    "data.max_bad_share": (0, inf, "a share from 0 to 1"),
    "data.num_proc": (1, inf, "at least 1, or null"),
    "data.num_workers": (0, inf, "at least 0"),
    "checkpoint.every_n_train_steps": (1, inf, "at least 1"),
    "checkpoint.keep": (2, inf, "at least 2, as the newest can be in the making"),
    "export.verdict_rows": (0, inf, "at least 0; 0 compares nothing"),
    "export.smoke_rows": (0, inf, "at least 0; 0 tries none"),
    "samples.rows": (0, inf, "at least 0; 0 asks nothing"),
    "samples.max_new_tokens": (1, inf, "at least 1"),
    "rows": (0, inf, "at least 0"),
    "steps": (2, inf, "at least 2"),
    "batch_size": (1, inf, "at least 1"),
    "max_new_tokens": (1, inf, "at least 1"),
}
"""Each number of ours: its least value, what it stays below, and how that is said."""
ABOVE = ("model.learning_rate", "model.lora_plus_ratio", "model.lora_config.lora_alpha")
"""Numbers that may not be their least value itself."""
DTYPES = {
    "bnb_4bit_compute_dtype": ("bfloat16", "float16", "float32"),
    "bnb_4bit_quant_storage": ("uint8", "int8", "bfloat16", "float16", "float32", "float64"),
    "bnb_4bit_quant_type": ("nf4", "fp4"),
}
NONE = ("none", "false", "nil", "no")
"""What people write for null."""
NULLABLE = (
    "data.val_dataset_path",
    "data.cache_dir",
    "model.memory_budget",
    "memory_budget",
    "ckpt_path",
    "row",
    "html",
    "push_to_hub",
    "export.original",
)
LOCAL = ("output_dir", "data.cache_dir", "ckpt_path", "html", "source", "target")
ADDRESS = r"\w[\w+.-]*://"


def check_ranges(section: str, values: Mapping[str, Any]) -> None:
    """Refuse numbers that no run can have.

    Args:
        section: as ``model.lora_config``; empty for the keys of a command.
        values: name to value of its keys; others are passed over.

    Raises:
        UserError: a number is out of its range, or not a number.
    """
    for name, value in values.items():
        key = f"{section}.{name}" if section else name
        if key not in RANGES or value is None:
            continue
        least, below, text = RANGES[key]
        if not least <= value < below or (value == least and key in ABOVE):
            raise UserError(f"{key} is {value}; it must be {text}.")


def check_values(config: Any) -> None:
    """Refuse what a command's configuration cannot hold, before any class is built.

    Raises:
        UserError: a number, a dtype or a word is none of those that the key takes.
    """
    for section in ("model", "model.lora_config", "data", "checkpoint", "export", "samples", ""):
        check_ranges(section, vars(config.get(section, {})) if section else vars(config))
    quantization = config.model.quantization_config
    for name, known in DTYPES.items():
        value = quantization.get(name) if quantization else None
        if value is not None and str(value).removeprefix("torch.") not in known:
            raise UserError(f"model.quantization_config.{name} is {value!r}; write {' or '.join(known)}.")
    if quantization and quantization.get("load_in_4bit") and quantization.get("load_in_8bit"):
        raise UserError(
            "model.quantization_config: load_in_4bit and load_in_8bit are both true, and a base is held in one of "
            "them; set the other to false."
        )
    export = config.export
    if export.gguf is not None and not export.merge:
        raise UserError(
            f"export.gguf is {export.gguf}, but export.merge is false, and a GGUF file is made of the merged model; "
            "set export.merge to true, or export.gguf to null."
        )
    if export.merge and export.merge_base == "auto" and export.verdict_rows == 0:
        raise UserError(
            "export.merge_base is auto, which measures on export.verdict_rows rows, and these are 0; set it to "
            "original or dequantized, or verdict_rows to 32."
        )
    for key in NULLABLE:
        value = config.get(key)
        if isinstance(value, str) and value.lower() in NONE and not Path(value).exists():
            raise UserError(f"{key} is {value!r}; write null for none, or leave it out.")
    for key in LOCAL:
        value = config.get(key)
        if isinstance(value, str) and re.match(ADDRESS, value):
            raise UserError(f"{key}: {value} is an address; give a path of this machine.")
        if value == "" and key != "source":
            raise UserError(f"{key} is empty; give a path, or leave it out.")


def check_paths(command: str, config: Any) -> None:
    """Refuse a command whose inputs are not there, or whose outputs nobody can write.

    Raises:
        UserError: with the key, the path and the remedy.
    """
    if command == "predict" and not Path(config.source).is_file():
        raise UserError(f"source: no such file: {config.source}; give a file of questions.")
    for key in ("html", "target"):
        if config.get(key):
            path = Path(config[key])
            if path.is_dir():
                raise UserError(f"{key}: {path} is a folder; give the file to write.")
            check_writable(key, path.parent)
    if command == "verify_resume":
        check_writable("output_dir", Path(config.output_dir))


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that is none, or that nobody can make.

    Raises:
        UserError: it cannot be written.
    """
    found = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    reason = "" if found.is_dir() else f"{found} is a file"
    if not reason and found != folder and not os.access(found, os.W_OK | os.X_OK):
        reason = f"{found} is not yours to write"
    if reason:
        raise UserError(f"{key}: {folder} cannot be made ({reason}); set {key} to a folder that you can write to.")
