"""Causal attention within documents: flash-attn where it is installed, else cuDNN for documents of one length and
torch's varlen kernels for others; one dense mask elsewhere.

Backward is that of these libraries (Dao, 2023, algorithm 2). With ``P = softmax(Q Kᵀ / √size)`` and ``O = P V``, it
computes ``P`` again from the saved log-sum-exp of each row, and::

    dV = Pᵀ dO,   dS = P ∘ (dO Vᵀ - rowsum(dO ∘ O)),   dQ = dS K / √size,   dK = dSᵀ Q / √size
"""

import inspect
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from qwen_lit.kernels.footprint import Op, Saved

FLASH = (("flash_attn.cute", (9, 10)), ("flash_attn_interface", (9,)), ("flash_attn", (8, 9, 10, 11, 12)))
"""flash-attn's packages, 4 to 2, and the major compute capabilities on which each is the one to take."""

WORDS = {"cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal"}
"""Parameters by which each of them takes the borders of documents."""

BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The reference of ``attention``: one dense mask that keeps documents apart."""
    tokens = q.shape[0]
    place = torch.arange(tokens, device=q.device)
    document = torch.bucketize(place, cu_seqlens[1:].to(q.device), right=True)
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    q, k, v = (one.transpose(0, 1)[None] for one in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@cache
def flash(major: int) -> tuple[Callable[..., Any], bool] | None:
    """flash-attn's varlen function, and whether it is ahead of cuDNN too; None where none is installed.

    Args:
        major: compute capability of the device.
    """
    for name, majors in FLASH:
        if major in majors:
            try:
                function = import_module(name).flash_attn_varlen_func
            except (ImportError, AttributeError, OSError):
                # Not installed, another one of this name, or built for another torch.
                continue
            if WORDS <= inspect.signature(function).parameters.keys():
                return function, name != "flash_attn"
    return None


@cache
def _varlen() -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """torch's varlen attention, with the options that make this version of it causal and grouped."""
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
        v: ``[tokens, kv_heads, size]``.
        cu_seqlens: int32 ``[documents + 1]``, where each document starts; the last entry is ``tokens``.
        max_seqlen: the longest document, as a Python number, so that nothing waits for the device.

    Returns:
        ``[tokens, heads, size]``.
    """
    tokens, heads, size = q.shape
    documents = cu_seqlens.numel() - 1
    half = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    ahead = flash(torch.cuda.get_device_capability(q.device)[0]) if half and size in (64, 128) else None
    equal = documents * max_seqlen == tokens
    if ahead is not None and (ahead[1] or not equal):
        return by_flash(ahead[0], q, k, v, cu_seqlens, max_seqlen)
    if equal:
        q, k, v = (one.view(documents, max_seqlen, -1, size).transpose(1, 2) for one in (q, k, v))
        with sdpa_kernel(BACKENDS, set_priority=True):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(tokens, heads, size)
    varlen = _varlen() if half else None
    if varlen is None:
        return attention_reference(q, k, v, cu_seqlens)
    function, options = varlen
    return function(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def by_flash(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int
) -> Tensor:
    """``attention`` by one of flash-attn's varlen functions."""
    out = function(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_seqlen,
        max_seqlen_k=max_seqlen,
        causal=True,
    )
    # Some versions return the log-sum-exp too.
    return out[0] if isinstance(out, tuple) else out


def attention_op(query: int, key: int, heads: int, size: int, value_counted: bool = False) -> Op:
    """What ``attention`` costs by the kernels for CUDA.

    Args:
        query: width of all query heads together.
        key: width of all key heads together, which is that of the values too.
        heads: query heads.
        size: bytes of a number.
        value_counted: an earlier operation saves v, and counts it.
    """
    saved = (
        Saved("q and k" if value_counted else "q, k and v", (query + (2 - value_counted) * key) * size),
        Saved("result", query * size),
        Saved("log-sum-exp, float32", 4 * heads),
    )
    # Backward sums dQ in float32, and makes dK and dV for every query head before those of a group are added.
    return Op("attention", saved, grad=(query + 2 * key) * size, scratch=query * (4 + 2 * size))
