"""The linears of a model as the engine reads them, and their weights dequantised into augmented weights.

A weight is dequantised into a matrix with free space for the adapter on its right and below it, the augmented weight::

    [ W   sB ]
    [ A      ]

Linears of one input can share one, one below the other.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor, nn

from qwen_lit.kernels.footprint import LinearSize
from qwen_lit.kernels.kinds import WIDE, Passes
from qwen_lit.kernels.nf4 import can_dequantize, dequantize


class Workspace:
    """One buffer per device and dtype for the weight that is in use; it grows to the largest."""

    def __init__(self) -> None:
        self.buffers: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        self.held: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        """Of the buffers, those that recordings use: their memory stays taken, so others would only stand beside."""

    def get(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A matrix that the next call may overwrite."""
        key, count = (device, dtype), torch.Size(shape).numel()
        buffer = self.buffers.get(key)
        if buffer is None or buffer.numel() < count:
            # The smaller buffer is given up before the larger one is taken.
            self.buffers.pop(key, None)
            buffer = None
            # A buffer made in validation's inference mode could not be used in training.
            with torch.inference_mode(False):
                buffer = self.buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)

    def clear(self) -> None:
        """Give the buffers up, but for those that are held."""
        self.buffers = dict(self.held)


@dataclass
class LoraLinear:
    """One linear of a group, read from transformers' and PEFT's own modules."""

    weight: Tensor
    """``[out, in]``, or bitsandbytes' packed 4-bit weight."""
    bias: Tensor | None
    a: Tensor | None
    """``[r, in]``, trained; None for a linear without an adapter."""
    b: Tensor | None
    """``[out, r]``, trained."""
    scale: float
    dropout: float
    a_compute: Tensor | None = None
    """``a`` in the dtype of the products, where a copy is kept."""
    b_compute: Tensor | None = None
    """``b`` in the dtype of the products, where a copy is kept."""
    resident: Tensor | None = None
    """Augmented weight kept in memory between steps, or None. Linears that share one store it on the first of them."""
    workspace: Workspace = field(default_factory=Workspace)
    """Where the weight is dequantised for a product. Linears share one, as only one weight is in use at a time."""
    arrive: Callable[[], None] | None = None
    """Brings the weight to hand where it is not always on the device. It is called before each use: nothing that is
    kept may be a view of a weight, whose memory the next layer takes."""
    passes: Passes = WIDE
    """In what its products are computed; all linears of a group have the same."""
    scales: Any = None
    """``narrow.ScaleStore`` of the engine, where a product is in 8 bits."""
    quantized: bool = field(init=False)
    """Whether the weight is in 4 bits."""
    out: int = field(init=False)
    """Width of the output."""
    width: int = field(init=False)
    """Width of the input."""
    rank: int = field(init=False)
    """0 without an adapter."""

    def __post_init__(self) -> None:
        """Read the sizes once: they are asked for a hundred times in a pass over a layer."""
        state = self.quant_state
        self.quantized = state is not None
        self.out, self.width = map(int, self.weight.shape if state is None else state.shape)
        self.rank = 0 if self.a is None else self.a.shape[0]

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B in the dtype of the products."""
        assert self.a is not None and self.b is not None
        if self.a_compute is not None and self.b_compute is not None:
            return self.a_compute, self.b_compute
        return self.a.detach().to(dtype), self.b.detach().to(dtype)

    @property
    def quant_state(self) -> Any:
        """bitsandbytes' quantisation state; None for a plain weight."""
        return getattr(self.weight, "quant_state", None)


def read_linear(
    module: nn.Module,
    training: bool,
    compute: Mapping[int, Tensor] = MappingProxyType({}),
    resident: Mapping[int, Tensor] = MappingProxyType({}),
    workspace: Workspace | None = None,
    arrive: Callable[[], None] | None = None,
) -> LoraLinear:
    """What a linear computes, from a plain linear, bitsandbytes' ``Linear4bit`` or PEFT's LoRA layer around either.

    Args:
        module: the layer as it stands in the model.
        training: whether dropout is on.
        compute: copies of A and B in the dtype of the products, by the ``id`` of the parameter.
        resident: augmented weights that are kept, by the ``id`` of the weight.
        workspace: where weights are dequantised; one of its own where it is not given.
        arrive: as of ``LoraLinear``.
    """
    base: Any = getattr(module, "base_layer", module)
    workspace = Workspace() if workspace is None else workspace
    kept = resident.get(id(base.weight))
    plain = LoraLinear(base.weight, base.bias, None, None, 1.0, 0.0, None, None, kept, workspace, arrive)
    adapters: Any = getattr(module, "active_adapters", None)
    if (
        base is module
        or not adapters
        or getattr(module, "disable_adapters", False)
        or getattr(module, "merged", False)
    ):
        return plain
    layer: Any = module
    name = adapters[0]
    p = getattr(layer.lora_dropout[name], "p", 0.0) if training else 0.0
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    copies = compute.get(id(a)), compute.get(id(b))
    return LoraLinear(base.weight, base.bias, a, b, layer.scaling[name], p, *copies, kept, workspace, arrive)


def size_of(linear: LoraLinear, quantized: bool | None = None) -> LinearSize:
    """Its sizes alone.

    Args:
        linear: of a model, which may be on the meta device.
        quantized: whether it will be held in 4 bits; as it is, where this is not given.
    """
    held = linear.quantized if quantized is None else quantized
    return LinearSize(linear.width, linear.out, linear.rank, linear.dropout, held)


def lora_columns(linears: list[LoraLinear]) -> int:
    """Columns beside a group's input for its product with every A: whole multiples of 16 bytes in bf16."""
    return -(-sum(linear.rank for linear in linears) // 8) * 8


def forward_columns(linears: list[LoraLinear]) -> int:
    """Free columns that a group's input is to have: none where its product is in 8 bits."""
    return 0 if linears[0].passes.forward.narrow else lora_columns(linears)


def backward_columns(linears: list[LoraLinear]) -> int:
    """Free columns that the gradient of a group's last output is to have: none where its product is in 8 bits."""
    return 0 if linears[0].passes.backward.narrow else lora_columns(linears)


def parts_of(linears: list[LoraLinear], merged: bool) -> list[list[LoraLinear]]:
    """Which linears share an augmented weight: all of them where ``merged`` is true and every weight is in 4 bits;
    else each linear has its own."""
    if merged and all(linear.quantized for linear in linears):
        return [linears]
    return [[linear] for linear in linears]


def augmented_weight(part: list[LoraLinear], dtype: torch.dtype, extra: int, held: bool = False) -> Tensor:
    """``[out of all + extra, in + extra]`` with the weights at its top left; its other numbers are undefined.

    Args:
        part: with 4-bit weights of one width.
        dtype: of the products.
        extra: ``lora_columns`` of the group.
        held: in memory of its own; otherwise in the workspace, which the next call overwrites.
    """
    kept = part[0].resident
    if kept is not None and kept.dtype == dtype:
        return kept
    device, width = part[0].weight.device, part[0].width
    shape = (sum(linear.out for linear in part) + extra, width + extra)
    whole = torch.empty(shape, dtype=dtype, device=device) if held else part[0].workspace.get(shape, dtype, device)
    start = 0
    for linear in part:
        if linear.arrive is not None:
            linear.arrive()
        state, inner = linear.quant_state, whole[start : start + linear.out, :width]
        start += linear.out
        if (
            can_dequantize(linear.weight, state)
            and state.dtype == dtype
            and (inner.is_contiguous() or width % state.blocksize == 0)
        ):
            dequantize(linear.weight, state, inner)
        else:
            inner.copy_(dequantize_4bit(linear.weight, state))
    return whole


def full_weight(part: list[LoraLinear], dtype: torch.dtype) -> Tensor:
    """The weights ``[out of all, in]`` in ``dtype``; for 4-bit ones in the workspace, which the next call
    overwrites."""
    if not part[0].quantized:
        (linear,) = part
        return linear.weight if linear.weight.dtype == dtype else linear.weight.to(dtype)
    return augmented_weight(part, dtype, 0)[: sum(linear.out for linear in part), : part[0].width]
