"""What a run has trained, lent to be asked once training is over."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from qwen_lit.model.load import read_adapted
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.settle import settle

TOKENS = 4096
"""Of all prompts at once, answers included, for whose keys and values there is room."""


def can_be_asked(module: QwenModule, device: torch.device) -> bool:
    """Whether what was trained can answer prompts in little time: on a CPU they take longer than they are worth, and
    what is not held in 4 bits, or in stacks of matrices, does not come back from the CPU.
    """
    held = module.held_weights(device).values()
    return device.type == "cuda" and all(one.kind in ("nf4", "fp4") and one.matrices == 1 for one in held)


@contextmanager
def as_trained(
    module: QwenModule, adapter: Path, device: torch.device, weights: dict[str, torch.Tensor] | None = None
) -> Iterator[Any]:
    """The adapter on its base as it is held in training, on a device; layers that do not fit are streamed.

    Args:
        module: whose model is asked where it is loaded; else it names the base.
        adapter: folder of the adapter that is put on a base that is not loaded yet.
        device: where it answers.
        weights: the trained ones that a loaded model gets meanwhile, by their names in ``QwenModule``; None for its
            own.
    """
    if module.model is None:
        base = module.load_base(device)
        settle(base, TOKENS, adapter)
        yield read_adapted(base, adapter)
        return
    training = module.model.training
    with holding(module, weights):
        # Lightning has moved it to the CPU.
        module.to(device).model.eval()  # type: ignore[union-attr]
        settle(module.model.get_base_model(), TOKENS)
        try:
            yield module.model
        finally:
            module.model.train(training)
            module.to("cpu")
            module.release_memory()


@contextmanager
def holding(module: QwenModule, weights: dict[str, torch.Tensor] | None) -> Iterator[None]:
    """Let a module have other trained weights for a while; its own are put back bit for bit.

    Args:
        module: to which they are lent.
        weights: all of its trained ones, by its names; None changes nothing.
    """
    if weights is None:
        yield
        return
    own = {name: tensor.to("cpu", copy=True) for name, tensor in module.state_dict().items()}
    module.load_state_dict(weights)
    try:
        yield
    finally:
        module.load_state_dict(own)
