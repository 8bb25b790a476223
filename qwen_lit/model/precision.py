"""In which precision is trained: what a family bears, and where Lightning's automatic optimization leaves autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.families.layer import Family


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor another default dtype than float32.

    Lightning calls ``training_step`` within the context of ``trainer.precision``. Backward would run under its
    autocast, where each operation already has the dtype of its forward, and new tensors, those that are logged among
    them, would have the dtype of a bf16-true model.

    Args:
        device: whose autocast is left.
    """
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_default_dtype(default)


def check_precision(family: Family, precision: str, quantization: BitsAndBytesConfig | None) -> None:
    """Refuse float16 where a family's activations leave its range, and every gradient is NaN.

    Args:
        family: of the model.
        precision: of the trainer.
        quantization: of the base.

    Raises:
        UserError: with the key that asks for it.
    """
    if family.float16:
        return
    asked = {"trainer.precision": (precision, "bf16-mixed")} if precision.startswith("16") else {}
    if quantization and quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype == torch.float16:
        asked["model.quantization_config.bnb_4bit_compute_dtype"] = ("float16", "bfloat16")
    for key, (value, instead) in asked.items():
        raise UserError(
            f"{key} is {value}, but the gradients of a {family.model_type} model are not finite in float16; set it to "
            f"{instead}, on a card that has bfloat16."
        )
