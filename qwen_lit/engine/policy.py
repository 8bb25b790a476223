"""How the engine saves memory: one policy for each layer, and a few for the whole model."""

from dataclasses import dataclass
from enum import Enum
from typing import Literal

KeptName = Literal["bf16", "int8"]
"""How gate and up are kept for backward: as they are, or in 8 bits."""


class Policy(Enum):
    """What becomes of the tensors that a layer's backward needs, between its forward and its backward."""

    KEEP = "keep"
    """They stay on the device."""
    RECOMPUTE = "recompute"
    """Only the layer's input stays; its forward runs again in backward (Chen et al., 2016)."""
    RECOMPUTE_INPUT_ON_HOST = "recompute, input on the host"
    """As RECOMPUTE, and the input waits in pinned host memory."""
    OFFLOAD = "offload"
    """They wait in pinned host memory; those of the last such layer, with which backward begins, stay."""

    @property
    def recomputes(self) -> bool:
        """Whether the layer's forward runs twice."""
        return self in (Policy.RECOMPUTE, Policy.RECOMPUTE_INPUT_ON_HOST)

    @property
    def uses_host(self) -> bool:
        """Whether anything of the layer waits in host memory."""
        return self in (Policy.OFFLOAD, Policy.RECOMPUTE_INPUT_ON_HOST)


@dataclass(frozen=True)
class Policies:
    """How the engine saves memory. Two of these change what is computed: ``mlp_piece`` draws other dropout masks, and
    ``kept`` rounds in backward."""

    layers: tuple[Policy, ...]
    """The policy of each decoder layer, from the first one on."""
    resident: frozenset[int] = frozenset()
    """Numbers of the layers whose 4-bit weights are held dequantised too."""
    loss_chunk: int = 2048
    """Rows of logits that exist at a time."""
    offload_embedding: bool = False
    """Whether the embedding waits on the host."""
    mlp_piece: int = 0
    """Tokens of which the MLP holds the activations at a time; 0 for all."""
    streamed: frozenset[int] = frozenset()
    """Numbers of the layers whose 4-bit weights wait on the host and come to the device for each pass over them."""
    offload_head: bool = False
    """Whether lm_head waits on the host, and is on the device from the last layer's forward to the loss alone."""
    kept: KeptName = "bf16"
    """How gate and up are kept; int8 holds for layers that are not recomputed, whose backward is far from their
    forward."""

    @staticmethod
    def keep_all(layers: int) -> "Policies":
        """Every layer keeps what its backward needs."""
        return Policies((Policy.KEEP,) * layers)

    @staticmethod
    def of_counts(
        layers: int,
        recompute: int = 0,
        offload_activations: int = 0,
        offload_inputs: bool = False,
        resident: int = 0,
        loss_chunk: int = 2048,
        offload_embedding: bool = False,
        mlp_piece: int = 0,
        streamed: frozenset[int] = frozenset(),
        offload_head: bool = False,
        kept: KeptName = "bf16",
    ) -> "Policies":
        """The policies in which layers of one kind are placed as suits the engine best.

        Args:
            layers: of the model.
            recompute: layers that are recomputed: the first ones that are not offloaded, as backward reaches them
                when the others have given up their memory.
            offload_activations: layers whose saved tensors wait on the host, spread evenly, so that each copy has as
                much computation beside it.
            offload_inputs: the inputs of recomputed layers wait on the host too.
            resident: the first so many layers are held dequantised.
            loss_chunk: as of ``Policies``.
            offload_embedding: as of ``Policies``.
            mlp_piece: as of ``Policies``.
            streamed: as of ``Policies``.
            offload_head: as of ``Policies``.
            kept: as of ``Policies``.
        """
        offloaded = spread(layers, offload_activations)
        left = [number for number in range(layers) if number not in offloaded][:recompute]
        recomputes = Policy.RECOMPUTE_INPUT_ON_HOST if offload_inputs else Policy.RECOMPUTE
        chosen = {**dict.fromkeys(offloaded, Policy.OFFLOAD), **dict.fromkeys(left, recomputes)}
        return Policies(
            tuple(chosen.get(number, Policy.KEEP) for number in range(layers)),
            frozenset(range(resident)),
            loss_chunk,
            offload_embedding,
            mlp_piece,
            streamed,
            offload_head,
            kept,
        )

    def count(self, *policies: Policy) -> int:
        """Layers with one of these policies."""
        return sum(policy in policies for policy in self.layers)

    def packs(self, number: int) -> bool:
        """Whether a layer keeps gate and up in 8 bits."""
        return self.kept == "int8" and not self.layers[number].recomputes

    @property
    def recomputed(self) -> int:
        """Layers whose forward runs twice."""
        return sum(policy.recomputes for policy in self.layers)

    @property
    def packed(self) -> int:
        """Layers that keep gate and up in 8 bits."""
        return sum(self.packs(number) for number in range(len(self.layers)))

    @property
    def offloaded(self) -> int:
        """Layers whose saved tensors wait on the host."""
        return self.count(Policy.OFFLOAD)

    @property
    def offload_inputs(self) -> bool:
        """Whether inputs of recomputed layers wait on the host."""
        return Policy.RECOMPUTE_INPUT_ON_HOST in self.layers

    @property
    def ends_on_host(self) -> tuple[bool, bool]:
        """Whether the embedding and lm_head wait on the host."""
        return self.offload_embedding, self.offload_head

    @property
    def on_host(self) -> tuple[int, ...]:
        """Numbers of the layers of which something waits on the host; that of the last one stays on the device."""
        return tuple(number for number, policy in enumerate(self.layers) if policy.uses_host)


def spread(layers: int, count: int) -> set[int]:
    """``count`` of so many layers, as far from each other as may be."""
    return {number for number in range(layers) if number * count % layers < count}
