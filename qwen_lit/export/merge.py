"""Merge a LoRA adapter into the original safetensors, tensor by tensor; the model is never in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from qwen_lit.export.adapter import Adapter, apply_pair, read_adapter
from qwen_lit.export.experts import spread
from qwen_lit.export.folder import (
    FLOATS,
    TORCH,
    BaseModel,
    ExportError,
    ShardWriter,
    begin_folder,
    commit_folder,
    plan_shards,
    read_json,
    shard_name,
    write_json,
)
from qwen_lit.families.layer import is_tied, text_config
from qwen_lit.families.table import family_of
from qwen_lit.files import file_digest
from qwen_lit.names import hub_name
from qwen_lit.progress import Progress
from qwen_lit.quantization import Held, on_disk

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What a merge did: tensors written, LoRA pairs merged, bytes of weights, seconds, largest ``|scaling·B·A|``."""

    tensors: int
    merged: int
    bytes: int
    seconds: float
    max_delta: float


def fit_names(adapter: Adapter, base: BaseModel, config: dict[str, Any]) -> dict[str, str]:
    """Map each output name to its base name, after the adapter is found to fit the base.

    In ``adapter``, the names of transformers' model give way to those of the base's files.

    Args:
        adapter: as read; changed in place.
        base: its files.
        config: of its config.json; ``tie_word_embeddings`` becomes false where the adapter ends the tie.

    Raises:
        ExportError: the adapter does not fit.
        UserError: the base is of no family that is known.
    """
    family = family_of(config)
    experts = spread(adapter, family.weights(config, base.where), {name: one[2] for name, one in base.where.items()})
    adapter.rename(family.on_disk)
    adapter.pairs |= experts
    names = _untie(adapter, base, config, family.embedding_on_disk, family.head_on_disk)
    _check_fits(adapter, base, names)
    return names


def _untie(adapter: Adapter, base: BaseModel, config: dict[str, Any], embed: str, head: str) -> dict[str, str]:
    """Map each output name to its base name, settling the tie of embedding and head in ``adapter`` and ``config``.

    A tied head is not written. An adapter that changes one of the two apart from the other ends the tie:
    both are written and ``config["tie_word_embeddings"]`` becomes false.
    """
    names = {name: name for name in base.where}
    if not is_tied(config, head not in base.where):
        return names
    names.pop(head, None)
    changed = {embed, head} & (adapter.pairs.keys() | adapter.full.keys())
    if changed and adapter.config.get("ensure_weight_tying"):
        if changed & adapter.pairs.keys():
            raise ExportError("LoRA on tied embeddings with ensure_weight_tying cannot be merged")
        tensors = [adapter.full[name] for name in sorted(changed)]
        adapter.full.pop(head, None)
        adapter.full[embed] = tensors[0]
    elif changed:
        for part in (config, text_config(config)):
            part["tie_word_embeddings"] = False
        names[head] = embed
    return names


def _check_fits(adapter: Adapter, base: BaseModel, names: dict[str, str]) -> None:
    """Every key of the adapter has its base weight, of a fitting shape.

    Raises:
        ExportError: one has not.
    """
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
            made = [*([pair.stack] if pair.stack > 1 else []), pair.b.shape[0], pair.a.shape[1]]
            fits &= shape == (made[::-1] if pair.embedding else made) and pair.a.shape[0] == pair.b.shape[1]
            fits &= pair.magnitude is None or pair.magnitude.numel() == shape[0]
        if not fits:
            raise ExportError(f"{name}: the adapter's shapes do not fit the base model's {shape}")


def _tensors(
    base: BaseModel,
    adapter: Adapter,
    names: dict[str, str],
    held: Mapping[str, Held],
    device: torch.device | None,
) -> Iterator[tuple[str, torch.Tensor, float | None]]:
    """Yield (name, finished tensor, largest |delta| or None where no LoRA pair applies), in the order of names."""
    for name, source in names.items():
        dtype = TORCH[base.where[source][1]]
        if name in adapter.full:
            weight = adapter.full.pop(name)
        else:
            weight = base.get(source, device)
            if name in held:
                weight = held[name].round_trip(weight if device is None else weight.to(device))
        if name in adapter.bias:
            weight = weight.float() + adapter.bias.pop(name)
        pair = adapter.pairs.pop(name, None)
        if pair is not None:
            merged, delta = apply_pair(weight, pair, device, dtype)
            yield name, merged, delta
        else:
            yield name, weight.to("cpu", dtype), None


def _usual_dtype(shards: list[list[tuple[str, torch.dtype, list[int]]]]) -> str:
    """The dtype that most numbers of the tensors have, as a config names it."""
    counts: dict[torch.dtype, int] = {}
    for _, dtype, shape in (one for shard in shards for one in shard):
        counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return str(max(counts, key=lambda dtype: counts[dtype])).removeprefix("torch.")


def _skip(adapter: Adapter, names: list[str]) -> list[float]:
    """Take the weights of a shard that is written already as merged; their deltas are not known any more."""
    found = [pair for name in names if (pair := adapter.pairs.pop(name, None)) is not None]
    for name in names:
        adapter.full.pop(name, None)
        adapter.bias.pop(name, None)
    return [math.nan] * len(found)


def _fingerprint(adapter_dir: Path, base: BaseModel, *settings: Any) -> str:
    """What an export depends on; a folder that a killed one has left is continued where it is the same."""
    files = sorted({path for path, _, _ in base.where.values()})
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    config = json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    # PEFT writes these sets in any order.
    lists = {key: sorted(value) if isinstance(value, list) else value for key, value in config.items()}
    adapter = [sorted(lists.items()), file_digest(adapter_dir / "adapter_model.safetensors")]
    return hashlib.sha256(json.dumps([stats, adapter, settings], default=str).encode()).hexdigest()


def merge_adapter(
    adapter_dir: Path,
    base_dir: Path,
    out_dir: Path,
    *,
    merge_base: Literal["original", "dequantized"] = "original",
    held: Mapping[str, Held] | None = None,
    original_dir: Path | None = None,
    max_shard_bytes: int = 4 * 2**30,
    finish: Callable[[Path], None] | None = None,
    device: torch.device | None = None,
) -> MergeReport:
    """Write the base model with a LoRA adapter merged in, as safetensors shards, index and config.json.

    Each target becomes ``W + scaling·B·A`` (DoRA: ``m·(W + scaling·B·A)/‖·‖_row``), computed in fp32 from W (out, in),
    A (r, in) and B (out, r); modules_to_save are taken from the adapter, and every other tensor is the base's, such as
    those of a vision tower. Names, dtypes and config are the base's; of quantised files all is bf16. Memory holds the
    adapter and one base tensor. The folder is made as ``<out_dir>.tmp`` and renamed when it is whole; an earlier
    export of this package at ``out_dir`` is replaced. What a killed export has left in ``<out_dir>.tmp`` is continued
    at the first shard that is not whole.

    Args:
        adapter_dir: PEFT folder (adapter_config.json, adapter_model.safetensors).
        base_dir: folder of the model that was trained on (model.safetensors, or shards with their index).
        out_dir: the folder to make.
        merge_base: what W is: the original, or, for the weights of ``held``, what they were while training.
        held: how the base's quantised weights were held, for "dequantized".
        original_dir: folder of the original, where the files of ``base_dir`` are quantised; its files are written
            anew then, and those of ``base_dir`` for "dequantized".
        max_shard_bytes: size limit of a shard; a single larger tensor still makes one.
        finish: called with the temporary folder before the rename, to add files.
        device: where the products run; default the CPU.

    Raises:
        ExportError: the adapter does not fit the base or cannot be merged, a file is broken or named outside the
            folder, the output would overwrite something foreign, or the disk is too full.
    """
    start = time.perf_counter()
    if merge_base not in ("original", "dequantized"):
        raise ExportError(f"merge_base is {merge_base!r}; original or dequantized is expected")
    if merge_base == "original" and original_dir is not None:
        base_dir = original_dir
    adapter_dir, base_dir, out_dir = (Path(path).resolve() for path in (adapter_dir, base_dir, out_dir))
    adapter, base, config = read_adapter(adapter_dir), BaseModel(base_dir), read_json(base_dir / "config.json")
    if merge_base == "original" and base.stored:
        raise ExportError(f"{base_dir} holds quantised weights, not the original's; name that as export.original")
    base.widen()
    head = family_of(config).head_on_disk
    tied = is_tied(config, head not in base.where)
    names = fit_names(adapter, base, config)
    if tied and head in names:
        log.warning("the adapter changes the embedding or the head alone: the merged model has untied embeddings")
    shards = plan_shards(base, names, max_shard_bytes)
    for part in (config, text_config(config)):
        part.pop("quantization_config", None)
    if not hub_name(str(config.get("_name_or_path"))):
        config.pop("_name_or_path", None)
    if base.stored or (not config.get("dtype") and not config.get("torch_dtype")):
        # transformers 5 reads dtype, earlier ones torch_dtype.
        for part in (config, text_config(config)):
            part["dtype"] = part["torch_dtype"] = _usual_dtype(shards)

    total = sum(math.prod(shape) * dtype.itemsize for shard in shards for _, dtype, shape in shard)
    rounded = on_disk(held or {}, config, base.where) if merge_base == "dequantized" else {}
    # What the files hold quantised is read as it was while training.
    rounded = {name: how for name, how in rounded.items() if name not in base.stored}
    tmp = begin_folder(
        out_dir, [base_dir, adapter_dir], _fingerprint(adapter_dir, base, rounded, max_shard_bytes, names)
    )
    weight_map: dict[str, str] = {}
    deltas: list[float] = []
    expected = len(adapter.pairs)
    try:
        left = sum((tmp / shard_name(n, len(shards))).is_file() for n in range(1, len(shards) + 1)) * max_shard_bytes
        if (free := shutil.disk_usage(tmp).free + left) < total:
            raise ExportError(f"{out_dir}: needs {total / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB left")
        for number, shard in enumerate(shards, start=1):
            file = shard_name(number, len(shards))
            weight_map |= {name: file for name, _, _ in shard}
            if (tmp / file).is_file():
                deltas += _skip(adapter, [name for name, _, _ in shard])
                log.info("%s is there already (%d of %d)", file, number, len(shards))
                continue
            mine = {name: names[name] for name, _, _ in shard}
            size = sum(math.prod(shape) * dtype.itemsize for _, dtype, shape in shard)
            what = f"merging, file {number} of {len(shards)}"
            with ShardWriter(tmp / file, shard) as writer, Progress(what, size, "B") as progress:
                for name, tensor, delta in _tensors(base, adapter, mine, rounded, device):
                    writer.write(name, tensor)
                    progress.advance(tensor.nbytes)
                    if delta is not None:
                        deltas.append(delta)
            log.debug("%s written (%d of %d)", file, number, len(shards))
        if adapter.pairs or adapter.full or adapter.bias or len(deltas) != expected:
            raise ExportError(f"not every weight of {adapter_dir} was merged: {len(deltas)} of {expected} LoRA pairs")
        write_json(tmp / "config.json", config)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_json(tmp / "model.safetensors.index.json", index)
        if finish is not None:
            finish(tmp)
        commit_folder(tmp, out_dir)
    except OSError as error:
        shutil.rmtree(tmp, ignore_errors=True)
        raise ExportError(f"{out_dir}: could not be written ({error}); free the disk and export again") from error
    except Exception:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    largest = max((delta for delta in deltas if not math.isnan(delta)), default=math.nan)
    report = MergeReport(len(weight_map), expected, total, time.perf_counter() - start, largest)
    if deltas and report.max_delta == 0.0:
        log.warning("%s: every LoRA delta is zero, the merged model equals the base", adapter_dir)
    log.info("merged %d LoRA pairs in %.1f s", report.merged, report.seconds)
    return report
