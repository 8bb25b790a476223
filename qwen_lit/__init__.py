"""Teach a Qwen model from instructions on one's own GPU: 4-bit LoRA fine-tuning with PyTorch Lightning."""

import logging
import os
import platform
import sys

__version__ = "0.1.0"

# Between blocks of fixed segments lie gaps that no plan can know; segments that grow leave none. Drivers under WSL can
# fail to make them (pytorch/pytorch#192330).
if (
    sys.platform == "linux"
    and "microsoft" not in platform.release().lower()
    and not os.environ.get("PYTORCH_CUDA_ALLOC_CONF")
):
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# bitsandbytes warns at import that an optional CPU kernel is absent; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
