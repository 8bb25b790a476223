"""Tensors that layers save for backward, in pinned host memory: copied out beside the computation, and back a layer
ahead.

Copies run on a stream of their own, one after the other. A layer's memory on the device is given up when the forward
of the next layer with tensors on the host ends, and taken again when the backward of that next layer begins: until
then its copies have the time of both, and at no time is more on the device than in backward. The last such layer
stays on the device, because backward begins with it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qwen_lit.engine.waits import Waits

BLOCK = 2**26
"""Bytes of a pinned block; all are of one size, so that they serve tensors of every size."""

SMALL = 2**20
"""Bytes of an allocation below which it is not worth moving."""

UNPINNED = "the host does not pin"
"""How the error begins where the host refuses memory."""


class HostBlocks:
    """Pinned blocks that are not in use. They are kept, because pinning one takes as long as copying fifty."""

    def __init__(self) -> None:
        self.free: list[Tensor] = []

    def take(self) -> Tensor:
        """A block of ``BLOCK`` bytes.

        Raises:
            RuntimeError: beginning with ``UNPINNED``, where the host refuses more memory.
        """
        return self.free.pop() if self.free else _pinned()

    def give_back(self, blocks: list[Tensor]) -> None:
        """Let other tensors be written to the blocks."""
        self.free.extend(blocks)

    def clear(self) -> None:
        """Return all blocks that are not in use to the system."""
        self.free.clear()
        # torch.accelerator has it from torch 2.12 on.
        empty = getattr(torch.accelerator, "empty_host_cache", getattr(torch._C, "_host_emptyCache", None))
        if torch.cuda.is_available() and empty is not None:
            empty()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream on which tensors are copied between the host and a device, beside the computation."""
    return torch.cuda.Stream(device)


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run on the side stream, after all that the current stream has been given so far; on the CPU, just run."""
    if device.type != "cuda":
        yield
        return
    side = side_stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        yield


def _pinned() -> Tensor:
    try:
        return torch.empty(BLOCK, dtype=torch.uint8, device="cpu", pin_memory=torch.cuda.is_available())
    except RuntimeError as error:
        raise RuntimeError(f"{UNPINNED} {BLOCK // 2**20} MiB more of its memory ({error})") from error


class _Tape:
    """Pinned blocks that are written one after the other."""

    def __init__(self, pool: HostBlocks) -> None:
        self.pool = pool
        self.blocks: list[Tensor] = []
        self.end = BLOCK

    def place(self, size: int) -> list[Tensor]:
        """The next ``size`` bytes, as one piece of each block that they lie in."""
        pieces = []
        while size:
            if self.end == BLOCK:
                self.blocks.append(self.pool.take())
                self.end = 0
            taken = min(size, BLOCK - self.end)
            pieces.append(self.blocks[-1][self.end : self.end + taken])
            self.end, size = self.end + taken, size - taken
        return pieces

    def give_back(self) -> None:
        """Let other tapes write to the blocks."""
        self.pool.give_back(self.blocks)
        self.blocks, self.end = [], BLOCK


class _Memory:
    """One allocation that saved tensors share, and its copy on the host."""

    def __init__(self, tensor: Tensor) -> None:
        self.here: Tensor | None = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(
            tensor.untyped_storage()
        )
        self.readers, self.size = 0, self.here.numel()
        self.pieces: list[Tensor] = []

    def send(self, tape: _Tape) -> None:
        """Copy it to the host."""
        assert self.here is not None
        self.pieces = tape.place(self.size)
        for piece, part in zip(self.pieces, self.here.split([one.numel() for one in self.pieces]), strict=True):
            piece.copy_(part, non_blocking=True)

    def fetch(self, here: Tensor) -> None:
        """Copy it back to where it is to be."""
        self.here = here
        for piece, part in zip(self.pieces, here.split([one.numel() for one in self.pieces]), strict=True):
            part.copy_(piece, non_blocking=True)
        self.pieces = []


class _Layer:
    """The saved tensors of one layer."""

    def __init__(
        self,
        device: torch.device,
        stay: set[int],
        pool: HostBlocks,
        before: "_Layer | None",
        ahead: bool,
        moves: bool,
        waits: Waits,
    ) -> None:
        self.device, self.stay, self.before, self.ahead, self.moves = device, stay, before, ahead, moves
        self.waits = waits
        self.memories: dict[int, _Memory] = {}
        self.tape = _Tape(pool)
        self.here = True
        self.sent: torch.cuda.Event | None = None
        self.arrived: torch.cuda.Event | None = None

    @torch.no_grad()
    def pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        shared = isinstance(tensor, nn.Parameter) or address in self.stay
        if shared or storage.nbytes() < SMALL or tensor.device != self.device:
            return tensor
        if not self.moves:
            # It is wrapped, so that its use is seen here: the layer before has to come back then.
            return (tensor.detach(),)
        if address not in self.memories:
            self.memories[address] = _Memory(tensor)
        memory = self.memories[address]
        memory.readers += 1
        return memory, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset()

    def send(self) -> None:
        """Begin to copy to the host all that the layer has saved; at once, as each turn to the side stream takes the
        host as long as two launches."""
        with beside(self.device):
            for memory in self.memories.values():
                memory.send(self.tape)
            if self.device.type == "cuda":
                self.sent = torch.cuda.current_stream(self.device).record_event()

    def leave(self) -> None:
        """Give up the memory on the device, once it is copied."""
        if self.sent is not None:
            with self.waits.waiting():
                torch.cuda.current_stream(self.device).wait_event(self.sent)
        for memory in self.memories.values():
            memory.here = None
        self.here = False

    def fetch(self) -> None:
        """Begin to copy everything back."""
        if self.here:
            return
        self.here = True
        rooms = [torch.empty(one.size, dtype=torch.uint8, device=self.device) for one in self.memories.values()]
        with beside(self.device):
            for memory, here in zip(self.memories.values(), rooms, strict=True):
                memory.fetch(here)
            # Copies of the side stream run in order, so later ones into these blocks come after the ones out of them.
            self.tape.give_back()
            if self.device.type == "cuda":
                self.arrived = torch.cuda.current_stream(self.device).record_event()

    @torch.no_grad()
    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        self.fetch()
        if self.arrived is not None:
            with self.waits.waiting():
                torch.cuda.current_stream(self.device).wait_event(self.arrived)
            self.arrived = None
        if self.before is not None and self.ahead:
            self.before.fetch()
        if not self.moves:
            return packed[0]  # type: ignore[no-any-return]
        memory, dtype, size, stride, offset = packed
        if memory.here is None:
            raise RuntimeError("what waited in host memory is used up; this graph cannot be run backward twice")
        tensor: Tensor = memory.here.view(dtype).as_strided(size, stride, offset)
        memory.readers -= 1
        if not memory.readers:
            memory.here = None
        return tensor


class HostStore:
    """The layers of one batch whose saved tensors wait in host memory; backward may run once."""

    def __init__(
        self,
        device: torch.device,
        stay: list[Tensor],
        ahead: bool = True,
        pool: HostBlocks | None = None,
        waits: Waits | None = None,
    ) -> None:
        """Keeps what it is given; tensors are moved in ``layer``.

        Args:
            device: from which tensors are moved.
            stay: tensors that layers share, which are not.
            ahead: a layer's tensors come back while the one above it computes, and not only when they are needed.
            pool: of the pinned memory that they wait in; one of its own where it is not given.
            waits: that notes how long the device waits for them; nothing does where it is not given.
        """
        self.device, self.stay, self.ahead = device, {tensor.untyped_storage().data_ptr() for tensor in stay}, ahead
        self.pool = HostBlocks() if pool is None else pool
        self.waits = Waits(device) if waits is None else waits
        self.last: _Layer | None = None
        if device.type == "cuda":
            # Where an earlier backward broke off, memory that it gave up may still be written to.
            torch.cuda.current_stream(device).wait_stream(side_stream(device))

    @contextmanager
    def layer(self, last: bool = False) -> Iterator[None]:
        """A context in which tensors that autograd saves go to the host.

        Args:
            last: no other such layer follows in this batch, so this one stays.
        """
        before = self.last
        self.last = _Layer(self.device, self.stay, self.pool, before, self.ahead, not last, self.waits)
        with saved_tensors_hooks(self.last.pack, self.last.unpack):
            yield
        self.last.send()
        if before is not None:
            before.leave()
