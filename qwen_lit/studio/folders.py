"""The folders that the page may read and write: what a browser names is resolved, and refused outside them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_lit.errors import UserError, shortened
from qwen_lit.names import HUB_NAME, expanded
from qwen_lit.run import is_model

HOME = ".qwen_lit_studio"
"""In the first folder: what the page keeps of itself."""
DATA = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".md")
"""Endings of files that hold rows."""
DEPTH = 4
"""Levels below a folder in which runs and models are looked for."""
MOST = 5000
"""Folders that are looked into."""


class Folders:
    """Folders given at the start."""

    def __init__(self, given: list[str]) -> None:
        """Resolves them.

        Args:
            given: one or more; the first one is where things are written.

        Raises:
            UserError: one is no folder.
        """
        self.roots = [Path(expanded(one)).resolve() for one in given]
        for one in self.roots:
            if not one.is_dir():
                raise UserError(f"--folder: no such folder: {one}; give one that is there.")

    @property
    def home(self) -> Path:
        """Where the page keeps its own files; made where there is none."""
        path = self.roots[0] / HOME
        path.mkdir(exist_ok=True)
        return self.inside(str(path))

    def inside(self, given: str) -> Path:
        """The path that is named, without links; a relative one counts from the first folder.

        Raises:
            UserError: it leads out of the folders, or is no path.
        """
        try:
            path = (self.roots[0] / expanded(given.strip())).resolve()
        except (OSError, RuntimeError, ValueError):
            raise UserError(f"not a path: {shortened(repr(given))}") from None
        if not given.strip() or not any(path.is_relative_to(root) for root in self.roots):
            raise UserError(f"outside the folders of this page: {shortened(given)}; start it with --folder for more.")
        return path

    def file(self, given: str) -> Path:
        """As ``inside``, for a file that is there.

        Raises:
            UserError: it is none.
        """
        path = self.inside(given)
        if not path.is_file():
            raise UserError(f"no such file: {shortened(given)}")
        return path

    def model(self, given: str) -> str:
        """A base model: a folder inside, as its path, or a name on the hub.

        Raises:
            UserError: it is neither.
        """
        name = given.strip()
        if HUB_NAME.match(name) and not (self.roots[0] / name).exists():
            return name
        path = self.inside(name)
        if not is_model(path):
            raise UserError(f"no model in {shortened(given)}; give a folder with config.json, or a name of the hub.")
        return str(path)

    def shown(self, path: Path) -> str:
        """The path from the first folder on, where it is in it."""
        return str(path.relative_to(self.roots[0])) if path.is_relative_to(self.roots[0]) else str(path)

    def walk(self) -> Iterator[Path]:
        """All folders in them, ``DEPTH`` levels down, without hidden ones and links."""
        waiting, seen = [(root, 0) for root in self.roots], 0
        while waiting and seen < MOST:
            folder, depth = waiting.pop(0)
            seen += 1
            yield folder
            if depth == DEPTH:
                continue
            try:
                entries = sorted(os.scandir(folder), key=lambda one: one.name)
            except OSError:
                continue
            for entry in entries:
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith((".", "__", "checkpoints")):
                    waiting.append((Path(entry.path), depth + 1))

    def models(self) -> list[str]:
        """Folders that hold a model with a tokenizer."""
        return [str(one) for one in self.walk() if is_model(one) and (one / "tokenizer_config.json").is_file()]

    def free_file(self, name: str, folder: str = "uploads") -> Path:
        """A path for a new file: the name without its folders, numbered where there is one.

        Args:
            name: as a browser gives it.
            folder: in ``home``.

        Raises:
            UserError: it is no file of rows.
        """
        plain = re.sub(r"[^\w.\- ]", "_", Path(name.replace("\\", "/")).name).lstrip(".")[-100:]
        base = Path(plain or "rows.jsonl")
        if base.suffix.lower() not in DATA:
            raise UserError(f"{shortened(name)} is no file of rows; give one of {', '.join(DATA)}.")
        target = self.home / folder
        target.mkdir(exist_ok=True)
        number, path = 1, target / base.name
        while path.exists():
            number += 1
            path = target / f"{base.stem}-{number}{base.suffix}"
        return path
