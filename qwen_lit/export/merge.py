# SPDX-License-Identifier: MIT
"""Merge a LoRA adapter into the original safetensors, tensor by tensor; the model is never in memory."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_lit.export.folder import (
    FLOATS,
    BaseModel,
    ExportError,
    ShardWriter,
    begin_folder,
    commit_folder,
    nf4_roundtrip,
    open_tensors,
    plan_shards,
    read_json,
    write_json,
)

log = logging.getLogger(__name__)

CONVERTED_MARKER = "residual_converted"
"""An empty file of this name in an adapter folder says that its weights already count from the original base."""

EMBED, HEAD, PREFIX = "model.embed_tokens.weight", "lm_head.weight", "base_model.model."
CHUNK_ELEMENTS = 2**25  # fp32 work is done on row blocks of at most this size
RESIDUAL_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
UNSUPPORTED = ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "use_qalora", "arrow_config",
               "trainable_token_indices", "megatron_config")  # fmt: skip


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors written, LoRA pairs merged, bytes of weights, seconds, largest ``|scaling·B·A|``."""

    tensors: int
    merged: int
    bytes: int
    seconds: float
    max_delta: float


@dataclass
class _Pair:
    """One LoRA target: A (r, in), B (out, r), DoRA magnitude (out,), all fp32."""

    module: str
    a: torch.Tensor | None = None
    b: torch.Tensor | None = None
    magnitude: torch.Tensor | None = None
    embedding: bool = False
    scaling: float = 1.0


@dataclass
class _Adapter:
    config: dict[str, Any]
    pairs: dict[str, _Pair] = field(default_factory=dict)  # by the name of the base weight
    full: dict[str, torch.Tensor] = field(default_factory=dict)  # modules_to_save, trained biases
    bias: dict[str, torch.Tensor] = field(default_factory=dict)  # lora_bias: already scaled


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """PEFT's scaling of one module; the rank is that of its weights, so rank_pattern is met as saved."""
    alpha = config.get("lora_alpha", 8)
    for key, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            alpha = value
            break
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def _read_adapter(adapter_dir: Path) -> _Adapter:
    """Read adapter_config.json and adapter_model.safetensors; every key is understood or named in an error."""
    config = read_json(adapter_dir / "adapter_config.json")
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
    adapter, biases = _Adapter(config), dict[str, torch.Tensor]()
    path = adapter_dir / "adapter_model.safetensors"
    pattern = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\.weight|\.bias)?$")
    with open_tensors(path) as handle:
        for key in handle.keys():
            name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
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
            pair = adapter.pairs.setdefault(module + ".weight", _Pair(module))
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


def _apply(weight: torch.Tensor, pair: _Pair) -> tuple[torch.Tensor, float]:
    """Merge one pair in fp32: returns the bf16 (out, in) weight and the largest ``|delta|``."""
    assert pair.a is not None and pair.b is not None
    left, right = (pair.a.T, pair.b.T) if pair.embedding else (pair.b, pair.a)
    result = torch.empty(weight.shape, dtype=torch.bfloat16)
    rows, largest = max(1, CHUNK_ELEMENTS // weight.shape[1]), 0.0
    for start in range(0, weight.shape[0], rows):
        block = slice(start, start + rows)
        delta = (left[block] @ right) * pair.scaling
        largest = max(largest, float(delta.abs().max()))
        merged = weight[block].float() + delta
        if pair.magnitude is not None:
            norm = torch.linalg.norm(merged, dim=1, keepdim=True)
            merged = merged * (pair.magnitude.view(-1, 1)[block] / norm)
        if not bool(torch.isfinite(merged).all()):
            raise ExportError(f"{pair.module}: the merged weight is not finite; the adapter is broken")
        result[block] = merged.to(torch.bfloat16)
    return result, largest


def _untie(adapter: _Adapter, base: BaseModel, config: dict[str, Any]) -> dict[str, str]:
    """Map each output name to its base name, settling the tie of embedding and head.

    A tied head is not written. An adapter that changes one of the two apart from the other ends the tie:
    both are written and ``config["tie_word_embeddings"]`` becomes false.
    """
    names = {name: name for name in base.where}
    if not config.get("tie_word_embeddings", HEAD not in base.where):
        return names
    names.pop(HEAD, None)
    changed = {EMBED, HEAD} & (adapter.pairs.keys() | adapter.full.keys())
    if changed and adapter.config.get("ensure_weight_tying"):
        if changed & adapter.pairs.keys():
            raise ExportError("LoRA on tied embeddings with ensure_weight_tying cannot be merged")
        tensors = [adapter.full[name] for name in sorted(changed)]
        adapter.full.pop(HEAD, None)
        adapter.full[EMBED] = tensors[0]
    elif changed:
        log.warning("the adapter changes %s alone: the merged model has untied embeddings", ", ".join(sorted(changed)))
        config["tie_word_embeddings"] = False
        names[HEAD] = EMBED
    return names


def _check(adapter: _Adapter, base: BaseModel, names: dict[str, str]) -> None:
    """Every key of the adapter has its base weight, of a fitting shape."""
    for name in (*adapter.pairs, *adapter.full, *adapter.bias):
        if name not in names:
            raise ExportError(f"the adapter changes {name}, which the base model does not have")
        _, dtype, shape = base.where[names[name]]
        if dtype not in FLOATS:
            raise ExportError(f"{name} is {dtype} in the base model; merging needs the unquantised original")
        fits = name not in adapter.full or list(adapter.full[name].shape) == shape
        fits &= name not in adapter.bias or list(adapter.bias[name].shape) == shape
        pair = adapter.pairs.get(name)
        if pair is not None and pair.a is not None and pair.b is not None:
            if pair.embedding and pair.magnitude is not None:
                raise ExportError(f"{name}: DoRA on an embedding cannot be merged")
            made = [pair.b.shape[0], pair.a.shape[1]]
            fits &= shape == (made[::-1] if pair.embedding else made) and pair.a.shape[0] == pair.b.shape[1]
            fits &= pair.magnitude is None or pair.magnitude.numel() == shape[0]
        if not fits:
            raise ExportError(f"{name}: the adapter's shapes do not fit the base model's {shape}")


def _tensors(
    base: BaseModel, adapter: _Adapter, names: dict[str, str], quantization: dict[str, Any] | None
) -> Iterator[tuple[str, torch.Tensor, float | None]]:
    """Yield (name, finished tensor, largest |delta| or None where no LoRA pair applies), in the order of names."""
    skip = (quantization or {}).get("llm_int8_skip_modules") or ["lm_head"]
    for name, source in names.items():
        weight = adapter.full.pop(name) if name in adapter.full else base.get(source)
        # bitsandbytes quantises the linear layers: the head, embedding and norms stay as they are
        linear = weight.dim() == 2 and name not in (EMBED, HEAD) and not any(part in name for part in skip)
        if quantization is not None and linear:
            weight = nf4_roundtrip(weight, quantization)
        if name in adapter.bias:
            weight = weight.float() + adapter.bias.pop(name)
        pair = adapter.pairs.pop(name, None)
        if pair is not None:
            merged, delta = _apply(weight, pair)
            yield name, merged, delta
        else:
            yield name, weight.to(torch.bfloat16) if weight.is_floating_point() else weight, None


def merge_adapter(
    adapter_dir: Path,
    base_dir: Path,
    out_dir: Path,
    *,
    merge_base: Literal["original", "dequantized"] = "original",
    quantization: dict[str, Any] | None = None,
    max_shard_bytes: int = 4 * 2**30,
    finish: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write the base model with a LoRA adapter merged in, as bf16 safetensors shards, index and config.json.

    Each target becomes ``bf16(W + scaling·B·A)`` (DoRA: ``m·(W + scaling·B·A)/‖·‖_row``), computed in fp32 from W
    (out, in) in the base's dtype, A (r, in) and B (out, r). Other floating tensors are written as bf16; those of
    modules_to_save are taken from the adapter. Memory holds the adapter and one base tensor. The folder is made as
    ``<out_dir>.tmp`` and renamed when it is whole; an earlier export of this package at ``out_dir`` is replaced.

    Args:
        adapter_dir: PEFT folder (adapter_config.json, adapter_model.safetensors).
        base_dir: original, unquantised model folder (model.safetensors, or shards with their index).
        out_dir: the folder to make.
        merge_base: what W is: the original, or its linear weights after a 4-bit round trip, as trained on.
        quantization: BitsAndBytesConfig keys for "dequantized" (plus ``blocksize``); default NF4, double, 64.
        max_shard_bytes: size limit of a shard; a single larger tensor still makes one.
        finish: called with the temporary folder before the rename, to add files.

    Raises:
        ExportError: the adapter does not fit the base or cannot be merged, a file is broken or named outside the
            folder, the output would overwrite something foreign, or the disk is too full.
    """
    start = time.perf_counter()
    if merge_base not in ("original", "dequantized"):
        raise ExportError(f"merge_base is {merge_base!r}; original or dequantized is expected")
    adapter_dir, base_dir, out_dir = (Path(path).resolve() for path in (adapter_dir, base_dir, out_dir))
    adapter, base, config = _read_adapter(adapter_dir), BaseModel(base_dir), read_json(base_dir / "config.json")
    names = _untie(adapter, base, config)
    _check(adapter, base, names)
    shards = plan_shards(base, names, max_shard_bytes)
    config.pop("quantization_config", None)
    config.pop("torch_dtype", None)
    config["dtype"] = "bfloat16"

    total = sum(math.prod(shape) * dtype.itemsize for shard in shards for _, dtype, shape in shard)
    tmp = begin_folder(out_dir, [base_dir, adapter_dir])
    weight_map: dict[str, str] = {}
    deltas: list[float] = []
    expected = len(adapter.pairs)
    try:
        if (free := shutil.disk_usage(tmp).free) < total:
            raise ExportError(f"{out_dir}: needs {total / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left")
        settings = (quantization or {}) if merge_base == "dequantized" else None
        stream = _tensors(base, adapter, names, settings)
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
            with ShardWriter(tmp / file, shard) as writer:
                for name, _, _ in shard:
                    _, tensor, delta = next(stream)
                    writer.write(name, tensor)
                    weight_map[name] = file
                    if delta is not None:
                        deltas.append(delta)
            log.debug("%s written (%d of %d)", file, number, len(shards))
        if adapter.pairs or adapter.full or adapter.bias or len(deltas) != expected:
            raise ExportError(f"not every weight of {adapter_dir} was merged: {len(deltas)} of {expected} LoRA pairs")
        write_json(tmp / "config.json", config)
        if finish is not None:
            finish(tmp)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(tmp / "model.safetensors.index.json", index)
        commit_folder(tmp, out_dir)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    report = MergeReport(len(weight_map), expected, total, time.perf_counter() - start, max(deltas, default=0.0))
    if deltas and report.max_delta == 0.0:
        log.warning("%s: every LoRA delta is zero, the merged model equals the base", adapter_dir)
    log.info("merged %d LoRA pairs into %s in %.1f s", report.merged, out_dir, report.seconds)
    return report
