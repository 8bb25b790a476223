"""Where a base's files are, and getting them from a hub, which nothing else of this program does."""

import contextlib
import fnmatch
import json
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from qwen_lit.errors import UserError, shortened
from qwen_lit.hub_failure import unreached
from qwen_lit.hub_libraries import TIMEOUT, Hub, HuggingFace, ModelScope, library
from qwen_lit.names import HUB_NAME, expanded
from qwen_lit.progress import Progress, meanwhile, timed
from qwen_lit.signals import Interrupted

log = logging.getLogger(__name__)
T = TypeVar("T")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SMALL = ("*.json", "*.jinja", "*.txt", "*.tiktoken", "*.model")
"""Configuration and tokenizer; of folders in a model, only chat templates are needed."""
TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZERS = ("tokenizer.json", "vocab.json", "qwen.tiktoken")


def is_folder(name: str) -> bool:
    """Whether the base is a local folder; ``~`` is the home folder."""
    return os.path.isdir(expanded(name))


def check_model_path(name: str) -> None:
    """Reject a base that cannot be one, from its folder alone.

    Raises:
        UserError: no such folder, no ``config.json`` in it, or a name that is neither a folder nor a hub name.
    """
    folder = Path(expanded(name))
    if is_folder(name):
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model_name_or_path: {name} has no config.json; give the folder that holds the model's files."
            )
        if lacks := [one for one in shards(folder) if not (folder / one).is_file()]:
            raise UserError(f"model_name_or_path: {folder} lacks {lacks[0]}, which its index names; fetch it again.")
    elif not HUB_NAME.match(name) or os.path.isdir(folder.parent):
        path = f" ({folder.parent} is a folder here, so this is taken for a path)" * bool(HUB_NAME.match(name))
        raise UserError(
            f"model_name_or_path: no such folder: {shortened(name)}{path}; give a folder with config.json, or a hub "
            "name like Qwen/Qwen2.5-7B-Instruct."
        )


def shards(folder: Path) -> list[str]:
    """The files that a folder's index names; empty where there is none.

    Raises:
        UserError: it is not an index, or names a file outside the folder.
    """
    index = folder / INDEX
    if not index.is_file():
        return []
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
        names = sorted(set(map(str, content["weight_map"].values())))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model_name_or_path: {index} is not an index of shards ({error}); fetch it again.") from error
    for name in names:
        if Path(name).name != name:
            raise UserError(f"model_name_or_path: {index} names {name!r}, outside its folder; nothing of it is read.")
    return names


def has_weights(folder: Path) -> bool:
    """Whether all weights are there."""
    return all((folder / one).is_file() for one in shards(folder) or [SINGLE])


def stored_bytes(folder: Path) -> int:
    """Bytes of all weights, those that are yet to be fetched included; 0 where neither files nor index tell."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"])
    there = shards(folder) or [SINGLE]
    return sum((folder / one).stat().st_size for one in there) if has_weights(folder) else 0


def missing_bytes(folder: Path, all_of_them: int) -> int:
    """Bytes of weights that are yet to be fetched.

    Args:
        folder: of the base.
        all_of_them: bytes of all weights, for a model without an index that says so.
    """
    there = [(folder / one).stat().st_size for one in shards(folder) or [SINGLE] if (folder / one).is_file()]
    if has_weights(folder):
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        all_of_them = int(json.loads((folder / INDEX).read_text(encoding="utf-8"))["metadata"]["total_size"])
    return max(0, all_of_them - sum(there))


def find(name: str, hub: Hub = "huggingface") -> Path | None:
    """The folder of a base, if its config.json is on this machine: itself, or the hub's copy."""
    folder = Path(expanded(name))
    if (folder / "config.json").is_file():
        return folder
    if not HUB_NAME.match(name) or folder.is_dir():
        return None
    try:
        return library(hub).find(name)
    except UserError:
        return None


def fetch(name: str, hub: Hub = "huggingface", weights: bool = False) -> Path:
    """The folder of a base with its config and tokenizer; what is not on this machine is fetched, by one process.

    What is here is used as it is, and no hub is asked.

    Args:
        name: a folder, or a hub name.
        hub: which hub.
        weights: the weights as well.

    Raises:
        UserError: there is no such model, it does not fit the disk, or the hub is not reached.
    """
    check_model_path(name)
    if is_folder(name):
        return Path(expanded(name))
    source = library(hub)
    if (found := _whole(source, name, weights)) is not None:
        return found
    if source.offline:
        if not weights and (found := source.find(name)) is not None:
            return found
        raise UserError(
            f"model_name_or_path: {name} is not all in {source.cache}, and HF_HUB_OFFLINE is set; unset it to fetch "
            "the model, or give a folder of this machine."
        )
    with _alone(source, name) as waited:
        if (found := _whole(source, name, weights)) is not None:
            return found
        if waited and os.environ.get("LOCAL_RANK", "0") not in ("", "0"):
            raise UserError(f"model_name_or_path: {name} was not fetched by the first process, which says why.")
        return _fetch(source, name, weights)


def _whole(source: HuggingFace | ModelScope, name: str, weights: bool) -> Path | None:
    """The folder, if nothing that is needed is missing."""
    folder = source.find(name)
    if folder is None or not any((folder / one).is_file() for one in TOKENIZERS):
        return None
    there = (folder / "tokenizer_config.json").is_file() and (not weights or has_weights(folder))
    return folder if there else None


@contextlib.contextmanager
def _alone(source: HuggingFace | ModelScope, name: str) -> Iterator[bool]:
    """Holds a lock on the model, and gives whether another process had it."""
    try:
        source.cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(source.cache / f".{name.replace('/', '--')}.lock")
        try:
            lock.acquire(timeout=0)
            waited = False
        except Timeout:
            with timed(f"waiting for another process to fetch {name}"):
                lock.acquire()
            waited = True
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"model_name_or_path: {source.cache} cannot be written ({getattr(error, 'strerror', None) or error}); set "
            f"{source.home} to a folder that can."
        ) from error
    try:
        yield waited
    finally:
        lock.release()


def _fetch(source: HuggingFace | ModelScope, name: str, weights: bool) -> Path:
    try:
        # A resolver that is silent, or several addresses of a host, take longer than the library's own timeout.
        sizes = within(TIMEOUT, lambda: source.sizes(name))
    except Exception as error:  # each library has kinds of its own
        raise UserError(f"model_name_or_path: {unreached(source, name, error)}") from error
    files = [
        one
        for one in sizes
        if fnmatch.fnmatch(one, TEMPLATES)
        or "/" not in one
        and any(fnmatch.fnmatch(one, pattern) for pattern in SMALL)
    ]
    if "config.json" not in files:
        raise UserError(f"model_name_or_path: {name} on {source.endpoint} has no config.json; give another model.")
    folder = _get(source, name, files, sizes, "config and tokenizer")
    if not weights:
        return folder
    wanted = shards(folder) or [SINGLE]
    if lacks := [one for one in wanted if one not in sizes]:
        raise UserError(
            f"model_name_or_path: {name} on {source.endpoint} has no {lacks[0]}, and weights are read from "
            "safetensors alone; give a model that has them."
        )
    return _get(source, name, [*files, *wanted], sizes, "weights")


def _get(source: HuggingFace | ModelScope, name: str, files: list[str], sizes: dict[str, int], what: str) -> Path:
    """Fetch files; how much, from where and to where is said before.

    Raises:
        UserError: they do not fit the disk, or it was interrupted.
    """
    there = source.find(name)
    missing = [one for one in files if there is None or not (there / one).is_file()]
    size = sum(sizes[one] for one in missing)
    if there is not None:
        # What ModelScope's library goes on with.
        size -= sum(part.stat().st_size for one in missing if (part := there / f"{one}.incomplete").is_file())
    if there is not None and not missing:
        return there
    free = free_bytes(source.cache)
    if size > free:
        raise UserError(
            f"model_name_or_path: the {what} of {name} are {in_gb(size)}, and {source.cache} has {in_gb(free)} free; "
            f"make room, or set {source.home} to a folder on a larger disk."
        )
    log.info(
        "fetching %s from %s: %s, %s, into %s, which has %s free",
        name,
        source.endpoint,
        what,
        in_gb(size),
        source.cache,
        in_gb(free),
    )
    folder = source.folder(name)
    before = _partial(folder)
    try:
        with _growing(folder, size, f"fetching {name}"):
            return within(None, lambda: source.fetch(name, files))
    except Interrupted as stop:
        # The library's threads would finish their files first; a part with this process's number serves no other.
        for one in _partial(folder) - before:
            if isinstance(source, HuggingFace) and "." in one.stem:
                one.unlink(missing_ok=True)
        log.warning("stopped; files that are whole stay, and the same command fetches the rest")
        os._exit(stop.exit_code)
    except Exception as error:
        raise UserError(f"model_name_or_path: {unreached(source, name, error, begun=True)}") from error


def _partial(folder: Path) -> set[Path]:
    """Files that are being fetched."""
    return set(folder.rglob("*.incomplete"))


@contextlib.contextmanager
def _growing(folder: Path, total: int, what: str) -> Iterator[None]:
    """In a log file, how far a download is, by how much a folder grows; on a terminal the library shows a bar."""
    if sys.stderr.isatty():
        yield
        return
    progress, before = Progress(what, total, "B"), _size(folder)
    with meanwhile(lambda: progress.advance(_size(folder) - before - progress.done), 1.0, 1.0):
        yield


def _size(folder: Path) -> int:
    """Bytes on the disk of all files below a folder."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            stat = path.lstat()
            # A file may get its length before its content.
            total += min(stat.st_size, stat.st_blocks * 512)
    return total


def within(seconds: float | None, work: Callable[[], T]) -> T:
    """What a function returns or raises, in a thread that is left behind when time is up or a signal comes.

    Raises:
        TimeoutError: it takes longer.
    """
    result: list[T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="hub", daemon=True)
    thread.start()
    end = None if seconds is None else time.monotonic() + seconds
    while thread.is_alive() and (end is None or time.monotonic() < end):
        thread.join(0.5)
    if raised:
        raise raised[0]
    if not result:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return result[0]


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk on which a folder is, or will be."""
    path = Path(expanded(str(folder))).absolute()
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free


def in_gb(size: int) -> str:
    """Bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 5e6 else f"{size / 1e6:.2f} MB"
