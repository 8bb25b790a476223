"""A saved LoRA adapter, and what it does to a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from qwen_lit.export.experts import each_expert, parameter_named
from qwen_lit.export.folder import ExportError, open_tensors, read_json, write_json
from qwen_lit.families.layer import Family
from qwen_lit.families.mixtures import for_peft
from qwen_lit.families.wrappers import for_language_model, for_whole, weight_for_language_model

CONVERTED_MARKER = "residual_converted"
"""An empty file of this name in an adapter folder says that its weights already count from the original base."""

PREFIX = "base_model.model."
CHUNK_ELEMENTS = 2**25  # fp32 work is done on row blocks of at most this size
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = (
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "arrow_config",
    "trainable_token_indices",
    "megatron_config",
)


def saved_name(name: str) -> str:
    """The name in an adapter's file of a parameter of ``QwenModule``, or of PEFT's model."""
    plain = name.removeprefix("model.") if name.startswith("model.base_model.") else name
    plain = plain.replace(".modules_to_save.default", "").replace(".default", "")
    return plain.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


@dataclass
class Pair:
    """One LoRA target: A (r, in), B (out, r), DoRA magnitude (out,), all fp32."""

    module: str
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    embedding: bool = False
    scaling: float = 1.0
    stack: int = 1
    """Experts whose A are one below the other, and whose B's columns are told apart last, as PEFT has them."""


@dataclass
class Adapter:
    config: dict[str, Any]
    pairs: dict[str, Pair] = field(default_factory=dict)  # by the name of the base weight
    full: dict[str, torch.Tensor] = field(default_factory=dict)  # modules_to_save, trained biases
    bias: dict[str, torch.Tensor] = field(default_factory=dict)  # lora_bias: already scaled
    stacked: dict[str, Pair] = field(default_factory=dict)  # of experts, by the name in transformers' model

    def rename(self, name: Callable[[str], str]) -> None:
        """Give every weight another name."""
        self.pairs = {name(own): one for own, one in self.pairs.items()}
        self.full = {name(own): one for own, one in self.full.items()}
        self.bias = {name(own): one for own, one in self.bias.items()}


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of one module; the rank is that of its weights, so rank_pattern is met as saved."""
    alpha = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def read_adapter(adapter_dir: Path) -> Adapter:
    """Read adapter_config.json and adapter_model.safetensors; every key is understood or named in an error.

    Names are those of the language model, whichever the folder was written with.
    """
    config = for_language_model(read_json(adapter_dir / "adapter_config.json"))
    if str(config.get("peft_type")).upper() != "LORA":
        raise ExportError(f"{adapter_dir}: peft_type {config.get('peft_type')!r}; only LORA adapters can be merged")
    for key in UNSUPPORTED:
        if config.get(key):
            raise ExportError(f"{adapter_dir}: adapters with {key} cannot be merged")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(RESIDUAL_INITS) and not (adapter_dir / CONVERTED_MARKER).exists():
        raise ExportError(
            f"{adapter_dir}: init_lora_weights={init} changed the base weights; save the adapter with "
            f"save_pretrained(path_initial_model_for_weight_conversion=...) before merging it"
        )
    adapter, biases = Adapter(config), dict[str, torch.Tensor]()
    path = adapter_dir / "adapter_model.safetensors"
    pattern = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.weight|\.bias)?$")
    with open_tensors(path) as handle:
        for key in handle.keys():
            name = parameter_named(weight_for_language_model(key.removeprefix(PREFIX)), config)
            name = name.replace(".base_layer.", ".")
            tensor = handle.get_tensor(key)
            match = pattern.match(name)
            if not key.startswith(PREFIX) or (match is None and not name.endswith((".weight", ".bias"))):
                raise ExportError(f"{path}: {key} is not a key that can be merged")
            if match is None:
                adapter.full[name] = tensor
                continue
            module, kind, suffix = match[1], match[2], match[3]
            if suffix == ".bias":
                biases[module] = tensor.float()
                continue
            pair = adapter.pairs.setdefault(module + ".weight", Pair(module))
            slot = {"A": "a", "B": "b", "m": "magnitude"}[kind.removeprefix("embedding_")[0]]
            if getattr(pair, slot) is not None:
                raise ExportError(f"{path}: {key} is there twice")
            setattr(pair, slot, tensor.float())
            pair.embedding |= kind.startswith("embedding_")
    for pair in adapter.pairs.values():
        if pair.a is None or pair.b is None:
            raise ExportError(f"{path}: {pair.module} has only one of lora_A and lora_B")
        pair.scaling = _scaling(config, pair.module, pair.a.shape[0])
    if config.get("use_dora") and any(pair.magnitude is None for pair in adapter.pairs.values()):
        raise ExportError(f"{path}: use_dora is set but a lora_magnitude_vector is missing")
    adapter.bias = {f"{m}.bias": b * adapter.pairs[f"{m}.weight"].scaling for m, b in biases.items()}
    if not adapter.pairs and not adapter.full:
        raise ExportError(f"{path}: holds no LoRA weights")
    return adapter


def write_for_whole(adapter_dir: Path, family: Family) -> None:
    """Name what is in an adapter's folder for the whole model that the base's files hold, and as PEFT reads it.

    Args:
        adapter_dir: as PEFT writes it for the language model; its names stay where the files hold nothing else.
        family: of the base's files.
    """
    path, weights = adapter_dir / "adapter_config.json", adapter_dir / "adapter_model.safetensors"
    config = read_json(path)
    if family.experts:
        config = for_peft(config)
    if family.text:
        named = {PREFIX + family.in_wrapper(key.removeprefix(PREFIX)): one for key, one in load_file(weights).items()}
        save_file(named, weights, metadata={"format": "pt"})
        config = for_whole(config)
    write_json(path, config)


def apply_pair(
    weight: torch.Tensor, pair: Pair, device: torch.device | None = None, dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, float]:
    """Merge one pair in fp32, a block of rows at a time.

    Args:
        weight: (out, in), or (experts, out, in), as stored.
        pair: the adapter's share in it.
        device: where the products run; default the CPU.
        dtype: of the result.

    Returns:
        The (out, in) weight on the CPU, and the largest ``|scaling·B·A|``.

    Raises:
        ExportError: the result is not finite in its dtype.
    """
    assert pair.a is not None and pair.b is not None
    device = device or torch.device("cpu")
    if pair.stack > 1:
        done = [
            apply_pair(one, its, device, dtype) for one, its in zip(weight, each_expert(pair, pair.stack), strict=True)
        ]
        return torch.stack([one for one, _ in done]), max(delta for _, delta in done)
    left, right = (pair.a.T, pair.b.T) if pair.embedding else (pair.b, pair.a)
    left, right = left.to(device), right.to(device)
    result = torch.empty(weight.shape, dtype=dtype)
    rows, largest = max(1, CHUNK_ELEMENTS // weight.shape[1]), 0.0
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        delta = (left[block] @ right) * pair.scaling
        largest = max(largest, float(delta.abs().max()))
        merged = weight[block].to(device).float() + delta
        if pair.magnitude is not None:
            norm = torch.linalg.norm(merged, dim=1, keepdim=True)
            merged = merged * (pair.magnitude.view(-1, 1)[block].to(device) / norm)
        merged = merged.to(dtype)
        if not bool(torch.isfinite(merged).all()):
            raise ExportError(f"{pair.module}: the merged weight is not finite in {dtype}; the adapter is broken")
        result[block] = merged
    return result, largest
