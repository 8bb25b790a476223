"""A base of random weights without a checkpoint: a shape of any size is measured where no disk has room for its files.

Its decoder layers are made and quantised one by one into host memory, as ``fit`` holds a base without a cache there.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from random_base import config_of, linears_on_disk, random_blocks, write_weights
from transformers import BitsAndBytesConfig

from qwen_lit.frozen.assemble import Skeleton, assemble
from qwen_lit.frozen.cache import blocks_in_memory
from qwen_lit.model.load import freeze, language_model


def made_base(shape: str, quantization: BitsAndBytesConfig, device: torch.device, layers: int | None = None) -> Any:
    """A frozen base of which every layer is away.

    Args:
        shape: as of ``random_base.config_of``.
        quantization: 4 bits.
        device: where it computes; random numbers are made and quantised there.
        layers: instead of the shape's.
    """
    torch.manual_seed(0)
    config = config_of(shape, layers)
    skeleton = Skeleton.of(language_model(config), quantization, device, torch.bfloat16)
    layouts = skeleton.layouts
    if layouts is None:
        raise SystemExit(f"the layers of {shape} are no linears in 4 bits; write it with random_base.py")
    blocks = blocks_in_memory(layouts, shape, partial(random_blocks, layouts, device))
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        write_weights(Path(folder), config, linears_on_disk(config), device)
        base = assemble(skeleton, blocks, Path(folder), device)
    freeze(base)
    return base
