"""Loading a base: from its blocks where its layers are linears in 4 bits, and else as transformers does."""

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, BitsAndBytesConfig

from qwen_lit.frozen.assemble import Skeleton, assemble
from qwen_lit.frozen.cache import MEMORY, blocks_in_memory, cache_folder, cached_blocks, key_of
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.quantize import quantized_layers
from qwen_lit.frozen.store import store_of
from qwen_lit.hardware import product_dtype
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
) -> Any:
    """The frozen base that an adapter is trained on. Where it has a store (``store_of``), its layers are away.

    Args:
        folder: that holds its files, weights included.
        quantization: of its linears, as ``usable`` returns it; None for none.
        device: where it computes.
        cache: folder of quantised bases; ``auto`` is that of the user, for CUDA devices; None keeps none, and a base
            goes through host memory only where the device has no room for it.
        room: bytes of the device that may be used; None for all that is free.

    Raises:
        UserError: the files lack weights of the model.
    """
    skeleton = None
    with timed("loading the base"):
        if device.type == "cuda" or cache not in (None, "auto"):
            skeleton = _skeleton(folder, quantization, device)
        if skeleton is not None and (blocks := _blocks(skeleton, folder, device, cache, room)) is not None:
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
    skeleton: Skeleton, folder: Path, device: torch.device, cache: str | None, room: int | None
) -> Blocks | None:
    """The blocks of a model on the host; None where it is loaded without."""
    layouts, base = skeleton.layouts or (), fingerprint(str(folder))
    assert base is not None
    key = key_of(base, layouts, skeleton.dtype, device)
    made = partial(quantized_layers, folder, skeleton.config, layouts, skeleton.dtype, device)
    name = _name(folder)
    if cache is not None:
        found = cached_blocks(cache_folder(cache), name, layouts, key, made)
        if found is not None:
            return found
    size = skeleton.rest + sum(layout.size for layout in layouts)
    if size + BESIDE <= _room(device, room):
        return None
    if int(os.environ.get("LOCAL_WORLD_SIZE") or 1) > 1 and MEMORY.is_dir():
        # One copy for the ranks of this machine; ``nameless`` lets it go with the last of them.
        return cached_blocks(_shared(), name, layouts, key, made)
    log.info("the quantised base is held in host memory")
    return blocks_in_memory(layouts, key, made)


def _name(folder: Path) -> str:
    """What people call the model in a folder: Hugging Face's cache names its folders by revisions."""
    found = folder.parent.parent.name if folder.parent.name == "snapshots" else folder.name
    return found.removeprefix("models--").replace("--", "/")


def _room(device: torch.device, room: int | None) -> int:
    """Bytes that a base may take on a device."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return free if room is None else min(room, free)


def _shared() -> Path:
    """Where the ranks of one run share memory."""
    return MEMORY / f"qwen_lit-{os.getuid()}-{os.environ.get('MASTER_PORT', '')}"


def nameless(base: nn.Module) -> None:
    """Let memory that ranks share go with them: every one of them has mapped it by now."""
    store = store_of(base)
    path = None if store is None else store.blocks.path
    if path is not None and path.is_relative_to(MEMORY):
        for file in (path, path.with_suffix(".lock")):
            file.unlink(missing_ok=True)
