"""Where the frozen linears of a model's decoder layers live, and how their weights come to hand at the moment of use.

A layer's block is on the host. A resident layer has a copy of it on the device, for good. A streamed one is copied
into a slot of a ring each time it is asked for (``ring.py``). bitsandbytes' own modules hold no bytes of their own:
their weights and scales are views of that memory, and of nothing while the layer is away: then whoever asks for the
scales gets an error, so that what computes with them cannot pass unseen.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qwen_lit.frozen.blocks import Layout, away_state, quant_state
from qwen_lit.frozen.host import Blocks, copies_of
from qwen_lit.frozen.ring import SLOTS, Ring, Slot


@dataclass
class LayerModules:
    """The 4-bit linears of one decoder layer."""

    layout: Layout
    modules: dict[str, Any]
    """bitsandbytes' ``Linear4bit`` by the path in the layer."""
    dtype: torch.dtype
    """Of the numbers that come out of the weights."""
    bound: dict[int, dict[str, tuple[Tensor, Any]]] = field(default_factory=dict)
    """The packed weight and the state of each linear, by the address of the memory that has them; by 0, what stands
    for them while the layer is away."""

    def bind(self, memory: Tensor) -> None:
        """Let the modules read a block.

        Args:
            memory: uint8, the block on the device, or room for it.
        """
        address = memory.data_ptr()
        if address not in self.bound:
            views = self.layout.views(memory)
            self.bound[address] = {
                one.path: (views[f"{one.path}.weight"], quant_state(one, views, self.dtype))
                for one in self.layout.linears
            }
        for path, (packed, state) in self.bound[address].items():
            weight = self.modules[path].weight
            weight.data, weight.quant_state = packed, state

    def unbind(self, device: torch.device) -> None:
        """Let the modules read nothing: shapes stay as they are, scales are an error.

        Args:
            device: where they compute.
        """
        if 0 not in self.bound:
            pieces, nothing = self.layout.pieces, torch.zeros((), dtype=torch.uint8, device=device)
            self.bound[0] = {
                one.path: (nothing.expand(pieces[f"{one.path}.weight"].shape), away_state(one, self.dtype, device))
                for one in self.layout.linears
            }
        for path, (packed, state) in self.bound[0].items():
            weight = self.modules[path].weight
            weight.data, weight.quant_state = packed, state

    def forget(self) -> None:
        """Let go of the memory that was bound."""
        self.bound = {address: found for address, found in self.bound.items() if not address}


class FrozenStore:
    """The frozen linears of every decoder layer of a model, on one device."""

    def __init__(self, blocks: Blocks, layers: Sequence[LayerModules], device: torch.device) -> None:
        """All layers are away until ``place``.

        Args:
            blocks: of the layers, on the host.
            layers: their modules.
            device: where they compute.
        """
        self.blocks, self.layers, self.device = blocks, layers, device
        self.resident: dict[int, Tensor] = {}
        """The blocks of resident layers on the device, uint8."""
        self.ring: Ring | None = None
        """Of the streamed layers, where there are any."""
        self.placing: tuple[frozenset[int], int] | None = None
        """What ``place`` was given last."""
        self.waits: Any = None
        """``Waits`` of the engine that computes with the layers; None where none does."""
        self.hooks: list[Any] = []
        for layer in layers:
            layer.unbind(device)
            for module in layer.modules.values():
                # On some CPUs bitsandbytes would repack what it reads, in place.
                module.support_avx512bf16_for_cpu = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each layer's block."""
        return tuple(layer.layout.size for layer in self.layers)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Numbers of the layers that are streamed."""
        return () if self.ring is None else tuple(self.ring.order)

    @property
    def away(self) -> int:
        """Bytes that the device would take more if every layer were resident."""
        ring = 0 if self.ring is None else sum(slot.memory.numel() for slot in self.ring.slots)
        return sum(self.sizes) - sum(block.numel() for block in self.resident.values()) - ring

    def place(self, streamed: Collection[int], slots: int = SLOTS) -> None:
        """Have these layers streamed, and all others resident.

        Args:
            streamed: numbers of layers.
            slots: of the ring, at least 2; fewer streamed layers than that take one each.

        Raises:
            torch.OutOfMemoryError: the device has no room for the resident ones.
        """
        self.placing = frozenset(streamed), slots
        for number in [one for one in self.resident if one in streamed]:
            self._leave(number)
        slots = min(slots, len(streamed))
        if self.ring is not None and (set(self.ring.order) != set(streamed) or len(self.ring.slots) != slots):
            self._close_ring()
        # Memory that lives across steps is not made in validation's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for number, layer in enumerate(self.layers):
                if number not in streamed and number not in self.resident:
                    memory = torch.empty(layer.layout.size, dtype=torch.uint8, device=self.device)
                    self.resident[number] = memory.copy_(self.blocks.read(number))
                    layer.bind(memory)
            if streamed and self.ring is None:
                self._open_ring(sorted(streamed), slots)

    def _open_ring(self, streamed: list[int], slots: int) -> None:
        sizes = {number: self.layers[number].layout.size for number in streamed}
        most = max(sizes.values())
        made = [Slot(torch.empty(most, dtype=torch.uint8, device=self.device)) for _ in range(slots)]
        copies = copies_of(self.blocks, streamed, self.device)
        # Their memory may be what was given up before, and be read by what the device was given then.
        free = copies.mark()
        for slot in made:
            slot.free = free
        self.ring = Ring(sizes, made, copies, self._give_up)

    def _close_ring(self) -> None:
        assert self.ring is not None
        for number in self.ring.order:
            self.layers[number].unbind(self.device)
            self.layers[number].forget()
        self.ring.copies.close()
        self.ring = None

    def release(self) -> None:
        """Give all of the device's memory back; the next pass places the layers again as they were."""
        for number in list(self.resident):
            self._leave(number)
        if self.ring is not None:
            self._close_ring()

    def _leave(self, number: int) -> None:
        """Take a resident layer off the device."""
        self.layers[number].unbind(self.device)
        self.layers[number].forget()
        del self.resident[number]

    def _give_up(self, number: int) -> None:
        self.layers[number].unbind(self.device)

    def arrival(self, number: int) -> Callable[[], None] | None:
        """What brings a layer's weights to hand when it is called, before each use; None for a layer that is there."""
        return partial(self.arrive, number) if self.ring is not None and number in self.ring.sizes else None

    def arrive(self, number: int) -> None:
        """Have a streamed layer's weights on the device for what is computed next."""
        assert self.ring is not None
        if number == self.ring.current:
            return
        with nullcontext() if self.waits is None else self.waits.waiting():
            slot = self.ring.arrive(number)
        if slot is not None:
            self.layers[number].bind(slot.memory)

    def begin(self, turns: bool) -> None:
        """Say what the next pass is, and see that every layer is placed.

        Args:
            turns: a backward follows it.
        """
        self._placed()
        if self.ring is not None:
            self.ring.begin(turns)

    def hook(self, blocks: Sequence[nn.Module]) -> None:
        """Have weights at hand wherever decoder layers are called as modules, without gradients.

        Args:
            blocks: the decoder layers of transformers, in order.
        """
        for number, block in enumerate(blocks):
            self.hooks.append(block.register_forward_pre_hook(partial(self._before, number)))

    def _placed(self) -> None:
        """Place the layers again, where ``release`` has taken them off the device."""
        if len(self.resident) + len(self.streamed) == len(self.layers):
            return
        if self.placing is None:
            raise RuntimeError("the layers of this model were never placed, so they have no weights")
        self.place(*self.placing)

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """Keep the weights out of what is done meanwhile to all parameters, such as moving them: they would be copied
        into memory of their own."""
        weights = {module: module.weight for layer in self.layers for module in layer.modules.values()}
        for module in weights:
            module.weight = None
        try:
            yield
        finally:
            for module, weight in weights.items():
                module.weight = weight

    def _before(self, number: int, block: nn.Module, arguments: Any) -> None:
        self._placed()
        if self.ring is None or number not in self.ring.sizes:
            return
        if torch.is_grad_enabled() and (block.training or any(one.requires_grad for one in block.parameters())):
            raise RuntimeError(
                "a layer whose weights are streamed was called with gradients: its backward would read the weights "
                "of another layer; model.engine: reference needs the whole base on the device"
            )
        self.begin(turns=False)
        self.arrive(number)


def store_of(base: nn.Module) -> FrozenStore | None:
    """The store that holds a base's frozen linears; None where its modules hold them by themselves.

    Args:
        base: transformers' model, without PEFT's around it.
    """
    found: FrozenStore | None = getattr(base, "frozen", None)
    return found


def disband(base: Any) -> None:
    """Let a base's modules hold their weights by themselves from now on, as they are.

    Args:
        base: transformers' model, with all layers resident where it has a store.
    """
    store = store_of(base)
    if store is not None:
        for hook in store.hooks:
            hook.remove()
        base.frozen = None
