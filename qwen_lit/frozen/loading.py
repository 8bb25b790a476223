"""Loading a base: from its blocks where its layers are linears in 4 bits, and else as transformers does."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from qwen_lit.frozen.assemble import Skeleton, assemble
from qwen_lit.frozen.cache import ALONE, Ranks, blocks_in_memory, cache_folder, cached_blocks, key_of
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.quantize import quantized_layers
from qwen_lit.hardware import host_memory, product_dtype
from qwen_lit.model.base import fingerprint
from qwen_lit.model.delta_rule import choose_delta_rule
from qwen_lit.model.documents import keep_apart
from qwen_lit.model.load import computing_on, freeze, language_model, load_base
from qwen_lit.prequantized import own_quantization
from qwen_lit.progress import timed

log = logging.getLogger(__name__)
BESIDE = 2**30
"""Bytes of a device that a base leaves to all else, where it is loaded as a whole."""


def load_frozen(
    folder: Path,
    quantization: BitsAndBytesConfig | None,
    device: torch.device,
    cache: str | None = "auto",
    room: int | None = None,
    ranks: Ranks = ALONE,
) -> Any:
    """The frozen base that an adapter is trained on. Where it has a store (``store_of``), its layers are away.

    Args:
        folder: that holds its files, weights included.
        quantization: of its linears, as ``usable`` returns it; None for none.
        device: where it computes.
        cache: folder of quantised bases; ``auto`` is that of the user, for CUDA devices; None keeps none, and a base
            goes through host memory only where the device has no room for it, or several ranks of a machine share it.
        room: bytes of the device that may be used; None for all that is free.
        ranks: that all call this.

    Raises:
        UserError: the files lack weights of the model.
    """
    skeleton = None
    with timed("loading the base"):
        if device.type == "cuda" or cache not in (None, "auto"):
            skeleton = _skeleton(folder, quantization, device)
        if skeleton is not None and (blocks := _blocks(skeleton, folder, device, cache, room, ranks)) is not None:
            model = assemble(skeleton, blocks, folder, device)
            keep_apart(model)
            if computed := choose_delta_rule(model, device):
                log.info(computed)
            freeze(model)
            return model
    return load_base(folder, quantization, device)


def _skeleton(folder: Path, quantization: BitsAndBytesConfig | None, device: torch.device) -> Skeleton | None:
    """The model without weights; None where its layers are no blocks: experts, other bits, or bits of its files."""
    quantization = computing_on(device, quantization)
    config = language_model(AutoConfig.from_pretrained(folder))
    if quantization is None or not quantization.load_in_4bit or own_quantization(config) is not None:
        return None
    found = Skeleton.of(config, quantization, device, product_dtype(device))
    return None if found.layouts is None else found


def _blocks(
    skeleton: Skeleton, folder: Path, device: torch.device, cache: str | None, room: int | None, ranks: Ranks = ALONE
) -> Blocks | None:
    """The blocks of a model on the host, on all ranks or on none; None where it is loaded without."""
    layouts, base = skeleton.layouts or (), fingerprint(str(folder))
    assert base is not None
    key = key_of(base, layouts, skeleton.dtype, device)
    made = partial(quantized_layers, folder, skeleton.config, layouts, skeleton.dtype, device)
    name = _name(folder)
    tells = ranks.rank == ranks.first
    level = logging.WARNING if tells else logging.DEBUG
    found = None if cache is None else cached_blocks(cache_folder(cache), name, layouts, key, made, level)
    held = sum(layout.size for layout in layouts)
    # One rank reads and quantises for its machine, where that has memory to spare for it.
    once = ranks.several and 2 * held <= host_memory()
    state = (found is not None, skeleton.rest + held + BESIDE <= _room(device, room), once)
    there, fits, once = (all(one) for one in zip(*ranks.gathered(state), strict=True))
    if there or (fits and not once):
        return found if there else None
    log.log(logging.INFO if tells else logging.DEBUG, "the quantised base is held in host memory")
    return blocks_in_memory(layouts, key, made, ranks)


def _name(folder: Path) -> str:
    """What people call the model in a folder: Hugging Face's cache names its folders by revisions."""
    found = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return found.removeprefix("models--").replace("--", "/")


def _room(device: torch.device, room: int | None) -> int:
    """Bytes that a base may take on a device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return free if room is None else min(room, free)
