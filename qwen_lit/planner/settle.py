"""Where the layers of a model are that is asked and not trained: on the device as many as fit, the others streamed."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from qwen_lit.engine.policy import spread
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import RESIDUAL_INITS
from qwen_lit.export.folder import read_json
from qwen_lit.families.layer import value_of
from qwen_lit.families.table import family_of
from qwen_lit.frozen.ring import SLOTS
from qwen_lit.frozen.store import store_of
from qwen_lit.planner.measure import free_memory, pass_seconds

log = logging.getLogger(__name__)
BESIDE = 2**29
"""Bytes for the activations of a prompt and its logits."""


def settle(base: Any, tokens: int, adapter: Path | None = None) -> None:
    """Place the layers of a model's store, if it has one, so that it can be asked, and say what is streamed.

    Args:
        base: transformers' model, whose other weights are on the device.
        tokens: of all conversations at once, answers included, whose keys and values have to fit beside the layers.
        adapter: folder of the one that is put on the base after this; None for none, or one that is on it already.

    Raises:
        UserError: the adapter needs all layers on the device, which has no room for them.
    """
    store = store_of(base)
    if store is None:
        return
    if adapter is not None and (reason := reads_base(read_json(adapter / "adapter_config.json"))):
        hold_all(base, f"{adapter} has {reason}")
        return
    room = free_bytes(store.device) - cache_bytes(base.config, tokens) - BESIDE
    store.place(streamed_in(store.sizes, room))
    if store.streamed:
        count, seconds = len(store.streamed), pass_seconds(store)
        log.info("%d of %d layers are streamed; about %.2g s a token", count, len(store.layers), seconds)


def hold_all(base: nn.Module, why: str) -> None:
    """Place all layers of a model's store, if it has one, on the device for good.

    Args:
        base: transformers' model.
        why: they have to be there, as the beginning of a sentence: "olora reads the base's weights".

    Raises:
        UserError: they do not fit.
    """
    store = store_of(base)
    if store is None:
        return
    try:
        store.place(())
    except torch.OutOfMemoryError as error:
        size = sum(store.sizes) / 2**30
        raise UserError(
            f"{why}, so all layers have to be on the device: {size:.1f} GiB, which it has no room for; change that, "
            "or take a larger device or a smaller model."
        ) from error


def reads_base(lora: Any) -> str:
    """What makes an adapter read the base's weights when it is put on, in words; empty where nothing does.

    Args:
        lora: PEFT's config, or what its file holds.
    """
    start = str(value_of(lora, "init_lora_weights")).lower()
    if start.startswith(RESIDUAL_INITS):
        return f"init_lora_weights: {start}, which reads and changes the base's weights"
    return "use_dora: true, which reads the base's weights" if value_of(lora, "use_dora") else ""


def free_bytes(device: torch.device) -> int:
    """Bytes that this process may still take on a device."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    return free_memory(device) - torch.cuda.memory_allocated(device)


def cache_bytes(config: Any, tokens: int) -> int:
    """Bytes of the keys and values of so many tokens, in 16 bits."""
    layers = family_of(config).layers(config)
    return 4 * tokens * sum(layer.key_heads * layer.head_size for layer in layers)


def least_bytes(config: Any, blocks: Sequence[int], tokens: int) -> int:
    """Bytes that layers take on the device, with room for a conversation, where all of them are streamed.

    Args:
        config: of the model.
        blocks: bytes of each layer.
        tokens: of the conversation.
    """
    return SLOTS * max(blocks) + cache_bytes(config, tokens) + BESIDE


def streamed_in(sizes: Sequence[int], room: int) -> frozenset[int]:
    """The layers that are streamed so that the others, and the slots, fit.

    Args:
        sizes: bytes of each layer.
        room: bytes for all of it.
    """
    for count in range(len(sizes) + 1):
        streamed = frozenset(spread(len(sizes), count))
        slots = SLOTS * max((sizes[number] for number in streamed), default=0)
        if slots + sum(size for number, size in enumerate(sizes) if number not in streamed) <= room:
            return streamed
    return frozenset(range(len(sizes)))
