"""Bases whose own files hold quantised weights: what config.json says of them, and the weights, found in the headers
and read back."""

import json
import re
from collections.abc import Callable, Container, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.families.layer import value_of
from qwen_lit.families.table import family_of
from qwen_lit.hub import SINGLE, shards

STATE = ".quant_state.bitsandbytes__"
"""Between the name of a 4-bit weight and the kind of its codes, in the name of the tensor that describes it."""
SCALES = ("absmax", "quant_map")
NESTED = ("nested_absmax", "nested_quant_map")
"""Tensors beside a 4-bit weight; the latter where its scales are quantised too."""
KINDS = ("nf4", "fp4")
ELSEWHERE = re.compile(r"(?i)[-_](gptq|awq|fp8|int4|int8|4bit|8bit|w4a16|w8a8|mlx|quantized)\b.*$")
"""What a quantised model's name has after that of the original."""


@dataclass(frozen=True)
class Stored:
    """One weight as bitsandbytes has written it."""

    kind: str
    """nf4, fp4 or int8."""
    shape: tuple[int, ...]
    """Of the weight that it stands for, ``[out, in]``."""
    parts: tuple[str, ...]
    """Tensors of the files that belong to it, beside the one of its own name."""
    blocksize: int = 0
    """Numbers that share a scale; 0 for int8, where each row has one."""
    double: bool = False
    """Whether the scales are quantised too."""


def own_quantization(config: Any, name: str = "the model") -> BitsAndBytesConfig | None:
    """How config.json says that the weights in the files are quantised; None where they are not.

    Products run in bf16, whatever the file says: that is no property of the weights. Modules that are left out may be
    named as in a wrapper around the language model, which is loaded without it.

    Args:
        config: of the base model.
        name: of the model in messages.

    Raises:
        UserError: they are quantised in a way that is not trained on.
    """
    given = value_of(config, "quantization_config")
    if not given:
        return None
    said = dict(given if isinstance(given, Mapping) else given.to_dict())
    method = said.get("quant_method")
    method = str(getattr(method, "value", method))
    if method != "bitsandbytes":
        original = ELSEWHERE.sub("", Path(name).name)
        owner = f"{Path(name).parent}/" if Path(name).parent.name else ""
        instead = f", such as {owner}{original}," if original != Path(name).name else ","
        raise UserError(
            f"model_name_or_path: {name} is quantised already ({method}), in a form for serving that LoRA is not "
            f"trained on here; give the original bf16 model{instead} which model.quantization_config quantises while "
            "it is read, or one whose files hold bitsandbytes' 4 or 8 bits, as names with bnb-4bit do."
        )
    skipped = said.get("llm_int8_skip_modules")
    said["llm_int8_skip_modules"] = None if skipped is None else [_in_text_model(one) for one in skipped]
    # These place or widen weights while they are quantised, which is done.
    said |= {"llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False}
    known = {key: value for key, value in said.items() if not key.startswith("_") and key != "quant_method"}
    own = BitsAndBytesConfig(**known)
    own.bnb_4bit_compute_dtype = torch.bfloat16
    return own


def _in_text_model(module: str) -> str:
    return module.replace("language_model.", "")


def find_stored(tensors: Mapping[str, Any], read: Callable[[str], Tensor]) -> dict[str, Stored]:
    """The weights that bitsandbytes has quantised, by their names in the files.

    Args:
        tensors: name to shape of everything that the files hold.
        read: gives a tensor by its name; only descriptions of some hundred bytes are read.

    Raises:
        ValueError: a tensor that belongs to one of them is missing, or its description cannot be read.
    """
    found: dict[str, Stored] = {}
    for name in tensors:
        own, of_four_bits, kind = name.partition(STATE)
        if of_four_bits:
            state = json.loads(bytes(read(name).tolist()))
            double = "nested_blocksize" in state
            parts = [f"{own}.{one}" for one in (*SCALES, *(NESTED if double else ()))]
            found[own] = Stored(kind, tuple(state["shape"]), (*parts, name), int(state["blocksize"]), double)
        elif name.endswith(".SCB"):
            own = name.removesuffix("SCB") + "weight"
            mark = f"{own}_format"
            found[own] = Stored("int8", tuple(tensors.get(own, ())), (name, *([mark] if mark in tensors else [])))
        elif name.endswith(".weight.absmax") and not any(f"{name[:-7]}{STATE}{one}" in tensors for one in KINDS):
            raise ValueError(f"{name} is there, and nothing that says how {name[:-7]} is held")
    for name, one in found.items():
        for part in (name, *one.parts):
            if part not in tensors:
                raise ValueError(f"{name} is held in {one.kind}, and {part} is missing")
    return found


def stored_in(folder: Path) -> dict[str, Stored]:
    """``find_stored`` of a model's folder, whose files are read as far as their headers.

    Raises:
        UserError: a quantised weight is not whole.
    """
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for file in shards(folder) or [SINGLE]:
            opened = stack.enter_context(safe_open(folder / file, framework="pt"))
            files |= dict.fromkeys(opened.keys(), opened)
        shapes = {name: opened.get_slice(name).get_shape() for name, opened in files.items()}
        try:
            return find_stored(shapes, lambda name: files[name].get_tensor(name))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"model_name_or_path: {folder} is not whole ({error}); fetch it again.") from error


def names_on_disk(folder: Path, there: Container[str]) -> dict[str, tuple[str, ...]]:
    """Every parameter of a folder's language model: its name in transformers, and its names in the files.

    Args:
        folder: of the model, whose config.json is the files' own.
        there: as of ``Family.weights``.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return family_of(config).weights(config, there)


def dequantized(
    name: str, stored: Stored, read: Callable[[str], Tensor], device: torch.device | None = None
) -> Tensor:
    """The weight that products see.

    Args:
        name: of the weight.
        stored: how it is held.
        read: gives a tensor of the files by its name.
        device: where it is computed; default the CPU.

    Returns:
        ``[out, in]`` on the device: in bf16, or in float32 for int8, whose products are scaled in float32.
    """
    device = device or torch.device("cpu")
    weight = read(name).to(device)
    if stored.kind == "int8":
        return F.int8_vectorwise_dequant(weight, read(stored.parts[0]).to(device))
    state = F.QuantState.from_dict({part: read(part) for part in stored.parts}, device=device)
    # As ``read_model`` has it, in whatever dtype the original was.
    state.dtype = torch.bfloat16
    return F.dequantize_4bit(weight, state)
