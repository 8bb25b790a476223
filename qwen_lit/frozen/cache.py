"""The file that holds the 4-bit weights of a base, a block a layer: quantised once, mapped by every later run.

It is a safetensors file: a header of JSON, then the blocks as tensors of bytes, one behind the other, each of them
whole pages. A file is whole or absent: it is written beside its place and moved there.
"""

import contextlib
import hashlib
import json
import logging
import mmap
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from qwen_lit.errors import UserError
from qwen_lit.files import fsync_dir, whole_or_absent
from qwen_lit.frozen.blocks import PAGE, Layout
from qwen_lit.frozen.host import Blocks
from qwen_lit.hub import free_bytes, in_gb
from qwen_lit.names import expanded
from qwen_lit.progress import Progress, timed
from qwen_lit.run import training_config

log = logging.getLogger(__name__)
FORMAT = "qwen_lit frozen layers, 1"
Makes = Callable[[], Iterable[Tensor]]
"""Makes the block of each layer, uint8 ``[size]``, on any device."""
SILENT = 3600.0
"""Seconds after which a file that is not written to is taken for one that nobody writes any more."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run, as one of them sees them."""

    gathered: Callable[[Any], list[Any]] = lambda value: [value]
    """What all ranks give, in their order; every rank calls it as often as the others."""
    rank: int = 0
    """This one's number."""
    first: int = 0
    """Number of the first one on this machine."""
    several: bool = False
    """Whether each machine has more than one."""

    def of_first(self, value: Any) -> Any:
        """What the first rank of this machine gives; every rank calls it as often as the others."""
        return self.gathered(value)[self.first]


ALONE = Ranks()


def cache_folder(given: str) -> Path:
    """Where the files of bases are.

    Args:
        given: ``auto``, or a folder.
    """
    if given != "auto":
        return Path(expanded(given))
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qwen_lit" / "bases"


def cache_of_training(adapter: Path) -> str | None:
    """What ``model.base_cache`` was for an adapter; ``auto`` where this machine lacks the folder that it names.

    Args:
        adapter: its folder.
    """
    given: str | None = training_config(adapter).get("model", {}).get("base_cache", "auto")
    return given if given is None or Path(expanded(given)).is_dir() else "auto"


def key_of(base: str, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device) -> str:
    """What tells one file from another: the checkpoint, and how it is quantised, by what kind of device.

    Args:
        base: digest of the checkpoint, as of ``model.base.fingerprint``.
        layouts: of the layers.
        dtype: in which weights are quantised.
        device: that quantises them: kinds of devices may round otherwise.
    """
    facts = [FORMAT, base, [_facts(one) for one in layouts], str(dtype), device.type]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _facts(layout: Layout) -> list[object]:
    return [[one.path, one.shape, asdict(one.held)] for one in layout.linears]


def header_of(layouts: Sequence[Layout], key: str) -> bytes:
    """The bytes before the first block: a multiple of ``PAGE``.

    Args:
        layouts: of the layers.
        key: of the file.
    """
    said: dict[str, object] = {
        "__metadata__": {"format": FORMAT, "key": key, "layers": json.dumps(list(map(_facts, layouts)))}
    }
    end = 0
    for number, layout in enumerate(layouts):
        said[f"layers.{number:03d}"] = {
            "dtype": "U8",
            "shape": [layout.size],
            "data_offsets": [end, end + layout.size],
        }
        end += layout.size
    text = json.dumps(said, separators=(",", ":")).encode()
    size = -(-(len(text) + 8) // PAGE) * PAGE - 8
    return size.to_bytes(8, "little") + text.ljust(size)


def write_blocks(file: BinaryIO, layouts: Sequence[Layout], key: str, blocks: Iterable[Tensor]) -> None:
    """Write a file from its first byte to its last; no more than a block is in memory.

    Args:
        file: opened for writing.
        layouts: of the layers.
        key: of the file.
        blocks: uint8 ``[size]`` of each layer, on any device.
    """
    file.write(header_of(layouts, key))
    with Progress("quantising the base", sum(one.size for one in layouts), "B") as progress:
        for layout, block in zip(layouts, blocks, strict=True):
            file.write(block.cpu().numpy().data)
            progress.advance(layout.size)
    file.flush()


def is_whole(path: Path, layouts: Sequence[Layout], key: str) -> bool:
    """Whether a file is all that it should be, by its size and its header.

    Args:
        path: of the file.
        layouts: of the layers.
        key: of the file.
    """
    header = header_of(layouts, key)
    with path.open("rb") as file:
        there = os.fstat(file.fileno()).st_size
        return there == len(header) + sum(one.size for one in layouts) and file.read(len(header)) == header


def map_blocks(file: BinaryIO, layouts: Sequence[Layout], key: str, path: Path | None) -> Blocks:
    """The blocks of a file, which any number of processes share in memory.

    Args:
        file: whole, opened for reading.
        layouts: of the layers.
        key: of the file.
        path: by which it can be opened again; None where it has no name.
    """
    # Only memory without a name is mapped to be written to: a device reads a file's mapping without.
    prot = mmap.PROT_READ if path is not None else mmap.PROT_READ | mmap.PROT_WRITE
    mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=prot)
    with warnings.catch_warnings():
        # Nothing writes to the tensor.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        memory = torch.frombuffer(mapped, dtype=torch.uint8)
    sizes, start = tuple(one.size for one in layouts), len(header_of(layouts, key))
    return Blocks(memory, tuple(start + sum(sizes[:number]) for number in range(len(sizes))), sizes, path)


def cached_blocks(
    folder: Path, name: str, layouts: Sequence[Layout], key: str, blocks: Makes, level: int = logging.WARNING
) -> Blocks | None:
    """The blocks of a base from its file, which is made where there is none: once, however many processes ask.

    Args:
        folder: of the files.
        name: of the base in messages.
        layouts: of the layers.
        key: of the file.
        blocks: called where they have to be made.
        level: of the line that says why the file cannot be made.

    Returns:
        None where the file cannot be made.
    """
    path = folder / f"{key}.safetensors"
    try:
        # A whole file stays as it is, so reading it needs no lock, which a folder of others may not let one take.
        if path.is_file() and is_whole(path, layouts, key):
            with path.open("rb") as file:
                return map_blocks(file, layouts, key, path)
        with _alone(folder / f"{key}.lock", name):
            if path.is_file() and not is_whole(path, layouts, key):
                broken = path.with_suffix(".broken")
                path.replace(broken)
                log.warning("%s is not whole; it is set aside as %s and made again", path, broken.name)
            if not path.is_file() and not _make(path, name, layouts, key, blocks, level):
                return None
            with path.open("rb") as file:
                return map_blocks(file, layouts, key, path)
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        log.log(
            level,
            "the quantised base is not kept: %s cannot be used (%s); model.base_cache names another folder",
            folder,
            reason,
        )
        return None


def _make(path: Path, name: str, layouts: Sequence[Layout], key: str, blocks: Makes, level: int) -> bool:
    """Write a file into its place; False where the disk has no room for it."""
    # Locks of some file systems hold on one machine alone, so each machine has a name of its own.
    partial = path.with_suffix(f".{socket.gethostname()}.tmp")
    for left in path.parent.glob(f"{key}.*.tmp"):
        if left == partial or time.time() - left.stat().st_mtime > SILENT:
            left.unlink(missing_ok=True)
    size, free = len(header_of(layouts, key)) + sum(one.size for one in layouts), free_bytes(path.parent)
    if size > free:
        log.log(
            level,
            "the quantised base is not kept: it is %s, and %s has %s free; model.base_cache names another folder",
            *(in_gb(size), path.parent, in_gb(free)),
        )
        return False
    log.info("quantising %s once, into %s: %s of %s free", name, path, in_gb(size), in_gb(free))
    with whole_or_absent(partial, path), partial.open("wb") as file:
        write_blocks(file, layouts, key, blocks())
    fsync_dir(path.parent)
    return True


@contextlib.contextmanager
def _alone(path: Path, name: str) -> Iterator[None]:
    """One process makes a file; others of the machine wait for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with timed(f"waiting for another process to quantise {name}"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def blocks_in_memory(layouts: Sequence[Layout], key: str, blocks: Makes, ranks: Ranks = ALONE) -> Blocks:
    """The blocks of a base in memory, as a file without a name, which the first rank of a machine makes for all of it.

    Args:
        layouts: of the layers.
        key: of the file.
        blocks: called once, by the rank that makes it.
        ranks: that all call this.

    Raises:
        UserError: there is not enough memory, or this rank does not see that of the first one.
    """
    try:
        file = None
        if ranks.rank == ranks.first:
            file = os.fdopen(os.memfd_create("qwen_lit"), "w+b")
            write_blocks(file, layouts, key, blocks())
        theirs = ranks.of_first(None if file is None else f"/proc/{os.getpid()}/fd/{file.fileno()}")
        if file is None:
            file = open(theirs, "r+b")
            if not is_whole(Path(theirs), layouts, key):
                raise OSError(f"{theirs} is of another process")
        with file:
            found = map_blocks(file, layouts, key, None)
            # The first one keeps it open until all have opened it.
            ranks.of_first(None)
            return found
    except (OSError, MemoryError) as error:
        size = in_gb(sum(one.size for one in layouts))
        raise UserError(
            f"the quantised base cannot be held in host memory, {size} ({error}); set model.base_cache to a folder."
        ) from error
