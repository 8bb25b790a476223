"""Numbers as Lightning's automatic optimization has them around backward and the optimizer."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


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
