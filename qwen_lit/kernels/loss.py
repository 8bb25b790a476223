"""Cross-entropy fused with lm_head, a chunk of supervised rows at a time; its gradient is made in the forward pass.

For one row with logits ``z = h Wᵀ`` and target ``t``::

    forward   loss = log Σ_j exp(z_j) - z_t
    gradient  dz_j = exp(z_j) / Σ_k exp(z_k) - [j = t],   dh = dz W

The sum over the vocabulary is taken online (Milakov and Gimelshein, 2018, algorithm 3). As the loss is a sum, backward
multiplies the saved ``dh`` by its own gradient, a scalar. A row whose target is ``IGNORED`` has neither loss nor
gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from qwen_lit.kernels.footprint import Op, Saved
from qwen_lit.kernels.launch import jit, launches, tl

IGNORED = -100
"""Target of a row that fills up a micro-batch: what torch's cross_entropy ignores."""


def head_loss_reference(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The reference of ``head_loss``: all logits at once."""
    return cross_entropy((hidden @ head.t()).float(), targets, reduction="sum")


@jit
def _rows(logits, targets, losses, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * width
    target = tl.load(targets + row)
    counts = target >= 0
    at = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        value = tl.load(base + start + at, start + at < width, float("-inf")).to(tl.float32)
        higher = tl.maximum(top, value)
        # A lane that has seen nothing yet keeps a sum of zero.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.exp(value - shift)
        top = higher
    most = tl.max(top)
    norm = most + tl.log(tl.sum(tl.where(top == float("-inf"), 0.0, total * tl.exp(top - most))))
    loss = norm - tl.load(base + target, counts, 0.0).to(tl.float32)
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    tl.debug_barrier()
    for start in range(0, width, BLOCK):
        inside = start + at < width
        value = tl.load(base + start + at, inside, float("-inf")).to(tl.float32)
        grad = tl.exp(value - norm) - tl.where(start + at == target, 1.0, 0.0)
        tl.store(base + start + at, tl.where(counts, grad, 0.0), inside)


def _loss_and_gradient(logits: Tensor, targets: Tensor) -> Tensor:
    """Summed loss of ``[n, vocab]`` logits, which become their own gradient."""
    if launches(logits):
        losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        _rows[(len(targets),)](logits, targets, losses, logits.shape[1], BLOCK=4096, num_warps=8)
        return losses.sum()
    logits32 = logits.float()
    norm = torch.logsumexp(logits32, -1, keepdim=True)
    counts, place = targets[:, None] >= 0, targets[:, None].clamp(min=0)
    losses = torch.where(counts, norm - logits32.gather(1, place), 0.0)
    grad = torch.exp(logits32 - norm)
    grad[torch.arange(len(targets)), place[:, 0]] -= 1
    logits.copy_(torch.where(counts, grad, 0.0))
    return losses.sum()


class _HeadLoss(torch.autograd.Function):
    """Saves the gradient of its input ``[n, width]``; backward scales it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor, chunk: int) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        count = hidden.shape[0]
        buffer = torch.empty(min(chunk, count), head.shape[0], dtype=hidden.dtype, device=hidden.device)
        for start in range(0, count, chunk):
            rows = slice(start, start + chunk)
            logits = torch.mm(hidden[rows], head.t(), out=buffer[: min(chunk, count - start)])
            total += _loss_and_gradient(logits, targets[rows])
            if grads is not None:
                torch.mm(logits, head, out=grads[rows])
        ctx.save_for_backward(grads)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (saved,) = ctx.saved_tensors
        return saved * grads[0].to(saved.dtype), None, None, None


def head_loss(hidden: Tensor, head: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """Summed negative log-likelihood of ``targets``.

    Args:
        hidden: ``[n, width]``, normed hidden states of the supervised positions.
        head: ``[vocab, width]``, frozen, in the dtype of ``hidden``.
        targets: int64 ``[n]``, or ``IGNORED``.
        chunk: rows of logits that exist at a time.

    Returns:
        A float32 scalar, in nats; zero for no row.
    """
    return _HeadLoss.apply(hidden, head, targets, chunk)  # type: ignore[no-any-return]


def head_loss_op(width: int, vocabulary: int, chunk: int, size: int) -> Op:
    """What ``head_loss`` costs; its logits are gone when backward begins.

    Args:
        width: of the hidden states.
        vocabulary: rows of lm_head.
        chunk: as of ``head_loss``.
        size: bytes of a number.
    """
    saved = (Saved("gradient of the hidden states", width * size),)
    return Op("head_loss", saved, grad=width * size, fixed=chunk * vocabulary * size)
