"""The two model hubs, each through its own library: where it is, what a model has, what is here of it already."""

import contextlib
import functools
import importlib
import io
import logging
import sys
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from qwen_lit.errors import UserError

Hub = Literal["huggingface", "modelscope"]
TIMEOUT = 10.0
"""Seconds without an answer."""


class HuggingFace:
    """huggingface_hub; ``HF_ENDPOINT``, ``HF_HOME``, ``HF_HUB_OFFLINE``, tokens and proxies are its own."""

    home = "HF_HOME"
    """The environment variable of the folder for what is fetched."""
    login = "hf auth login"

    @property
    def endpoint(self) -> str:
        """Its address."""
        return constants.ENDPOINT

    @property
    def cache(self) -> Path:
        """The folder of all models."""
        return Path(constants.HF_HUB_CACHE)

    @property
    def offline(self) -> bool:
        """Whether the user has forbidden the network."""
        return bool(constants.HF_HUB_OFFLINE)

    def folder(self, name: str) -> Path:
        """Where the files of a model are, or will be."""
        return self.cache / ("models--" + name.replace("/", "--"))

    def find(self, name: str) -> Path | None:
        """The folder with config.json and what else is here of the newest version that was fetched."""
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
        return Path(found).parent if isinstance(found, str) else None

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of the model; asks for a file as well, which can be refused or blocked by itself."""
        found = huggingface_hub.HfApi().model_info(name, files_metadata=True, timeout=TIMEOUT)
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, "config.json"), timeout=TIMEOUT)
        return {one.rfilename: one.size or 0 for one in found.siblings or []}

    def fetch(self, name: str, files: list[str]) -> Path:
        """Get these files; returns the folder with them."""
        shown = sys.stderr.isatty() or are_progress_bars_disabled()
        if not shown:
            disable_progress_bars()
        # Each of its attempts is a line, on a handler of its own and on ours.
        logger = logging.getLogger("huggingface_hub")
        level = logger.level
        logger.setLevel(logging.ERROR)
        try:
            return Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
        finally:
            logger.setLevel(level)
            if not shown:
                enable_progress_bars()


class ModelScope:
    """The package modelscope; ``MODELSCOPE_ENDPOINT``, ``MODELSCOPE_CACHE`` and tokens are its own."""

    home = "MODELSCOPE_CACHE"
    login = "modelscope login"
    offline = False

    def __init__(self) -> None:
        """Finds the package.

        Raises:
            UserError: it is not installed.
        """
        try:
            self.library: Any = importlib.import_module("modelscope")
            self.api: Any = importlib.import_module("modelscope.hub.api").HubApi()
            self.config: Any = importlib.import_module("modelscope_hub.config").get_default_config()
        except ImportError as error:
            raise UserError(
                "model.hub: modelscope needs the modelscope package: pip install 'qwen_lit[modelscope]', or set it to "
                "huggingface."
            ) from error
        # It says on a handler of its own what is said here.
        for logger in ("modelscope", "modelscope_hub"):
            logging.getLogger(logger).setLevel(logging.CRITICAL)

    @property
    def endpoint(self) -> str:
        """Its address."""
        return str(self.config.endpoint)

    @property
    def cache(self) -> Path:
        """The folder of all models."""
        return Path(self.config.cache_dir)

    def folder(self, name: str) -> Path:
        """Where the files of a model are, or will be."""
        return self.find(name) or self.cache / "models" / name.replace("/", "--")

    def find(self, name: str) -> Path | None:
        """The folder with config.json and what else is here."""
        try:
            found = Path(self.library.snapshot_download(name, local_files_only=True))
        except Exception:  # of its own kinds, for what is not there
            return None
        return found if (found / "config.json").is_file() else None

    def sizes(self, name: str) -> dict[str, int]:
        """Bytes of each file of the model."""
        found = self.api.get_model_files(name, recursive=True)
        return {one["Path"]: int(one.get("Size") or 0) for one in found if one.get("Type") != "tree"}

    def fetch(self, name: str, files: list[str]) -> Path:
        """Get these files; returns the folder with them."""
        # Its bars have no switch; in a log file they would be a line each.
        quiet = contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
        with quiet:
            return Path(self.library.snapshot_download(name, allow_file_pattern=files))


@functools.cache
def library(hub: Hub) -> HuggingFace | ModelScope:
    """The library of a hub.

    Raises:
        UserError: it is not installed.
    """
    return ModelScope() if hub == "modelscope" else HuggingFace()
