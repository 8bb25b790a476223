"""What streaming layers saves on the device, and what it brings over the link."""

from bisect import bisect_left
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from qwen_lit.engine.policy import spread
from qwen_lit.frozen.ring import SLOTS


@dataclass(frozen=True)
class Streaming:
    """Which layers of a model may be streamed, and how many bytes they are."""

    blocks: tuple[int, ...]
    """Bytes of each layer's block; 0 where the layer cannot be streamed."""

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that can be."""
        return tuple(number for number, size in enumerate(self.blocks) if size)

    @cached_property
    def steps(self) -> tuple[frozenset[int], ...]:
        """The layers that are streamed where so many are, from none to all."""
        return tuple(self.chosen(count) for count in range(len(self.layers) + 1))

    @cached_property
    def most(self) -> tuple[int, ...]:
        """Bytes that are freed at most by so many streamed layers or fewer, from none to all."""
        return tuple(accumulate((self.freed(step) for step in self.steps), max))

    def least(self, short: float) -> frozenset[int] | None:
        """The fewest streamed layers that free so many bytes; None where all of them do not.

        Args:
            short: bytes that lack; 0 and less stream nothing.
        """
        count = bisect_left(self.most, short)
        return self.steps[count] if count < len(self.steps) else None

    def chosen(self, count: int) -> frozenset[int]:
        """So many streamed layers, as far from each other as may be: each copy has as much computation beside it."""
        return frozenset(self.layers[place] for place in spread(len(self.layers), count))

    def held(self, streamed: Collection[int]) -> int:
        """Bytes of the blocks of streamed layers on the host."""
        return sum(self.blocks[number] for number in streamed)

    def slots(self, streamed: Collection[int]) -> int:
        """Bytes on the device for what is streamed."""
        return min(SLOTS, len(streamed)) * max((self.blocks[number] for number in streamed), default=0)

    def freed(self, streamed: Collection[int]) -> int:
        """Bytes of the device that streaming gives back; none where all of it lies in the slots."""
        return self.held(streamed) - self.slots(streamed)

    def copied(self, streamed: Collection[int]) -> int:
        """Bytes that come over the link in a pass over all layers: those of the turn lie in the slots."""
        return self.freed(streamed)
