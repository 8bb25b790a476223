"""Checkpoint files: written in the background, whole or absent, found by step, and never executed."""

import contextlib
import hashlib
import json
import logging
import os
import pickle
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from qwen_lit.errors import UserError
from qwen_lit.files import file_digest, fsync_dir
from qwen_lit.model.optim import as_device_sees

log = logging.getLogger(__name__)
STEP_FILE = re.compile(r"^step=(\d+)\.ckpt$")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Copies a checkpoint to host memory, and writes it beside its target in a thread while training goes on.

    A file that is saved without ``storage_options``, as Lightning's own callbacks do, is there when the call returns:
    they link, read and remove it at once. ``failure`` is what the run's own last write ended with; ``wait`` lets a
    write end.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self.pending: Future[None] | None = None
        self.failure: OSError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Start writing ``checkpoint`` to ``path``; a kill at any moment leaves the old file or the new one.

        Args:
            checkpoint: tensors and plain values; all of it may change once this returns.
            path: the file.
            storage_options: ``manifest``, a dict to write beside it, and ``then``, called after a write that succeeds;
                without them it is written before this returns.

        Raises:
            OSError: it is written at once, and the disk refuses.
        """
        self.wait()
        if storage_options is None:
            manifest = {"step": checkpoint["global_step"], "epoch": checkpoint["epoch"]}
            write_checkpoint(to_host(checkpoint), Path(path), manifest)
            return
        options = storage_options
        task = (to_host(checkpoint), Path(path), options.get("manifest", {}), options.get("then"))
        self.pending = self.pool.submit(self._write, *task)

    def _write(
        self, checkpoint: dict[str, Any], path: Path, manifest: dict[str, Any], then: Callable[[float], None] | None
    ) -> None:
        started = time.perf_counter()
        try:
            write_checkpoint(checkpoint, path, manifest)
        except OSError as error:
            self.failure = error
            log.error("checkpoint %s could not be written (%s); the earlier ones stay, training goes on", path, error)
            return
        self.failure = None
        if then is not None:
            then(time.perf_counter() - started)

    def wait(self) -> None:
        """Let the write under way end."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint, or a folder of them, and its manifest."""
        self.wait()
        super().remove_checkpoint(path)
        manifest_of(Path(path)).unlink(missing_ok=True)

    def teardown(self) -> None:
        """No checkpoint is left half-written when the trainer ends."""
        self.wait()

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint of tensors and plain values.

        Raises:
            UserError: it holds anything else; pickled code is refused, never run.
        """
        self.wait()
        try:
            return torch.load(path, map_location=map_location or "cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path} is not a checkpoint of this program: it holds more than tensors and plain values, and "
                f"nothing of it was run ({reason}); remove it, or give another output_dir."
            ) from error


def to_host(value: Any) -> Any:
    """A copy of nested dicts, lists and tensors that shares no memory with the original, tensors on the CPU.

    Tensors on a GPU, and those that it shares with the host, are copied all at once into pinned memory.
    """
    shared = torch.cuda.is_available()
    on_gpu = [one for one in _tensors(value) if one.is_cuda or (shared and getattr(one, "is_paged", False))]
    copies = {id(one): torch.empty(one.shape, dtype=one.dtype, pin_memory=True) for one in on_gpu}
    for one in on_gpu:
        source = one if one.is_cuda else as_device_sees(one)
        copies[id(one)].copy_(source.detach(), non_blocking=True)
    if on_gpu:
        torch.cuda.synchronize()
    return _replaced(value, copies)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)


def _replaced(value: Any, copies: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return copies[id(value)] if id(value) in copies else value.detach().clone()
    if isinstance(value, dict):
        return {key: _replaced(one, copies) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_replaced(one, copies) for one in value)
    return value


class _Digested:
    """A file that keeps the SHA-256 of what passes through it."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256 = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        return int(self.file.write(data))

    def flush(self) -> None:
        self.file.flush()


def write_checkpoint(checkpoint: dict[str, Any], path: Path, manifest: dict[str, Any]) -> None:
    """Write a checkpoint and its manifest: flushed to disk, read back, then renamed into place.

    The manifest goes first: a checkpoint is never seen without one.

    Raises:
        OSError: the disk refuses, or returns other bytes than were written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, partial_manifest = (one.with_name(f"{one.name}.tmp-{os.getpid()}") for one in (path, manifest_of(path)))
    try:
        with partial.open("wb") as file:
            digested = _Digested(file)
            try:
                torch.save(checkpoint, cast(Any, digested))
            except RuntimeError as error:
                # torch closes its archive where the disk has refused, and then complains of the archive.
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise
            file.flush()
            os.fsync(file.fileno())
        digest, size = digested.sha256.hexdigest(), partial.stat().st_size
        if file_digest(partial) != digest:
            raise OSError(f"{partial}: the disk returned other bytes than were written")
        written = {**manifest, "sha256": digest, "bytes": size, "written": datetime.now(UTC).isoformat()}
        with partial_manifest.open("w", encoding="utf-8") as text:
            json.dump(written, text, indent=1, ensure_ascii=False)
            text.flush()
            os.fsync(text.fileno())
        os.replace(partial_manifest, manifest_of(path))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
        partial_manifest.unlink(missing_ok=True)
    fsync_dir(path.parent)


def manifest_of(path: Path) -> Path:
    """The manifest that stands beside a checkpoint."""
    return path.with_suffix(".json")


def step_of(path: Path) -> int | None:
    """Optimizer steps done at a checkpoint; None where neither its manifest nor the file tells."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(manifest_of(path).read_text(encoding="utf-8"))["step"])
    # A damaged file is reported where it is restored.
    with contextlib.suppress(OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError):
        return int(torch.load(path, map_location="cpu", mmap=True, weights_only=True)["global_step"])
    return None


def best_of(path: Path) -> dict[str, float]:
    """``val_loss`` of a checkpoint that was the best when it was written; empty for any other.

    Args:
        path: of a whole checkpoint.
    """
    state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    own = state.get("callbacks", {}).get("RunCheckpoint", {})
    return {"val_loss": float(own["best"])} if own.get("best_step") == state["global_step"] else {}


def is_whole(path: Path) -> bool:
    """Whether a checkpoint has the size and digest of its manifest; without one, whether its archive is sound."""
    try:
        if manifest_of(path).is_file():
            manifest = json.loads(manifest_of(path).read_text(encoding="utf-8"))
            return path.stat().st_size == manifest["bytes"] and file_digest(path) == manifest["sha256"]
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, NotImplementedError, EOFError):
        return False


def step_files(folder: Path) -> list[Path]:
    """Step checkpoints in ``folder``, newest step first; the clock plays no part."""
    found = [(int(match[1]), path) for path in folder.glob("*.ckpt") if (match := STEP_FILE.match(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def remove(path: Path) -> None:
    """Remove a checkpoint and its manifest."""
    path.unlink(missing_ok=True)
    manifest_of(path).unlink(missing_ok=True)


def clear_partial(folder: Path) -> None:
    """Remove what killed writes have left."""
    for path in folder.glob("*.tmp-*"):
        path.unlink(missing_ok=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint by step; damaged ones are named and set aside as ``.corrupt``.

    Raises:
        UserError: there are checkpoints, but none is whole.
    """
    files = step_files(folder)
    for number, path in enumerate(files):
        if is_whole(path):
            return path
        instead = files[number + 1].name if number + 1 < len(files) else "none is left"
        log.warning("%s is damaged; it is set aside as %s.corrupt, next is %s", path, path.name, instead)
        for one in (path, manifest_of(path)):
            with contextlib.suppress(FileNotFoundError):  # another rank was first
                one.rename(one.with_name(one.name + ".corrupt"))
    if files or list(folder.glob("step=*.ckpt.corrupt")):
        raise UserError(
            f"no checkpoint in {folder} is whole; to start over, give another output_dir or remove that folder."
        )
    return None
