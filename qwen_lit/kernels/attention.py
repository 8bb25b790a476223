"""Causal attention within documents: varlen kernels on CUDA, cuDNN where all documents are equally long."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The plain twin of ``attention``: one dense mask that keeps documents apart."""
    tokens = q.shape[0]
    place = torch.arange(tokens, device=q.device)
    document = torch.bucketize(place, cu_seqlens[1:].to(q.device), right=True)
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@cache
def _varlen() -> tuple[Any, dict[str, Any]] | None:
    """torch's varlen attention and how this version of it is told to be causal and grouped."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in names else {"window_size": (-1, 0)}
    if "enable_gqa" in names:
        options["enable_gqa"] = True
    return varlen_attn, options


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """Causal attention of each document to itself alone.

    Args:
        q: ``[tokens, heads, size]``.
        k: ``[tokens, kv_heads, size]``; ``heads`` is a multiple of ``kv_heads``.
        v: as ``k``.
        cu_seqlens: int32 ``[documents + 1]``, where each document starts; the last entry is ``tokens``.
        max_seqlen: the longest document, as a Python number, so that nothing waits for the device.

    Returns:
        ``[tokens, heads, size]``.
    """
    tokens, heads, size = q.shape
    documents = cu_seqlens.numel() - 1
    if documents * max_seqlen == tokens:
        q, k, v = (one.view(documents, max_seqlen, -1, size).transpose(1, 2) for one in (q, k, v))
        with sdpa_kernel(BACKENDS, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(tokens, heads, size)
    varlen = _varlen() if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) else None
    if varlen is None:
        return attention_reference(q, k, v, cu_seqlens)
    function, options = varlen
    return function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)
