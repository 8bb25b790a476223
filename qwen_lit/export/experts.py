"""LoRA on experts in a saved adapter: of which parameter each matrix is, and its share in the tensors of the base."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwen_lit.experts.stacked import PARAMETERS
from qwen_lit.export.folder import ExportError

if TYPE_CHECKING:
    from qwen_lit.export.adapter import Adapter, Pair

SAVED = re.compile(r"(.+\.mlp\.experts)((?:\.base_layer)*)(\.lora_[AB]\.weight)")
"""A weight of PEFT's wrappers of an experts module, which stand around each other, one for each parameter."""


def parameter_named(name: str, config: Mapping[str, Any]) -> str:
    """The name of an adapter's weight, with the parameter's name where it is of experts.

    Args:
        name: in the adapter's file, without PEFT's prefix.
        config: of its adapter_config.json; the innermost wrapper is that of the first parameter.
    """
    found = SAVED.fullmatch(name)
    if found is None:
        return name
    wanted = {one.rpartition(".")[2] for one in config.get("target_parameters") or []}
    adapted = [one for one in PARAMETERS if one in wanted]
    outer = found[2].count(".base_layer")
    if outer >= len(adapted):
        raise ExportError(f"{name}: the adapter's target_parameters do not say which experts' weights it changes")
    return f"{found[1]}.{adapted[-1 - outer]}{found[3]}"


def is_stacked(module: str) -> bool:
    """Whether a pair is of the experts of a layer, by its name."""
    return re.search(rf"\.mlp\.experts\.({'|'.join(PARAMETERS)})$", module) is not None


def each_expert(pair: Pair, count: int) -> list[Pair]:
    """A pair of stacked experts as one pair for each.

    Args:
        pair: A ``[count·r, in]``, B ``[out, r·count]``, as PEFT has them.
        count: experts.
    """
    assert pair.a is not None and pair.b is not None
    a = pair.a.view(count, -1, pair.a.shape[1])
    b = pair.b.view(pair.b.shape[0], -1, count).permute(2, 0, 1)
    return [replace(pair, a=one, b=other, stack=1) for one, other in zip(a, b, strict=True)]


def spread(adapter: Adapter, names: Mapping[str, Iterable[str]], shapes: Mapping[str, list[int]]) -> dict[str, Pair]:
    """The pairs of experts by the tensors of the base's files, whole or in parts; they are taken out of ``pairs``.

    Args:
        adapter: as read, its names those of transformers' model; ``stacked`` keeps the pairs by these.
        names: of the files' tensors, by the names of transformers' model.
        shapes: of the files' tensors.

    Raises:
        ExportError: the base has no such experts, or another number of them.
    """
    found: dict[str, Pair] = {}
    adapter.stacked = {pair.module: pair for pair in adapter.pairs.values() if is_stacked(pair.module)}
    for own, pair in adapter.stacked.items():
        adapter.pairs.pop(f"{own}.weight")
        files, parts = list(names.get(own, ())), PARAMETERS[own.rpartition(".")[2]]
        if not files or any(file not in shapes for file in files):
            raise ExportError(f"the adapter changes {own}, which the base model does not have")
        whole = len(files) == 1
        count = shapes[files[0]][0] if whole else len(files) // parts
        assert pair.a is not None and pair.b is not None
        if pair.a.shape[0] % count or pair.b.shape[1] != pair.a.shape[0]:
            raise ExportError(f"{own}: the adapter's shapes do not fit the base model's {count} experts")
        # It was counted by all rows, as if they were one matrix's.
        pair.scaling *= math.sqrt(count) if adapter.config.get("use_rslora") else count
        pair.stack = count
        if whole:
            found[files[0]] = pair
            continue
        for number, one in enumerate(each_expert(pair, count)):
            assert one.b is not None
            for at, rows in enumerate(one.b.chunk(parts)):
                found[files[number * parts + at]] = replace(one, module=files[number * parts + at], b=rows)
    return found
