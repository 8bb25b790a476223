"""Best-fit packing of whole documents into fixed token budgets."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Best-fit decreasing: each document goes where it leaves the least room.

    Bins are kept by the room they have left, and a bit per room says whether there is one, so that the tightest fit
    is found in time that does not grow with the number of bins (Johnson, 1974, on best-fit decreasing).

    Args:
        lengths: tokens of each document, each at most ``budget``.
        budget: tokens of a pack.

    Returns:
        Packs of document numbers, every document in exactly one; the longest document of a pack comes first.
    """
    by_room: list[list[int]] = [[] for _ in range(budget + 1)]
    occupied = 0
    packs: list[list[int]] = []
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        fitting = occupied >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                occupied ^= 1 << room
            packs[pack].append(number)
        else:
            room, pack = budget, len(packs)
            packs.append([number])
        left = room - length
        if left:
            by_room[left].append(pack)
            occupied |= 1 << left
    return packs


def fill(packs: Sequence[Sequence[int]], lengths: Sequence[int], budget: int) -> float:
    """Share of the packs' budgets that holds tokens; 0 when there is no pack."""
    return sum(lengths[number] for pack in packs for number in pack) / (budget * len(packs)) if packs else 0.0
