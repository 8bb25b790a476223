"""NEFTune: noise on the embeddings while training (Jain et al., arXiv 2310.05914)."""

from typing import Any

import torch
from torch import Tensor, nn


def add_noise(embedding: nn.Module, alpha: float) -> None:
    """Add uniform noise up to ``alpha / sqrt(tokens * width)`` to an embedding's output ``[batch, tokens, width]``.

    Args:
        embedding: gets a forward hook, which adds noise in training mode alone.
        alpha: 5 to 15 in the paper.
    """

    def noisy(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        if not module.training:
            return output
        magnitude = alpha / (output.shape[1] * output.shape[2]) ** 0.5
        return output + torch.empty_like(output).uniform_(-magnitude, magnitude)

    embedding.register_forward_hook(noisy)
