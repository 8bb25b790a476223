"""The files, folders and datasets that a configuration names, found and checked before any row is read."""

import logging
import math
from pathlib import Path
from typing import Any

from qwen_lit.data.faults import DataError
from qwen_lit.data.kinds import is_hub_name, passed_over
from qwen_lit.data.layouts import check_fields
from qwen_lit.data.sources import Source, as_sources, expand
from qwen_lit.errors import UserError
from qwen_lit.names import expanded

log = logging.getLogger(__name__)


def checked_sources(key: str, given: Any, cache: Path) -> list[Source]:
    """The sources of a key, each of which is there.

    Args:
        key: ``dataset_path`` or ``val_dataset_path``.
        given: its value.
        cache: folder for what is fetched from the hub.

    Raises:
        UserError: one is missing, or described wrongly.
    """
    try:
        sources = as_sources(given)
        for source in sources:
            check_fields(source.columns or {})
            if is_hub_name(source.path):
                from qwen_lit.data.hub import fetch

                source.copy = str(fetch(source, cache / "hub"))
            expand(source)
            folder = Path(expanded(source.path))
            if folder.is_dir() and (others := passed_over(folder)):
                log.warning("%s: not read: %s", source.path, ", ".join(others))
            if not 0 < source.weight < math.inf or (source.max_rows is not None and source.max_rows < 1):
                raise DataError(f"{source.path}: weight and max_rows must be above 0.")
    except DataError as error:
        raise UserError(f"data.{key}: {error}") from error
    return sources
