"""The trained parameters of a module: what a checkpoint holds of it, and how that is put back."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from qwen_lit.errors import UserError
from qwen_lit.export.adapter import saved_name


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by their names in the module."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_same(trained: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose parameters are not those of the configured adapter.

    Args:
        trained: of the module, by name.
        state: of the checkpoint, by name.

    Raises:
        UserError: names or shapes differ.
    """
    wrong = sorted(set(trained) ^ set(state))
    wrong += sorted(name for name in set(trained) & set(state) if trained[name].shape != state[name].shape)
    if wrong:
        raise UserError(
            f"the checkpoint's adapter differs from the configured one at {wrong[0]} and {len(wrong) - 1} more; "
            "resume with the lora_config it was trained with, or give another output_dir."
        )


def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy weights into the trained parameters of a module.

    Args:
        module: whose parameters are written.
        tensors: by the names of an adapter's file.
    """
    with torch.no_grad():
        for name, parameter in trained_parameters(module).items():
            parameter.copy_(tensors[saved_name(name)])
