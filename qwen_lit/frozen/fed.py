"""Blocks that a device cannot read by itself: threads bring them through a few buffers, a piece at a time.

A thread has one buffer. It fills it with the next piece of a block, and sends it when all pieces before are sent: so
pieces are read at the same time and copied in order. What a thread waits for is another thread or the device, and
never the one that asks for blocks, so none of them can wait for each other.
"""

import os
import threading
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwen_lit.errors import UserError
from qwen_lit.frozen.link import Link

FETCHED = 2**23
"""Bytes of a request whose answer is not kept."""


class Reader:
    """Reads the memory that blocks lie in, from the file that it is a mapping of where there is one.

    A page that cannot be read is an error then, and not a signal that ends the process; and what is not in memory
    comes in requests as long as a buffer, and not in those of single pages.
    """

    def __init__(self, memory: Tensor, path: Path | None) -> None:
        """Opens the file.

        Args:
            memory: uint8, on the host.
            path: of the file of which ``memory`` is a mapping from the first byte on; None where it is of none.
        """
        self.memory, self.path = memory, path
        self.file: int | None = None
        if path is not None and hasattr(os, "preadv"):
            try:
                self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                # The mapping outlives the file's name.
                self.file = None

    def read(self, start: int, into: Tensor) -> None:
        """Copy bytes.

        Args:
            start: the first one's number in the memory.
            into: uint8, on the host.

        Raises:
            UserError: the disk or the file does not give them.
        """
        if self.file is None:
            into.copy_(self.memory[start : start + into.numel()])
            return
        room, done = into.numpy().data, 0
        try:
            while done < len(room):
                got = os.preadv(self.file, [room[done:]], start + done)
                if not got:
                    raise EOFError("the file ends there")
                done += got
        except (OSError, EOFError) as error:
            raise UserError(
                f"{self.path}: byte {start + done} cannot be read: {error}. Check the disk; where the file is "
                "damaged, delete it, and the next run makes it anew"
            ) from error

    def fetch(self, start: int, size: int) -> None:
        """Have bytes of the file in memory, which asking for their pages one by one would take far longer for.

        Args:
            start: the first one's number in the memory.
            size: in bytes.

        Raises:
            UserError: as of ``read``.
        """
        if self.file is None:
            return
        room = torch.empty(min(size, FETCHED), dtype=torch.uint8)
        for at in range(start, start + size, FETCHED):
            self.read(at, room[: start + size - at])

    def close(self) -> None:
        """Close the file; nothing is read any more."""
        if self.file is not None:
            os.close(self.file)
            self.file = None


@dataclass
class Delivery:
    """A block on its way to a slot."""

    free: Any
    """The event after which the slot may be overwritten; None for at once."""
    issued: threading.Event = field(default_factory=threading.Event)
    """Whether all pieces are sent, or will not be."""
    arrived: Any = None
    """The event that all are there; it is set when ``issued`` is."""
    error: BaseException | None = None
    """Why they will not be there."""


@dataclass
class _Piece:
    """A part of a block that is sent in one go."""

    delivery: Delivery
    slot: Tensor
    start: int
    """Its first byte in the memory that is read."""
    source: Tensor | None
    """Pinned memory that is sent as it is, through no buffer."""
    first: bool
    last: bool


class Feeder:
    """Threads that bring blocks to a device in the order in which they are asked for."""

    def __init__(self, link: Link, reader: Reader, buffers: list[Tensor]) -> None:
        """Begins nothing.

        Args:
            link: to the device.
            reader: of the blocks; it is closed with the feeder.
            buffers: uint8 of one size, at least two, so that one is filled while another is copied.
        """
        self.link, self.reader, self.size = link, reader, buffers[0].numel()
        self.changed = threading.Condition()
        """Guards what follows."""
        self.pieces: deque[_Piece] = deque()
        """Not taken by a thread."""
        self.under_way: list[Delivery] = []
        """Of which not all pieces are sent."""
        self.taken = 0
        """Pieces that threads have taken; their numbers count from 0."""
        self.sent = 0
        """Number of the piece that is sent next."""
        self.closed = False
        self.threads = [threading.Thread(target=self._work, args=(one,), daemon=True) for one in buffers]
        for thread in self.threads:
            thread.start()

    def deliver(self, start: int, slot: Tensor, free: Any, source: Tensor | None = None) -> Delivery:
        """Have a block brought to a slot; returns at once.

        Args:
            start: of the block in the memory that is read.
            slot: uint8, as large as the block.
            free: the event after which the slot may be overwritten; None for at once.
            source: the block where it is pinned, which needs no buffer but comes in its turn.
        """
        delivery = Delivery(free)
        starts = range(0, slot.numel(), slot.numel() if source is not None else self.size)
        pieces = [
            _Piece(delivery, slot[at : at + starts.step], start + at, source, at == 0, at == starts[-1])
            for at in starts
        ]
        with self.changed:
            if self.closed:
                raise RuntimeError("the feeder of blocks is closed")
            self.under_way.append(delivery)
            self.pieces.extend(pieces)
            self.changed.notify_all()
        return delivery

    def finish(self, delivery: Delivery) -> None:
        """Let what the device is given from now on see a block, when its pieces are sent.

        Raises:
            UserError: the file does not give the block.
        """
        delivery.issued.wait()
        if isinstance(delivery.error, UserError):
            raise delivery.error
        if delivery.error is not None:
            raise RuntimeError("a block of frozen weights did not come to the device") from delivery.error
        self.link.follow(delivery.arrived)

    def close(self) -> None:
        """End the threads; what is not sent stays away, and what is sent is under way."""
        with self.changed:
            self.closed = True
            self.pieces.clear()
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()
        for delivery in self.under_way:
            delivery.error = delivery.error or RuntimeError("the feeder of blocks was closed")
            delivery.issued.set()
        self.reader.close()

    def _work(self, buffer: Tensor) -> None:
        """Fill and send, until the feeder is closed."""
        left: Any = None  # The event that what was in the buffer is copied.
        while (taken := self._take()) is not None:
            number, piece = taken
            delivery = piece.delivery
            try:
                source = self._filled(piece, buffer, left)
                if not self._is_next(number):
                    return
                left = self._send(piece, source) or left
            except BaseException as error:
                delivery.error = delivery.error or error
                if not self._is_next(number):
                    return
            self._done(piece)

    def _take(self) -> tuple[int, _Piece] | None:
        """The next piece and its number; None when the feeder is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.pieces or self.closed)
            if self.closed:
                return None
            self.taken += 1
            return self.taken - 1, self.pieces.popleft()

    def _filled(self, piece: _Piece, buffer: Tensor, left: Any) -> Tensor:
        """What is sent of a piece."""
        if piece.source is not None or piece.delivery.error is not None:
            return buffer if piece.source is None else piece.source
        if left is not None:
            self.link.wait(left)
        source = buffer[: piece.slot.numel()]
        self.reader.read(piece.start, source)
        return source

    def _is_next(self, number: int) -> bool:
        """Wait until all pieces before are sent; False when the feeder is closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.sent == number or self.closed)
            return not self.closed

    def _send(self, piece: _Piece, source: Tensor) -> Any:
        """Send a piece, unless its block has failed; the event that it is copied."""
        delivery = piece.delivery
        if piece.first and delivery.free is not None:
            self.link.hold(delivery.free)
        if delivery.error is not None:
            return None
        self.link.send(piece.slot, source)
        delivery.arrived = self.link.record()
        return delivery.arrived

    def _done(self, piece: _Piece) -> None:
        """Let the next piece be sent."""
        with self.changed:
            self.sent += 1
            if piece.last:
                self.under_way.remove(piece.delivery)
                piece.delivery.issued.set()
            self.changed.notify_all()
