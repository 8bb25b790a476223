"""Layers that are streamed: a few slots on the device, into which a layer's block comes beside the computation.

Forward asks for the layers from the first to the last and backward from the last to the first, so the next layer in
that direction is copied while this one computes. The layers with which one pass ends, the other begins with: they stay
in their slots.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

SLOTS = 2
"""Slots that hide a copy of any length up to that of a layer's pass; a third one evens out layers of other lengths."""


class Copies(Protocol):
    """How blocks get from the host into slots."""

    def begin(self, number: int, slot: Tensor, free: Any) -> Any:
        """Begin to copy a layer's block.

        Args:
            number: of the layer.
            slot: uint8, as large as the block.
            free: of ``mark``, after which the slot may be overwritten; None for at once.

        Returns:
            What ``finish`` takes.
        """

    def finish(self, copy: Any) -> None:
        """Let what the device is given from now on see the copy."""

    def mark(self) -> Any:
        """The point up to which the device has been given work."""

    def close(self) -> None:
        """End all copies, and give up what they need; the ring is not used any more."""


@dataclass
class Slot:
    """Memory on the device for one layer at a time."""

    memory: Tensor
    """uint8."""
    holds: int | None = None
    """Number of the layer whose block it has, or will have."""
    copy: Any = None
    """Of ``Copies.begin``, until it is finished."""
    free: Any = None
    """Of ``Copies.mark``, at the last use of what it holds."""
    used: int = 0
    """When it was last used, counted in uses."""


@dataclass
class Ring:
    """The slots of the streamed layers of a model."""

    sizes: Mapping[int, int]
    """Bytes of each streamed layer's block, by its number."""
    slots: Sequence[Slot]
    """At least two where there are two layers, each as large as the largest block."""
    copies: Copies
    gives_up: Callable[[int], None] = lambda number: None
    """Called with the number of a layer before its slot is overwritten."""
    turns: bool = True
    """Whether a backward follows the forward under way; otherwise another forward may."""
    current: int | None = None
    """The layer that was asked for last in the pass under way."""
    uses: int = 0

    def __post_init__(self) -> None:
        self.order = sorted(self.sizes)
        self.places = {number: place for place, number in enumerate(self.order)}

    def begin(self, turns: bool) -> None:
        """Begin a pass, whether or not the one before came to its end; the slots keep what they have.

        Args:
            turns: a backward follows it.
        """
        self._leave()
        self.turns = turns

    def arrive(self, number: int) -> Slot | None:
        """Have a layer's block on the device for what is computed next, and those after it on their way.

        Args:
            number: of a streamed layer.

        Returns:
            The slot that has it; None where it was asked for last too, and lies where it lay.
        """
        if number == self.current:
            return None
        forward = self.current is None or number > self.current
        self._leave()
        wanted = [number, *self._followers(number, 1 if forward else -1)]
        slot = self._bring(number, wanted)
        self._finish(slot)
        self.uses += 1
        slot.used = self.uses
        for follower in wanted[1:]:
            self._bring(follower, wanted)
        # Last, so that a layer whose arrival broke off is asked for anew.
        self.current = number
        return slot

    def _leave(self) -> None:
        """The layer that was asked for last is not used from here on."""
        if self.current is not None:
            self._slot_of(self.current).free = self.copies.mark()
            self.current = None

    def _finish(self, slot: Slot) -> None:
        """Let what is computed next see what a slot holds; one whose copy failed holds nothing."""
        if slot.copy is None:
            return
        copy, slot.copy = slot.copy, None
        try:
            self.copies.finish(copy)
        except BaseException:
            slot.holds = None
            raise

    def _followers(self, number: int, step: int) -> list[int]:
        """The layers that are asked for after this one, as many as there are slots for; fewer where passes turn."""
        found, place = [], self.places[number]
        for _ in range(min(len(self.slots), len(self.order)) - 1):
            place += step
            if place >= len(self.order) and not self.turns:
                place = 0
            if not 0 <= place < len(self.order):
                break
            found.append(self.order[place])
        return found

    def _slot_of(self, number: int) -> Slot:
        return next(slot for slot in self.slots if slot.holds == number)

    def _bring(self, number: int, wanted: list[int]) -> Slot:
        """The slot of a layer, whose copy begins now where it is in none.

        Args:
            number: of the layer.
            wanted: layers that stay where they are.
        """
        if any(slot.holds == number for slot in self.slots):
            return self._slot_of(number)
        # What was not used for the longest time. Copies run in the order in which they begin, so one that is still
        # under way into this slot ends before.
        slot = min((one for one in self.slots if one.holds not in wanted), key=lambda one: one.used)
        if slot.holds is not None:
            self.gives_up(slot.holds)
        # It holds nothing should the copy not begin.
        slot.holds = None
        slot.copy = self.copies.begin(number, slot.memory[: self.sizes[number]], slot.free)
        slot.holds = number
        return slot
