"""Which base model it is: recognised by what is in its files, wherever they lie."""

import functools
import hashlib
import json
import os
from pathlib import Path

from qwen_lit.hub import find, has_weights, is_folder
from qwen_lit.hub_libraries import Hub

PIECE, PIECES = 4096, 16
NAMING = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")
"""Keys of config.json that another version writes otherwise for the same weights."""


def fingerprint(name: str, hub: Hub = "huggingface") -> str | None:
    """A digest of config.json, and of the size, the header and some bytes of each file of weights; None where the
    files, or some of them, are not on this machine.
    """
    folder = find(name, hub)
    if folder is None or (not is_folder(name) and not has_weights(folder)):
        return None
    return _fingerprint(folder, os.stat(folder / "config.json").st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _fingerprint(folder: Path, changed: int) -> str:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        plain = {key: value for key, value in config.items() if key not in NAMING}
    except (ValueError, AttributeError):
        plain = {}
    digest = hashlib.sha256(json.dumps(plain, sort_keys=True).encode())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(PIECES):
                file.seek(max(0, size - PIECE) * number // (PIECES - 1))
                digest.update(file.read(PIECE))
    return digest.hexdigest()
