"""Finds at the start of a run which products are hurt most by 8 bits, and stay in bf16."""

from collections.abc import Callable
from dataclasses import replace

import torch
from lightning.fabric.utilities import move_data_to_device

from qwen_lit.data.batches import Batch, prefix
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.footprint import layer_sizes
from qwen_lit.engine.probe import damages, expected, work_of, worst
from qwen_lit.engine.products import Products
from qwen_lit.kernels.footprint import LayerSize
from qwen_lit.model.products import ProductsInUse, places

TOKENS = 2048
"""Of a micro-batch, those that are looked at: damage is a mean over tokens, and changes little with more of them."""


def probed(
    products: ProductsInUse, engine: FastEngine, batch: Batch, agree: Callable[[ProductsInUse], ProductsInUse]
) -> ProductsInUse:
    """The products with those that stay in bf16; as they are, where none are to be looked for.

    Args:
        products: that a run begins with.
        engine: of its model, whose layers are placed.
        batch: the run's own rows, on the CPU.
        agree: what all ranks take of what each has found.
    """
    share = products.share_left
    if not share:
        return products
    device = engine.trained[0].device
    # While Lightning builds the model, new tensors go to the device unless they say otherwise.
    with torch.device("cpu"):
        part = prefix(batch, TOKENS)
    work = work_of(layer_sizes(engine.model))
    found = worst(damages(engine, move_data_to_device(part, device), products.products), work, share)
    return agree(replace(products, wide=found, among=len(work)))


def told(products: ProductsInUse) -> str:
    """One line on what stays in bf16.

    Args:
        products: as ``probed`` gives them.
    """
    left = products.wide or ()
    where = f": {places(left)}" * bool(left)
    return f"{products.used} leaves {len(left)} of {products.among} products in bf16{where}"


def estimated(products: ProductsInUse, layers: tuple[LayerSize, ...]) -> Products:
    """The products by which memory and time are estimated before a probe.

    Args:
        products: in use.
        layers: sizes of all layers.
    """
    if not products.share_left:
        return products.products
    return Products(products.used, frozenset(expected(work_of(layers), products.share_left)))
