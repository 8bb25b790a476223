"""A link to a device that is not there, whose copies run as late as they may."""

import threading

import torch

from qwen_lit.frozen.host import Blocks

PAGE = 4096


class Mark:
    """What a device computes until here; it goes on when it is told to."""

    def __init__(self, done=True) -> None:
        self.done = threading.Event()
        if done:
            self.done.set()


class LateLink:
    """Does what it is given, in order, only when someone waits for it."""

    def __init__(self, pinnable=2**62) -> None:
        """``pinnable`` bytes are pinned in all."""
        self.pinnable, self.pinned, self.refused = pinnable, {}, 0
        self.lock, self.given, self.done, self.sent = threading.RLock(), [], 0, []

    def register(self, address, size, mapped):
        with self.lock:
            assert address % PAGE == size % PAGE == 0 and address not in self.pinned
            if sum(self.pinned.values()) + size > self.pinnable:
                self.refused += 1
                return "no more memory to pin"
            self.pinned[address] = size
            return None

    def unregister(self, address):
        with self.lock:
            assert self.done == len(self.given), "a copy may be under way"
            del self.pinned[address]

    def _give(self, work):
        with self.lock:
            self.given.append(work)
            return len(self.given)

    def send(self, slot, source):
        assert slot.numel() == source.numel()
        self.sent.append(source.data_ptr())
        self._give(lambda: slot.copy_(source))

    def hold(self, event):
        self._give(lambda: self.wait(event))

    def record(self):
        return self._give(lambda: None)

    def wait(self, event):
        if isinstance(event, Mark):
            assert event.done.wait(10)
            return
        with self.lock:
            while self.done < event:
                self.given[self.done]()
                self.done += 1

    def follow(self, event):
        self.wait(event)

    def mark(self):
        return Mark()

    def drain(self):
        self.wait(len(self.given))


def blocks_of(sizes, path=None, seed=0):
    """Blocks of random bytes, at the beginning of pages; in a file where a path is given."""
    draw = torch.Generator().manual_seed(seed)
    starts = [PAGE]
    for size in sizes:
        starts.append(starts[-1] + -(-size // PAGE) * PAGE)
    whole = torch.randint(0, 255, (starts[-1],), dtype=torch.uint8, generator=draw)
    if path is None:
        room = torch.empty(starts[-1] + PAGE, dtype=torch.uint8)
        begin = -room.data_ptr() % PAGE
        memory = room[begin : begin + starts[-1]].copy_(whole)
    else:
        path.write_bytes(whole.numpy().tobytes())
        memory = mapped(path)
    return Blocks(memory, tuple(starts[:-1]), tuple(sizes), path)


def mapped(path):
    """A file as it lies in the page cache."""
    return torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
