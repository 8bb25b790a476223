"""In which order layers come into the slots of a ring, and what a pass that broke off leaves there."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from qwen_lit.frozen.ring import Ring, Slot


@dataclass
class Told:
    """Copies that are written down; what a slot has is its first byte."""

    began: list[int] = field(default_factory=list)
    ended: list[Any] = field(default_factory=list)
    marks: int = 0
    fails: list[str] = field(default_factory=list)
    """Calls that fail once."""

    def _fail(self, name):
        if name in self.fails:
            self.fails.remove(name)
            raise KeyboardInterrupt(name)

    def begin(self, number, slot, free):
        self._fail(f"begin {number}")
        self.began.append(number)
        slot.fill_(255)
        return number, slot, free

    def finish(self, copy):
        self._fail(f"finish {copy[0]}")
        copy[1].fill_(copy[0])
        self.ended.append(copy)

    def mark(self):
        self.marks += 1
        return self.marks

    def close(self):
        pass


def ring_of(order, slots):
    made = [Slot(torch.full((4,), 255, dtype=torch.uint8)) for _ in range(slots)]
    return Ring({number: 4 for number in order}, made, Told())


def arrive(ring, number):
    """Asks for a layer, and whether its slot has it."""
    ring.arrive(number)
    assert ring._slot_of(number).memory[0] == number
    assert ring._slot_of(number).copy is None


def run(ring, order, turns=True):
    """A pass; the layers whose copies began meanwhile."""
    before = len(ring.copies.began)
    ring.begin(turns)
    for number in [*order, *reversed(order)] if turns else order:
        # Each weight of a layer asks.
        arrive(ring, number)
        arrive(ring, number)
    return ring.copies.began[before:]


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("order", [range(5), range(6), (1, 4, 7, 9, 10)], ids=str)
def test_forward_brings_the_next_layer_and_backward_the_one_before(order, slots):
    ring, order = ring_of(order, slots), list(order)
    first = run(ring, order)
    back = order[: len(order) - slots][::-1]
    assert first == order + back
    # What one pass ends with the next begins with.
    for _ in range(2):
        assert run(ring, order) == order[slots:] + back
    assert len(order[slots:]) == len(order) - slots


@pytest.mark.parametrize("slots", [2, 3])
def test_a_layer_comes_before_it_is_asked_for(slots):
    ring = ring_of(range(6), slots)
    ring.begin(True)
    for number in range(6):
        arrive(ring, number)
        assert set(range(number, min(6, number + slots))) <= {slot.holds for slot in ring.slots}
    for number in range(5, -1, -1):
        arrive(ring, number)
        assert set(range(max(0, number - slots + 1), number + 1)) <= {slot.holds for slot in ring.slots}


@pytest.mark.parametrize("slots", [2, 3])
def test_without_a_backward_the_first_layers_follow_the_last(slots):
    ring, order = ring_of(range(5), slots), list(range(5))
    ahead = order[: slots - 1]
    assert run(ring, order, turns=False) == order + ahead
    # The first layers are there, and each layer comes once a pass.
    assert run(ring, order, turns=False) == order[slots - 1 :] + ahead
    # A training pass after it is as any other.
    assert run(ring, order) == order[slots - 1 :] + order[: 5 - slots][::-1]


@pytest.mark.parametrize("slots", [1, 2])
def test_as_many_slots_as_layers_take_one_copy_each(slots):
    ring, order = ring_of(range(slots), slots), list(range(slots))
    assert run(ring, order) == order
    assert not run(ring, order) and not run(ring, order, turns=False)


def test_a_slot_is_overwritten_after_its_last_use_alone():
    ring = ring_of(range(5), 2)
    run(ring, list(range(5)))
    ring.begin(True)
    frees = {number: free for number, _, free in ring.copies.ended}
    # Copies of a first round into empty slots wait for nothing, all others do.
    assert frees[0] is not None and None in [free for _, _, free in ring.copies.ended[:2]]
    assert all(free is not None for _, _, free in ring.copies.ended[2:])
    # The pass ended with the first layer; its slot is free from the beginning of the next pass on.
    assert ring._slot_of(0).free == ring.copies.marks


@pytest.mark.parametrize("where", ["finish 2", "finish 3", "begin 3", "begin 2"])
@pytest.mark.parametrize("again", ["the same layer", "the next pass", "the next pass, which is begun"])
def test_after_an_arrival_that_broke_off_every_layer_arrives(where, again):
    ring = ring_of(range(5), 2)
    ring.copies.fails = [where]
    ring.begin(True)
    with pytest.raises(KeyboardInterrupt):
        for number in range(5):
            last = number
            arrive(ring, number)
    if again == "the same layer":
        assert ring.current is None
        for number in range(last, 5):
            arrive(ring, number)
    elif again == "the next pass, which is begun":
        ring.begin(True)
    for number in [*range(5), *reversed(range(5))]:
        arrive(ring, number)
        assert ring.current == number


def test_a_pass_that_broke_off_leaves_the_layer_that_was_in_use_marked():
    ring = ring_of(range(5), 2)
    for number in range(3):
        arrive(ring, number)
    used = ring._slot_of(2)
    ring.begin(True)
    assert used.free == ring.copies.marks and ring.current is None
    # It is given to the modules again, whatever the pass that broke off did to them.
    assert ring.arrive(2) is used
    assert run(ring, list(range(5)))


def test_what_is_overwritten_is_given_up_before():
    ring, given = ring_of(range(4), 2), []
    ring.gives_up = lambda number: given.append((number, number in [slot.holds for slot in ring.slots]))
    ring.begin(True)
    for number in range(4):
        arrive(ring, number)
    assert given == [(0, True), (1, True)]
