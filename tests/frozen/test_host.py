"""How blocks come from the host to a device: pinned, through buffers, and what becomes of errors on the way."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from qwen_lit.errors import UserError
from qwen_lit.frozen import host, pinned
from qwen_lit.frozen.fed import Feeder, Reader
from qwen_lit.frozen.host import LinkCopies, pinning, rate_of
from tests.frozen.links import PAGE, LateLink, Mark, blocks_of

SIZES = [3 * PAGE, 5 * PAGE, PAGE, 4 * PAGE, 6 * PAGE]
WHOLE, NUMBERS = sum(SIZES), range(len(SIZES))
RING = 2 * 2 * PAGE
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two buffers of two pages; nothing is spared for others."""
    monkeypatch.setattr(host, "BUFFERS", 2)
    monkeypatch.setattr(host, "BUFFER_SIZES", (2 * PAGE, PAGE))
    monkeypatch.setattr(pinned, "SPARE", 1)
    monkeypatch.setattr(pinned, "THREADS", 1)


@pytest.fixture(params=["file", "memory"])
def blocks(request, tmp_path):
    return blocks_of(SIZES, tmp_path / "base" if request.param == "file" else None)


def made(blocks, link, numbers=NUMBERS, most=2**62):
    return LinkCopies(blocks, numbers, link, most)


def brings_all(copies, blocks, times=2):
    """Whether each block comes into each of two slots."""
    slots = [torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(2)]
    for turn in range(times * len(SIZES)):
        number = turn % len(SIZES)
        slot = slots[turn % 2][: SIZES[number]]
        copies.finish(copies.begin(number, slot, copies.mark()))
        assert torch.equal(slot, blocks.read(number)), number
    return True


@pytest.mark.parametrize(
    ("pinnable", "most", "expected"),
    [
        (2**62, 2**62, {0, 1, 2, 3, 4}),
        (RING + 9 * PAGE, 2**62, {0, 1}),
        (RING, 2**62, set()),
        (0, 2**62, set()),
        (2**62, 8 * PAGE, {0, 1}),
    ],
    ids=["all", "some refused", "the buffers alone", "none", "no more is wanted"],
)
def test_what_the_system_does_not_pin_is_fed(blocks, pinnable, most, expected):
    link = LateLink(pinnable)
    copies = made(blocks, link, most=most)
    try:
        assert copies.pinned == expected
        assert (copies.feeder is None) is (expected == set(NUMBERS))
        addresses = {blocks.read(number).data_ptr() for number in expected}
        assert addresses == set(link.pinned) & {blocks.read(number).data_ptr() for number in NUMBERS}
        # The buffers are given back where nothing needs them.
        rest = len(link.pinned) - len(expected)
        assert rest == (0 if copies.feeder is None or not pinnable else 2)
        assert brings_all(copies, blocks)
        assert set(link.sent) >= addresses
        text = pinning(copies, NUMBERS)
        assert ("the system refuses more (no more memory to pin)" in text) is (pinnable < 2**62)
        assert ("too little host memory" in text) is (most < 2**62)
    finally:
        copies.close()
    assert not link.pinned and (copies.feeder is None or not any(one.is_alive() for one in copies.feeder.threads))


def test_memory_is_left_to_pin_for_others_where_the_system_refuses_more(monkeypatch):
    monkeypatch.setattr(pinned, "SPARE", 4 * PAGE)
    blocks, link = blocks_of(SIZES), LateLink(RING + 10 * PAGE)
    copies = made(blocks, link)
    # Two blocks of 3 and 5 pages and one of 1 fit; the last two make 6 pages.
    assert copies.pinned == {0} and sum(link.pinned.values()) == RING + 3 * PAGE
    copies.close()


def test_smaller_buffers_are_taken_where_the_larger_are_refused():
    blocks, link = blocks_of(SIZES), LateLink(2 * PAGE)
    copies = made(blocks, link)
    assert copies.feeder.size == PAGE and sum(link.pinned.values()) == 2 * PAGE
    assert brings_all(copies, blocks)
    copies.close()


@pytest.mark.parametrize("pinnable", [2**62, RING + 9 * PAGE, 0], ids=["pinned", "mixed", "fed"])
def test_copies_are_made_in_the_order_in_which_they_begin(blocks, pinnable):
    copies = made(blocks, LateLink(pinnable))
    slot, other = (torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(2))
    # None of the first ones is waited for: later ones go over them.
    for number in (4, 0, 3, 1):
        last = copies.begin(number, slot[: SIZES[number]], copies.mark())
    beside = copies.begin(2, other[: SIZES[2]], None)
    copies.finish(beside)
    copies.finish(last)
    assert torch.equal(other[: SIZES[2]], blocks.read(2))
    assert torch.equal(slot[: SIZES[1]], blocks.read(1))
    assert torch.equal(slot[SIZES[1] : SIZES[4]], blocks.read(4)[SIZES[1] :])
    copies.close()


@pytest.mark.parametrize("pinnable", [2**62, 0], ids=["pinned", "fed"])
def test_a_slot_in_use_is_not_written_to(blocks, pinnable):
    link, use = LateLink(pinnable), Mark(done=False)
    copies = made(blocks, link)
    slot = torch.zeros(SIZES[1], dtype=torch.uint8)
    # Asking returns at once, though the block has more pieces than there are buffers.
    copy = copies.begin(1, slot, use)
    while not link.sent:
        time.sleep(0.001)
    device = threading.Thread(target=link.drain)
    device.start()
    device.join(0.1)
    assert device.is_alive() and not slot.any()
    use.done.set()
    device.join(10)
    copies.finish(copy)
    assert torch.equal(slot, blocks.read(1))
    copies.close()


def test_a_file_that_ends_early_is_an_error_that_names_it_and_the_next_block_comes(tmp_path):
    path = tmp_path / "base"
    blocks, link = blocks_of(SIZES, path), LateLink(RING)
    copies = made(blocks, link)
    # What is left ends in the middle of the last block.
    with path.open("r+b") as file:
        file.truncate(blocks.starts[4] + 3 * PAGE)
    slot, other = (torch.zeros(max(SIZES), dtype=torch.uint8) for _ in range(2))
    bad = copies.begin(4, slot, copies.mark())
    good = copies.begin(3, other[: SIZES[3]], copies.mark())
    copies.finish(good)
    assert torch.equal(other[: SIZES[3]], blocks.read(3))
    for _ in range(2):
        with pytest.raises(UserError, match=f"{path}: byte .* ends there.*delete it"):
            copies.finish(bad)
    copies.close()


def test_a_disk_error_while_blocks_are_pinned_leaves_nothing_pinned(tmp_path, monkeypatch):
    blocks, link = blocks_of(SIZES, tmp_path / "base"), LateLink()

    def fails(self, start, size):
        if start == blocks.starts[2]:
            raise UserError("the disk")

    monkeypatch.setattr(Reader, "fetch", fails)
    with pytest.raises(UserError, match="the disk"):
        made(blocks, link)
    assert not link.pinned


def test_an_error_of_the_device_is_raised_where_the_block_is_needed(monkeypatch):
    blocks, link = blocks_of(SIZES), LateLink(RING)
    copies = made(blocks, link)
    slot = torch.zeros(SIZES[0], dtype=torch.uint8)
    with monkeypatch.context() as broken:
        broken.setattr(link, "send", lambda slot, source: 1 / 0)
        with pytest.raises(RuntimeError, match="did not come") as raised:
            copies.finish(copies.begin(0, slot, None))
    assert isinstance(raised.value.__cause__, ZeroDivisionError)
    copies.finish(copies.begin(0, slot, None))
    assert torch.equal(slot, blocks.read(0))
    copies.close()


def test_a_file_without_its_name_is_read_through_the_mapping(tmp_path):
    path = tmp_path / "base"
    blocks = blocks_of(SIZES, path)
    path.unlink()
    copies = made(blocks, LateLink(RING))
    assert brings_all(copies, blocks)
    copies.close()


def test_closing_ends_what_is_under_way(blocks):
    link, use = LateLink(RING), Mark(done=False)
    copies = made(blocks, link)
    slot = torch.zeros(max(SIZES), dtype=torch.uint8)
    pending = [copies.begin(number, slot[: SIZES[number]], use) for number in NUMBERS]
    waiting = threading.Thread(target=lambda: pytest.raises(RuntimeError, copies.finish, pending[-1]))
    waiting.start()
    # The device goes on a little later: closing waits for what it was given, and for no more.
    threading.Timer(0.2, use.done.set).start()
    copies.close()
    waiting.join(10)
    assert not waiting.is_alive() and not link.pinned and len(link.sent) < 10
    with pytest.raises(RuntimeError, match="did not come"):
        copies.finish(pending[-1])
    with pytest.raises(RuntimeError, match="closed"):
        copies.begin(0, slot[: SIZES[0]], None)
    copies.close()


def test_copies_that_nothing_holds_end_by_themselves(blocks):
    link = LateLink(RING)
    copies = made(blocks, link)
    threads, seen = copies.feeder.threads, weakref.ref(copies)
    copies.begin(0, torch.zeros(SIZES[0], dtype=torch.uint8), None)
    del copies
    gc.collect()
    assert seen() is None and not any(one.is_alive() for one in threads) and not link.pinned


ENDING = """
import sys, torch
sys.path.insert(0, {root!r})
from tests.frozen.links import LateLink, Mark, blocks_of
from qwen_lit.frozen.host import LinkCopies
class Told(LateLink):
    def unregister(self, address):
        super().unregister(address)
        print(len(self.pinned), flush=True)
copies = LinkCopies(blocks_of([4096] * 3), range(3), Told(2**24), 4096)
slot = torch.zeros(4096, dtype=torch.uint8)
copies.begin(1, slot, None)
copies.begin(2, slot, None)
raise KeyboardInterrupt
"""


def test_a_process_ends_with_copies_under_way(pytestconfig):
    code = ENDING.format(root=str(pytestconfig.rootpath))
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in ended.stderr and "Exception ignored" not in ended.stderr, ended.stderr
    # Two megabytes four times, and a block; the last one leaves nothing.
    assert ended.stdout.split()[-1] == "0", ended.stdout


def test_many_blocks_come_in_order_through_few_buffers():
    sizes = [(1 + number % 7) * 512 for number in range(60)]
    blocks, link = blocks_of(sizes), LateLink()
    buffers = [torch.zeros(1024, dtype=torch.uint8) for _ in range(3)]
    feeder = Feeder(link, Reader(blocks.memory, None), buffers)
    slots = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    under_way = [feeder.deliver(start, slot, None) for start, slot in zip(blocks.starts, slots, strict=True)]
    for delivery in reversed(under_way):
        feeder.finish(delivery)
    assert all(torch.equal(slot, blocks.read(number)) for number, slot in enumerate(slots))
    feeder.close()


def test_the_rate_counts_each_kind_by_its_bytes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(host.time, "perf_counter", lambda: clock[0])
    blocks, link = blocks_of(SIZES), LateLink(RING + 9 * PAGE)
    copies, taken = made(blocks, link), link.send
    pinned_ones = {blocks.read(number).data_ptr() for number in copies.pinned}

    def send(slot, source):
        # A fed byte takes three times as long.
        clock[0] += slot.numel() * (1 if source.data_ptr() in pinned_ones else 3)
        taken(slot, source)

    monkeypatch.setattr(link, "send", send)
    assert copies.pinned == {0, 1}
    seconds = sum(SIZES[:2]) + 3 * sum(SIZES[2:])
    assert rate_of(copies, NUMBERS, CPU) == pytest.approx(WHOLE / seconds)
    copies.close()
