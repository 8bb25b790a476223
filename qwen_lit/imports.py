"""Libraries that import more than is used of them."""

import os
from importlib import import_module

UNCOMPILED = "TORCHDYNAMO_DISABLE"
"""The variable of torch under which ``torch.compile`` gives a function back as it is."""


def import_bitsandbytes() -> None:
    """Import bitsandbytes without torch.compile, for which it would load all of inductor: 540 modules.

    It compiles plain functions that stand in for kernels, all of which CUDA has. On the CPU those that have none, such
    as rows of odd length and the update of its optimizers, are then called as they are written. What others compile
    stays compiled.
    """
    given = os.environ.get(UNCOMPILED)
    os.environ[UNCOMPILED] = "1"
    try:
        import_module("bitsandbytes")
    finally:
        if given is None:
            del os.environ[UNCOMPILED]
        else:
            os.environ[UNCOMPILED] = given
