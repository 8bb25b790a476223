"""Teach a Qwen model from instructions on one's own GPU: 4-bit LoRA fine-tuning with PyTorch Lightning."""

import logging

__version__ = "0.1.0"

# bitsandbytes warns at import that an optional CPU kernel is absent; nothing here needs it.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
