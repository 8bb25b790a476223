"""Whether a device computes products in 8 bits, and rightly."""

import torch

from qwen_lit.kernels.kinds import Passes


def refusal(passes: Passes, device: torch.device) -> str | None:
    """Why products are better in bf16 on a device; None where nothing speaks against 8 bits.

    Args:
        passes: the kinds that are asked for.
        device: that would compute them.
    """
    return None
