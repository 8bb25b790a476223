"""Whether the disk has room for what an export will write, asked before training."""

from pathlib import Path
from typing import Any

from qwen_lit.errors import UserError
from qwen_lit.export.kquants import gguf_bytes
from qwen_lit.hub import free_bytes, in_gb, stored_bytes
from qwen_lit.model.load import count_parameters
from qwen_lit.run import PARTIAL


def check_space(merged: Path, base: Path, config: Any, gguf: str | None) -> None:
    """Refuse a run whose merged model the disk has no room for.

    Args:
        merged: the folder to be made; what a killed export has left beside it is written over.
        base: folder of the base.
        config: of its language model.
        gguf: kind of the GGUF file; null for none.

    Raises:
        UserError: with what is needed and what is there.
    """
    numbers = count_parameters(config)
    need = max(stored_bytes(base), 2 * numbers)
    if gguf is not None:
        need += gguf_bytes(gguf, numbers)
    left = merged.with_name(merged.name + PARTIAL)
    free = free_bytes(merged) + sum(file.stat().st_size for file in left.glob("*") if file.is_file())
    if need > free:
        raise UserError(
            f"export.merge: {merged} will take {in_gb(need)}, and its disk has {in_gb(free)} free; make room, set "
            "output_dir to a folder on a larger disk, or set export.merge to false."
        )
