"""Model folders: streamed reading and writing, and atomic replacement."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import struct
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwen_lit.files import file_digest, fsync_dir
from qwen_lit.prequantized import dequantized, find_stored

log = logging.getLogger(__name__)
FLOATS = {"F64", "F32", "F16", "BF16"}
PRODUCER = "qwen_lit"
MARK = ".unfinished"
LIST = ".exported.json"
"""Of the files that an export has written, and what was in them."""
LARGE = 2**26
REMAP_BYTES = 2**30  # the mapping of a base shard is renewed after so many bytes, so that its pages leave the RSS
DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
TORCH = {text: dtype for dtype, text in DTYPES.items()}
"""Of the dtypes in the heads of safetensors files, those that a model's tensors have."""


class ExportError(ValueError):
    """An export that cannot be done; the message names the file or tensor at fault."""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ExportError: the file is missing, is not JSON, or is not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ExportError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path}: a JSON object is expected")
    return value


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON and fsync it; objects JSON has no form for are written as text."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, ensure_ascii=False, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def open_tensors(path: Path) -> Any:
    """Open (map) a safetensors file on the CPU.

    Raises:
        ExportError: it is missing or broken.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{path}: cannot be read as safetensors ({error})") from error


def _base_files(base_dir: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; each is a plain name inside it."""
    index = base_dir / "model.safetensors.index.json"
    if not index.is_file():
        if not (base_dir / "model.safetensors").is_file():
            raise ExportError(f"{base_dir}: neither model.safetensors nor {index.name}; a safetensors model is needed")
        return [base_dir / "model.safetensors"]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not name or name in (".", "..") or re.search(r"[/\\\0]", name):
            raise ExportError(f"{index}: shard name {name!r} is not a plain file name")
    return [base_dir / name for name in sorted(set(weight_map.values()))]


class BaseModel:
    """Names, shapes and tensors of a model's files; one shard is mapped at a time.

    What bitsandbytes has quantised in them is listed and read as the weights that products see, in bf16.
    """

    def __init__(self, base_dir: Path) -> None:
        self.where: dict[str, tuple[Path, str, list[int]]] = {}
        for path in _base_files(base_dir):
            with open_tensors(path) as handle:
                for name in handle.keys():
                    if name in self.where:
                        raise ExportError(f"{path}: {name} is in another shard too")
                    part = handle.get_slice(name)
                    self.where[name] = (path, part.get_dtype(), list(part.get_shape()))
        self._path: Path | None = None
        self._handle: Any = None
        self._read = 0
        self._files = {name: path for name, (path, _, _) in self.where.items()}
        try:
            self.stored = find_stored({name: shape for name, (_, _, shape) in self.where.items()}, self._get)
        except (ValueError, KeyError, TypeError) as error:
            raise ExportError(f"{base_dir}: {error}; fetch it again") from error
        """The weights that are quantised in the files."""
        for name, one in self.stored.items():
            self.where[name] = (self._files[name], "BF16", list(one.shape))
            for part in one.parts:
                del self.where[part]

    def widen(self) -> None:
        """Of files that are quantised, list what they hold in fp16 as bf16, in which it is computed."""
        if self.stored:
            self.where |= {
                name: (path, "BF16", shape) for name, (path, dtype, shape) in self.where.items() if dtype == "F16"
            }

    def get(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """The tensor as the file has it, backed by its mapping; a quantised weight as ``dequantized`` gives it.

        Args:
            name: of the tensor.
            device: where a quantised weight is computed; default the CPU.
        """
        one = self.stored.get(name)
        return self._get(name) if one is None else dequantized(name, one, self._get, device)

    def _get(self, name: str) -> torch.Tensor:
        path = self._files[name]
        if path != self._path or self._read > REMAP_BYTES:
            self._handle, self._path, self._read = open_tensors(path), path, 0
        tensor: torch.Tensor = self._handle.get_tensor(name)
        self._read += tensor.nbytes
        return tensor


def plan_shards(base: BaseModel, names: dict[str, str], limit: int) -> list[list[tuple[str, torch.dtype, list[int]]]]:
    """Group the output tensors into shards of at most ``limit`` bytes (one larger tensor is a shard by itself)."""
    shards: list[list[tuple[str, torch.dtype, list[int]]]] = [[]]
    room = limit
    for name, source in names.items():
        _, text, shape = base.where[source]
        if text not in TORCH:
            raise ExportError(f"{source}: dtype {text} is not one of an unquantised model")
        dtype = TORCH[text]
        size = math.prod(shape) * dtype.itemsize
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append((name, dtype, shape))
        room -= size
    return shards


class ShardWriter:
    """Writes one safetensors file whose tensors arrive one by one, in the declared order.

    Args:
        path: the file to make.
        entries: (name, dtype, shape) of each tensor.

    Raises:
        ExportError: a tensor differs from its declaration, or some are missing at the end.
    """

    def __init__(self, path: Path, entries: list[tuple[str, torch.dtype, list[int]]]) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "producer": PRODUCER}}
        offset = 0
        for name, dtype, shape in entries:
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._path, self._left = path, list(reversed(entries))
        self._partial = path.with_name(path.name + ".part")
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one CPU tensor of the declared name, dtype and shape."""
        if not self._left or self._left.pop() != (name, tensor.dtype, list(tensor.shape)):
            raise ExportError(f"{self._path}: {name} is not the tensor declared next")
        if tensor.numel():
            data: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                if self._left:
                    raise ExportError(f"{self._path}: {self._left[-1][0]} was not written")
                self._file.flush()
                os.fsync(self._file.fileno())
        if kind is None:
            # A shard that has its name is whole.
            self._partial.rename(self._path)


def check_replaceable(path: Path) -> None:
    """Accept a path that is absent, empty, or an earlier export of ours.

    Raises:
        ExportError: it is a file, or a folder that this package did not write.
    """
    if not path.exists():
        return
    if not path.is_dir():
        raise ExportError(f"{path}: is a file; the merged model needs a folder")
    if not any(path.iterdir()):
        return
    if not (path / "config.json").is_file():
        raise ExportError(f"{path}: not empty and not a model folder (no config.json); choose another output folder")
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as handle:
                ours = (handle.metadata() or {}).get("producer") == PRODUCER
        except (OSError, SafetensorError):
            ours = False
        if not ours:
            raise ExportError(f"{path}: {file.name} was not written by {PRODUCER}; choose another output folder")


def begin_folder(out_dir: Path, sources: list[Path], fingerprint: str) -> Path:
    """Make ``<out_dir>.tmp`` and return it; the whole shards of a killed export like this one stay in it.

    Args:
        out_dir: resolved path of the folder to be made.
        sources: resolved folders that are read during the export.
        fingerprint: what the export depends on.

    Raises:
        ExportError: the output would overwrite a source or a foreign folder.
    """
    tmp, old = out_dir.with_name(out_dir.name + ".tmp"), out_dir.with_name(out_dir.name + ".old")
    for source in sources:
        for path in (out_dir, tmp, old):
            if source == path or path in source.parents:
                raise ExportError(f"{out_dir}: would overwrite {source}, which is read; choose another output folder")
    check_replaceable(old)
    if old.exists() and not out_dir.exists():
        old.rename(out_dir)  # a swap was cut between its two renames
    check_replaceable(out_dir)
    if tmp.is_symlink() or tmp.is_file():
        raise ExportError(f"{tmp}: is in the way; remove it")
    mark = tmp / MARK
    if tmp.exists() and not (mark.is_file() and mark.read_text(encoding="utf-8") == fingerprint):
        shutil.rmtree(tmp)
    tmp.mkdir(parents=True, exist_ok=True)
    for path in tmp.iterdir():
        if path.suffix != ".safetensors":
            path.unlink() if path.is_file() else shutil.rmtree(path)
    mark.write_text(fingerprint, encoding="utf-8")
    return tmp


def shard_name(number: int, count: int) -> str:
    """The file name of a shard, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"


def _seal(path: Path) -> str:
    """What tells a file of ours from an edited one: the digest of a small file, the size of a large one."""
    size = path.stat().st_size
    return str(size) if size > LARGE else file_digest(path)


def _keep_own(tmp: Path, out_dir: Path) -> None:
    """Take the user's files of ``out_dir`` over into ``tmp``: those that were added, and ours that were edited.

    Where the export has a file of that name, it is written beside it as ``NAME.new``. What is ours says a list that
    the export leaves; of a folder without one, every file that the export writes again, and its weights.
    """
    old = out_dir / LIST
    listed = read_json(old) if old.is_file() else None
    kept = []
    for path in sorted(out_dir.iterdir()) if out_dir.is_dir() else []:
        new, name = tmp / path.name, path.name
        if name == LIST:
            continue
        if listed is None:
            if new.exists() or path.suffix == ".safetensors":
                continue
        elif path.is_file() and name in listed and _seal(path) == listed[name]:
            continue
        if new.exists():
            new.rename(new.with_name(f"{name}.new"))
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new, symlinks=True, copy_function=_link)
        else:
            _link(path, new)
        kept.append(name)
    ours = {path.name: _seal(path) for path in tmp.iterdir() if path.is_file() and path.name not in kept}
    write_json(tmp / LIST, ours)
    if kept:
        names = [f"{name} (the new one is {name}.new)" if f"{name}.new" in ours else name for name in kept]
        log.info("kept in %s, as they are yours: %s", out_dir, ", ".join(names))


def _link(source: Any, target: Any) -> None:
    """Hard-link a file under another name, or copy it where the disk has no links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def rewrite(out_dir: Path, name: str, text: str) -> None:
    """Write a text of a finished export again, beside the user's own where that stands in its place."""
    ours = read_json(out_dir / LIST)
    name = name if name in ours else f"{name}.new"
    partial = out_dir / f"{name}.tmp"
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out_dir / name)
    write_json(out_dir / LIST, ours | {name: _seal(out_dir / name)})


def commit_folder(tmp: Path, out_dir: Path) -> None:
    """Put the finished ``tmp`` in the place of ``out_dir``; of an earlier export there, the user's own files stay."""
    (tmp / MARK).unlink(missing_ok=True)
    _keep_own(tmp, out_dir)
    for file in tmp.iterdir():
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    fsync_dir(tmp)
    old = out_dir.with_name(out_dir.name + ".old")
    if old.exists():
        shutil.rmtree(old)
    if out_dir.exists():
        out_dir.rename(old)
    tmp.rename(out_dir)
    fsync_dir(out_dir.parent)
    if old.exists():
        shutil.rmtree(old)
