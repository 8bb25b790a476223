"""A base whose files hold quantised weights, beside the model that they are loaded into."""

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn

from qwen_lit.errors import UserError
from qwen_lit.prequantized import names_on_disk, own_quantization, stored_in


def check_stored(folder: Path, model: Any) -> None:
    """Reject files whose quantised weights are not those that config.json and the model have, from their headers.

    Args:
        folder: of the base, with its weights.
        model: the base's, without weights.

    Raises:
        UserError: they cannot be loaded, or would be loaded as noise.
    """
    stored, said = stored_in(folder), own_quantization(model.config)
    if said is None and not stored:
        return
    if said is None:
        raise UserError(
            f"model_name_or_path: the files of {folder} hold weights quantised by bitsandbytes, and its config.json "
            "does not say so; fetch config.json again."
        )
    if not stored:
        raise UserError(
            f"model_name_or_path: config.json of {folder} speaks of weights quantised by bitsandbytes, and its files "
            "hold none; fetch them again."
        )
    shapes = _linear_shapes(model)
    for own, names in names_on_disk(folder, stored).items():
        for name in names:
            if name not in stored:
                continue
            if own not in shapes:
                raise UserError(
                    f"model_name_or_path: {name} of {folder} is held in {stored[name].kind}, and transformers has no "
                    "linear for it that could be; give the original bf16 model."
                )
            if stored[name].shape != shapes[own]:
                raise UserError(
                    f"model_name_or_path: {name} of {folder} is {list(stored[name].shape)}, and its config.json makes "
                    f"it {list(shapes[own])}; fetch the model again."
                )


def plain_linears(folder: Path, model: nn.Module) -> list[str]:
    """The linears whose weights the files of a quantised base hold as they were, a tied head included.

    Args:
        folder: of the base, with its weights.
        model: the base's, without weights.
    """
    stored = stored_in(folder)
    names = names_on_disk(folder, stored)
    plain = [one for one in _linear_shapes(model) if not all(name in stored for name in names.get(one, (one,)))]
    return [one.removesuffix(".weight") for one in plain]


def give_dtype(model: Any, dtype: torch.dtype) -> None:
    """Give a model that is quantised in its files the dtype that was asked for: transformers leaves it in theirs."""
    for module in model.modules():
        quantized = module.weight if isinstance(module, Linear4bit | Linear8bitLt) else None
        if isinstance(module, Linear4bit):
            # Else weights would be rounded to the dtype of the original on the way.
            module.weight.quant_state.dtype = dtype  # type: ignore[attr-defined]
        for parameter in module.parameters(recurse=False):
            if parameter is not quantized and parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights of all linears, which is what bitsandbytes takes, by name."""
    return {f"{name}.weight": tuple(one.weight.shape) for name, one in model.named_modules() if type(one) is nn.Linear}
