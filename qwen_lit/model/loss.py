"""Cross-entropy on supervised positions alone, a chunk of rows at a time."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint


def _chunk_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(head(hidden).float(), targets, reduction="sum")


def summed_loss(head: nn.Module, hidden: Tensor, targets: Tensor, chunk: int = 1024) -> Tensor:
    """Sum of the negative log-likelihood over rows, never holding more than one chunk of logits.

    Args:
        head: maps ``[n, hidden]`` to ``[n, vocab]``.
        hidden: ``[n, hidden]``, the final hidden state of each supervised position.
        targets: ``[n]`` int64, the token that follows each of them.
        chunk: rows of logits that exist at a time; backward recomputes them.

    Returns:
        A float32 scalar, in nats. Zero, with a graph, when there is no row.
    """
    total = hidden.float().sum() * 0.0
    for start in range(0, hidden.shape[0], chunk):
        rows, wanted = hidden[start : start + chunk], targets[start : start + chunk]
        if torch.is_grad_enabled():
            total = total + checkpoint(_chunk_loss, head, rows, wanted, use_reentrant=False)
        else:
            total = total + _chunk_loss(head, rows, wanted)
    return total
