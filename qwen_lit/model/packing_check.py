"""A look at the model before it is trained: has a row behind another the loss that it has alone?"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import nn

from qwen_lit.data.batches import collate
from qwen_lit.errors import UserError

if TYPE_CHECKING:
    from qwen_lit.model.module import QwenModule

ROW, PARTS = 17, 4
"""Tokens of a row, and the parts of it whose losses are compared: what leaks is as often a gain as a loss, so that in
the sum over a whole row it may hide."""
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
"""Difference of the two losses, as a share of them, that rounding makes at most; what leaks makes more."""


def check_packing(module: "QwenModule") -> None:
    """Refuse to lay documents end to end in a model that lets them meet.

    Random tokens are computed alone, and behind a copy of themselves, from which a model that sees it would know them.
    It is asked through the engine that trains, in the precision that trains, with dropout off; nothing is left behind.

    Args:
        module: with its model on its device, and a trainer; all ranks call this.

    Raises:
        UserError: the losses differ by more than rounding.
    """
    assert module.model is not None
    tokens = np.random.default_rng(0).integers(0, module.config.vocab_size, ROW)
    silent = (tokens, np.zeros((0, 2), dtype=np.int64))
    cuts = np.linspace(1, ROW, PARTS + 1).astype(int)
    parts = [(tokens, np.array([[begin, end]])) for begin, end in zip(cuts, cuts[1:], strict=False)]
    device = module.device
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices), _evaluated(module.model):
        with module.trainer.precision_plugin.forward_context():
            losses = [
                module.loss_sum(move_data_to_device(collate(rows, 0), device))
                for part in parts
                for rows in ([part], [silent, part])
            ]
            tolerance = TOLERANCE[_coarsest(module.model, device)]
    alone, packed = (torch.stack(losses).view(PARTS, 2).T / np.diff(cuts)[0]).tolist()
    worst = max(zip(alone, packed, strict=True), key=lambda pair: abs(pair[1] / pair[0] - 1))
    # Where no loss is finite there is nothing to compare; the first step says so, and with which rows.
    if np.isfinite(alone).all() and not abs(worst[1] / worst[0] - 1) <= tolerance:
        raise UserError(
            f"packed rows would see each other in this {module.config.model_type} model: tokens have the loss "
            f"{worst[0]:.4f} alone and {worst[1]:.4f} behind another row; set data.packing to false"
            + ("." if module.fast is None else " and model.engine to reference.")
        )


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards each of its modules as it was."""
    before = {one: one.training for one in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for one, training in before.items():
            one.training = training


def _coarsest(model: nn.Module, device: torch.device) -> torch.dtype:
    """The dtype with the fewest digits that products are computed in."""
    kinds = {one.dtype for one in model.parameters() if one.dtype in TOLERANCE}
    if torch.is_autocast_enabled(device.type):
        kinds.add(torch.get_autocast_dtype(device.type))
    return max(kinds, key=lambda kind: torch.finfo(kind).eps)
