"""Datasets of the hub by their name, through ``datasets``: a copy of each is kept beside the prepared rows."""

import contextlib
import hashlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

from qwen_lit.data.faults import DataError
from qwen_lit.data.sources import Source
from qwen_lit.errors import shortened

log = logging.getLogger(__name__)
PATIENCE = 10
"""Seconds in which the hub has to answer."""


def fetch(source: Source, folder: Path) -> Path:
    """The rows of a dataset of the hub as a Parquet file, which is made once for each of its revisions.

    Args:
        source: its path is a name, as tatsu-lab/alpaca.
        folder: for copies.

    Returns:
        The file; the newest copy, where the hub is not reached.

    Raises:
        DataError: there is no such dataset, configuration, split or column, or the hub is not reached.
    """
    asked = repr([source.path, source.name, source.split])
    stem = source.path.replace("/", "--") + "-" + hashlib.sha256(asked.encode()).hexdigest()[:12]
    revision, why = _revision(source.path)
    if revision is None:
        copies = sorted(folder.glob(f"{stem}-*.parquet"), key=lambda path: path.stat().st_mtime)
        if not copies:
            raise _not_reached(source.path, why)
        log.warning("%s: the hub is not reached (%s); the copy of an earlier run is used", source.path, why)
        path = copies[-1]
    else:
        path = folder / f"{stem}-{revision[:16]}.parquet"
        if not path.is_file():
            _write(_load(source, revision), path)
        with contextlib.suppress(OSError):
            # The newest copy is what is used where the hub is not reached.
            path.touch()
    _check_columns(source, path)
    return path


def endpoint() -> str:
    """The address of the hub."""
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _revision(name: str) -> tuple[str | None, str]:
    """The newest commit of a dataset; None, and why, where the hub is not reached.

    Raises:
        DataError: there is none of that name, or it is not for everyone.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, HFValidationError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        return str(HfApi().dataset_info(name, timeout=PATIENCE).sha), ""
    except OfflineModeIsEnabled:
        return None, "HF_HUB_OFFLINE is set"
    except GatedRepoError as error:
        page = f"{endpoint()}/datasets/{name}"
        raise DataError(f"{name} is gated: ask for access on {page}, and run hf auth login.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"no such dataset: {name}; it is no file or folder here, and {endpoint()} has none of that name that "
            "everyone can read."
        ) from error
    except Exception as error:  # whatever its HTTP library raises
        return None, shortened(" ".join(str(error).split()) or type(error).__name__, 100)


def _not_reached(name: str, why: str) -> DataError:
    if why.startswith("HF_HUB_OFFLINE"):
        remedy = "unset it"
    else:
        remedy = "set HF_ENDPOINT to a mirror, as https://hf-mirror.com, or download its files and give their path"
    return DataError(
        f"no such dataset: {name}; it is no file or folder here, and the hub {endpoint()} is not reached ({why}) to "
        f"look for one of that name; {remedy}."
    )


def _load(source: Source, revision: str) -> Any:
    """The dataset of a source.

    Raises:
        DataError: it cannot be loaded as asked; names what there is.
    """
    # Its requests are few by now, and a hub that does not answer is reported soon.
    os.environ.setdefault("HF_HUB_ETAG_TIMEOUT", str(PATIENCE))
    import datasets
    from datasets import get_dataset_config_names, get_dataset_split_names, load_dataset

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # It has much to say of a card without metadata.
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
    name, known = source.path, {"revision": revision}
    try:
        configs = get_dataset_config_names(name, **known)
        if source.name not in (None, *configs):
            raise DataError(f"{name}: has no configuration {source.name!r}; it has {', '.join(configs)}.")
        if source.name is None and len(configs) > 1 and "default" not in configs:
            raise DataError(f"{name}: has several configurations; set name to one of {', '.join(configs)}.")
        splits = get_dataset_split_names(name, source.name or (configs[0] if len(configs) == 1 else None), **known)
        split = source.split or ("train" if "train" in splits else splits[0] if len(splits) == 1 else "")
        parts = [part.partition("[")[0].strip() for part in split.split("+")]
        if not split or any(part not in splits for part in parts):
            what = f"has no split {split!r}; it has" if split else "has several splits; set split to one of"
            raise DataError(f"{name}: {what} {', '.join(splits)}.")
        return load_dataset(name, source.name, split=split, **known)
    except DataError:
        raise
    except Exception as error:  # of its many libraries
        reason = shortened(" ".join(str(error).split()) or type(error).__name__)
        raise DataError(
            f"{name}: cannot be loaded ({reason}); try again, set HF_ENDPOINT to a mirror, or download its files and "
            "give their path."
        ) from error


def _write(dataset: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    try:
        dataset.to_parquet(str(partial))
        partial.rename(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); set data.cache_dir.") from error
    finally:
        partial.unlink(missing_ok=True)


def _check_columns(source: Source, path: Path) -> None:
    """Each column that a source maps is there.

    Raises:
        DataError: naming those that are.
    """
    import pyarrow.parquet

    there = pyarrow.parquet.read_schema(path).names
    missing = [theirs for theirs in (source.columns or {}).values() if theirs not in there]
    if missing:
        raise DataError(f"{source.path}: has no column {missing[0]!r}; it has {', '.join(there)}.")
