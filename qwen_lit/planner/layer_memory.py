"""The memory of one layer, from the list of its operations.

Every operation says, beside its kernel, what it saves for backward and what its backward takes
(``kernels/footprint.py``); ``engine/footprint.py`` lists those of a layer. What a layer saves is the sum over them,
what its backward takes is the largest moment of a walk over them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache

from qwen_lit.engine.footprint import layer_ops
from qwen_lit.kernels.footprint import LayerSize, Op, backward_columns_of, columns_of


@dataclass(frozen=True)
class Moment:
    """Memory at one point of a step, beside what is there before the step."""

    name: str
    per_token: int
    """Bytes for each token of the micro-batch."""
    fixed: int = 0
    """Bytes however many tokens there are."""
    kept: int = 0
    """The part of ``per_token`` that the layers keep for their backward."""

    def bytes(self, tokens: int) -> int:
        """Bytes of a micro-batch of ``tokens`` tokens."""
        return self.per_token * tokens + self.fixed


@dataclass(frozen=True)
class Ends:
    """Bytes a token at the end of forward, logits and lm_head aside."""

    loss: int
    last: int
    """In the forward of the last layer."""


@dataclass(frozen=True)
class LayerMemory:
    """One layer, in bytes a token."""

    ops: tuple[Op, ...]
    input: int
    """The layer's input, all that is kept of a recomputed layer."""
    grad: int
    """The gradient of the residual stream that its backward begins with."""
    unpacked: "LayerMemory | None" = None
    """The layer as it is recomputed, if it keeps gate and up in 8 bits where it is not; None where it never does."""

    @cached_property
    def saved(self) -> int:
        """All that autograd keeps for the layer's backward."""
        return sum(op.saved_bytes for op in self.ops)

    @cached_property
    def forward(self) -> int:
        """At the end of its forward: what it saves, and results that live until its function returns."""
        return self.saved + self._unsaved(len(self.ops) - 1)

    @cached_property
    def forward_alone(self) -> int:
        """At the most of its forward where nothing is saved: at the end of SwiGLU, when what attention has read and
        the input of q, k and v are gone, and the layer's result is not made yet."""
        before = next(number for number, op in enumerate(self.ops) if op.name == "attention")
        gone = sum(op.saved_bytes for op in self.ops[:before]) + self.ops[-1].output
        if self.ops[before + 1].name == "rows that predict":
            # The copy of the chosen rows stands for attention's result.
            gone += next((one.bytes for one in self.ops[before].saved if one.name == "result"), 0)
        return self.forward - gone

    @cached_property
    def backward(self) -> tuple[Moment, ...]:
        """The backward of each operation, from the last to the first, with all that the layer has saved until it."""
        return tuple(self._moments(self.saved, len(self.ops) - 1, "backward"))

    @cached_property
    def recompute(self) -> tuple[Moment, ...]:
        """The moments of a recomputed layer's backward.

        Its input was kept, and the first norm saves that same tensor, so it is counted once.

        Operations that save nothing go backward before the forward runs again, which ends with the last that does.
        """
        if self.unpacked is not None:
            return self.unpacked.recompute
        last = max((number for number, op in enumerate(self.ops) if op.saved), default=0)
        alias = self.input if self.ops[0].saved else 0
        above = self.ops[last + 1].grad if last + 1 < len(self.ops) else 0
        before = [moment for moment in self._moments(0, len(self.ops) - 1, "backward")][: len(self.ops) - 1 - last]
        rerun = Moment("forward again", self.saved - alias + self._unsaved(last) + self.grad + above)
        return (*before, rerun, *self._moments(self.saved - alias, last, "backward", above))

    @cached_property
    def highest_backward(self) -> tuple[Moment, ...]:
        """The largest moment of ``backward`` for each number of fixed bytes."""
        return _highest(self.backward)

    @cached_property
    def highest_recompute(self) -> tuple[Moment, ...]:
        """The largest moment of ``recompute`` for each number of fixed bytes."""
        return _highest(self.recompute)

    def _unsaved(self, last: int) -> int:
        """Results that are alive after operation ``last`` although nothing saves them.

        The engine's function holds the result of attention's last linear and all that follows it until it returns.
        """
        second = max(number for number, op in enumerate(self.ops) if op.joins_residual)
        followers = (*self.ops[1:], Op("the next layer"))
        return sum(
            op.output * (not follower.saves_input) + op.beside * (number >= second)
            for number, (op, follower) in enumerate(zip(self.ops, followers, strict=True))
            if second - 1 <= number <= last
        )

    def _moments(self, live: int, last: int, name: str, grad: int = 0) -> Iterator[Moment]:
        residual = self.grad
        for op in reversed(self.ops[: last + 1]):
            yield Moment(f"{name} of {op.name}", live + residual + grad + op.grad + op.scratch, op.fixed)
            live -= op.saved_bytes
            residual, grad = (op.grad, 0) if op.joins_residual else (residual, op.grad)


def _highest(moments: tuple[Moment, ...]) -> tuple[Moment, ...]:
    most: dict[int, Moment] = {}
    for one in moments:
        if one.fixed not in most or one.per_token > most[one.fixed].per_token:
            most[one.fixed] = one
    return tuple(most.values())


@lru_cache(4096)
def layer_memory(
    layer: LayerSize, size: int, columns_back: int, reached: bool, last: bool, piece: int = 0, packs: bool = False
) -> LayerMemory:
    """The memory of a layer; arguments as of ``layer_ops``, ``packs`` where the layer is not recomputed."""
    ops = layer_ops(layer, size, columns_back, reached, last, piece, packs)
    hidden = layer.hidden * size
    unpacked = layer_memory(layer, size, columns_back, reached, last, piece) if packs else None
    return LayerMemory(ops, hidden, hidden + backward_columns_of(layer.groups[3]) * size, unpacked)


def narrow_bytes(layer: LayerSize) -> tuple[int, ...]:
    """Bytes of each group's weights in 8 bits, of those that have products so."""
    return tuple(
        sum(linear.inputs * linear.outputs for linear in group) for group in layer.groups if group[0].passes.narrow
    )


def augmented_bytes(layer: LayerSize, size: int) -> tuple[int, ...]:
    """Bytes of each augmented weight of a layer, in the buffer that it is dequantised into or in memory of its own;
    products in 8 bits need none."""
    found = []
    for number, group in enumerate(layer.groups):
        if group[0].passes.forward.narrow and group[0].passes.backward.narrow:
            continue
        columns = columns_of(group)
        one = number == 0 and all(linear.quantized for linear in group)
        for part in [group] if one else [(linear,) for linear in group]:
            found.append((sum(linear.outputs for linear in part) + columns) * (part[0].inputs + columns) * size)
    return tuple(found)
