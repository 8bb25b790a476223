"""What an operation of the engine costs in memory: the classes in which each one states it, beside its kernel."""

from dataclasses import dataclass

from qwen_lit.kernels.kinds import WIDE, Passes


@dataclass(frozen=True)
class LinearSize:
    """One linear of a layer, by its sizes alone."""

    inputs: int
    outputs: int
    rank: int = 0
    """Of its LoRA adapter; 0 without one."""
    dropout: float = 0.0
    quantized: bool = True
    """Held by bitsandbytes in 4 bits, so that a dequantised copy is needed for a product."""
    passes: Passes = WIDE
    """In what its products are computed; all linears of a group have the same."""


@dataclass(frozen=True)
class LayerSize:
    """One decoder layer, by its sizes alone: attention, then a SwiGLU MLP."""

    groups: tuple[tuple[LinearSize, ...], ...]
    """Linears that share an input: (q, k, v), (o,), (gate, up), (down,)."""
    heads: int
    """Query heads of attention."""
    head_norm: bool = False
    """Each head of q and k has an RMSNorm of its own, as in Qwen3."""

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.groups[0][0].inputs


@dataclass(frozen=True)
class Saved:
    """A tensor that autograd keeps for the backward of an operation."""

    name: str
    bytes: int
    """A token, the columns beside it in the same allocation included."""


@dataclass(frozen=True)
class Op:
    """One operation of a layer. All sizes are bytes a token of the micro-batch unless they say otherwise.

    A tensor that two operations save is counted with the earlier one, whose backward is the later one to need it.
    """

    name: str
    saved: tuple[Saved, ...] = ()
    """What autograd keeps from its forward until its backward is done."""
    output: int = 0
    """Its result, where no operation saves that: it is gone when the layer's forward is."""
    grad: int = 0
    """The gradient of its input, which its backward makes."""
    scratch: int = 0
    """What its backward takes beside gradients and saved tensors, at its peak."""
    fixed: int = 0
    """Scratch memory of the backward in bytes, however many tokens there are."""
    saves_input: bool = False
    """The result of the operation before it is among what it saves."""
    joins_residual: bool = False
    """It begins a sublayer: its backward reads the gradient of the residual stream too, and makes the next one."""
    beside: int = 0
    """Its result in 8 bits, which no operation saves."""

    @property
    def saved_bytes(self) -> int:
        """Bytes a token of all that it saves."""
        return sum(tensor.bytes for tensor in self.saved)


def columns_of(group: tuple[LinearSize, ...]) -> int:
    """Numbers beside a group's input for its product with every A: whole multiples of 16 bytes in bf16."""
    return -(-sum(linear.rank for linear in group) // 8) * 8


def forward_columns_of(group: tuple[LinearSize, ...]) -> int:
    """Of ``columns_of``, those that the group's input has: none where its product is in 8 bits."""
    return 0 if group[0].passes.forward.narrow else columns_of(group)


def backward_columns_of(group: tuple[LinearSize, ...]) -> int:
    """Of ``columns_of``, those that the gradient of its last output has: none where its product is in 8 bits."""
    return 0 if group[0].passes.backward.narrow else columns_of(group)


def eight_bits(columns: int) -> int:
    """Bytes of a row in 8 bits, its float32 scale included."""
    return columns + 4


def narrow_gradient(group: tuple[LinearSize, ...]) -> int:
    """Bytes a token of the gradients of a group's outputs in 8 bits, where its backward makes them."""
    return eight_bits(sum(linear.outputs for linear in group)) if group[0].passes.backward.narrow else 0


def rank_of(group: tuple[LinearSize, ...]) -> int:
    """Ranks of all linears of a group together."""
    return sum(linear.rank for linear in group)


def masks(group: tuple[LinearSize, ...]) -> bool:
    """Whether the adapters of a group drop out."""
    return any(linear.rank and linear.dropout for linear in group)
