"""What a base model is called: a folder here, or a name on the hub; what ``~`` is in any path; and what stands beside
exported weights."""

import os
import re
from pathlib import Path

ADAPTER = "lora_adapter"
"""Folder of an adapter, beside that of the model it is merged into."""
TRAINING_CONFIG = "training_config.json"
"""Beside exported weights: the whole configuration that they were trained with."""
TRAINED_AT = "trained_at.json"
"""Beside an adapter's weights: the checkpoint, the step and the validation loss that they are of."""

HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$", re.ASCII)


def expanded(path: str) -> str:
    """The path with the home folder for ``~``, or ``~name``'s; as it is where there is none."""
    return os.path.expanduser(path) if path.startswith("~") else path


def hub_name(name: str) -> str | None:
    """The name, where it is one of the hub; None for a folder."""
    return name if HUB_NAME.match(name) and not Path(name).is_dir() else None


def base_reference(name: str) -> str:
    """The base as other tools find it from any folder: the absolute path of a folder, or the hub's name."""
    folder = Path(expanded(name))
    return str(folder.resolve()) if folder.is_dir() else name
