"""What is chosen on the page, and the YAML that it becomes: the page trains nothing but what that file says."""

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from qwen_lit.errors import UserError
from qwen_lit.run import read_object
from qwen_lit.studio.folders import Folders

Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]


@dataclass
class Source:
    """A file of rows in a mixture."""

    path: str
    weight: float = 1.0
    """How often its rows come for each that it has."""


@dataclass
class Draft:
    """The fields of the page."""

    sources: list[Source] = field(default_factory=list)
    val_path: str = ""
    """A file of validation rows; empty takes ``val_size`` of the training rows."""
    val_size: float = 0.05
    max_length: int = 2048
    packing: bool = False
    on_bad_row: str = "error"
    model: str = ""
    load_in_4bit: bool = True
    r: int = 16
    lora_alpha: int = 32
    learning_rate: float = 2e-4
    batch_size: int = 1
    accumulate: int = 8
    epochs: int = 3
    output_dir: str = "output/studio"
    merge: bool = True
    memory_budget: str = ""
    """Card for which a plan is asked, such as 8GiB; empty takes the card of this machine, or usual ones."""

    @classmethod
    def read(cls, path: Path) -> "Draft":
        """As it was last kept; a field that is not of its kind is as at the start."""
        found, draft = read_object(path), cls()
        for one in dataclasses.fields(cls):
            value = found.get(one.name)
            if one.name == "sources":
                draft.sources = _sources(value)
            elif type(value) is type(getattr(draft, one.name)):
                setattr(draft, one.name, value)
        return draft

    def keep(self, path: Path) -> None:
        """Write it, whole or not at all."""
        partial = path.with_suffix(".tmp")
        partial.write_text(json.dumps(dataclasses.asdict(self), ensure_ascii=False), encoding="utf-8")
        os.replace(partial, path)

    def config(self, folders: Folders) -> dict[str, Value]:
        """The configuration, with absolute paths.

        Args:
            folders: in which all of its paths must lie.

        Raises:
            UserError: something is missing, or lies elsewhere.
        """
        if not self.sources:
            raise UserError("no rows are chosen; drop a file or give a path.")
        if not self.model.strip():
            raise UserError("no model is chosen; choose one, or give a folder or a name of the hub.")
        paths = [str(folders.file(one.path)) for one in self.sources]
        mixed = len(paths) > 1 or self.sources[0].weight != 1
        listed: list[Value] = [
            {"path": path, "weight": one.weight} for path, one in zip(paths, self.sources, strict=True)
        ]
        data: dict[str, Value] = {
            "dataset_path": listed if mixed else paths[0],
            "batch_size": self.batch_size,
            "max_length": self.max_length,
            "packing": self.packing,
            "on_bad_row": self.on_bad_row,
        }
        if self.val_path.strip():
            data["val_dataset_path"] = str(folders.file(self.val_path))
        else:
            data["val_size"] = self.val_size
        return {
            "output_dir": str(folders.inside(self.output_dir)),
            "trainer": {
                "max_epochs": self.epochs,
                "accumulate_grad_batches": self.accumulate,
                "precision": "bf16-mixed",
                "gradient_clip_val": 1.0,
                "log_every_n_steps": 1,
            },
            "model": {
                "model_name_or_path": folders.model(self.model),
                "quantization_config": {
                    "load_in_4bit": self.load_in_4bit,
                    "bnb_4bit_quant_type": "nf4",
                    "bnb_4bit_compute_dtype": "bfloat16",
                    "bnb_4bit_use_double_quant": True,
                },
                "lora_config": {"r": self.r, "lora_alpha": self.lora_alpha, "lora_dropout": 0.0},
                "learning_rate": self.learning_rate,
            },
            "data": data,
            "export": {"merge": self.merge},
        }

    def write(self, folders: Folders) -> Path:
        """Write the YAML; returns its path, which is named by the output folder.

        Raises:
            UserError: of ``config``.
        """
        config = self.config(folders)
        name = Path(str(config["output_dir"])).name
        path = folders.home / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False, allow_unicode=True), encoding="utf-8")
        return path


def _sources(value: object) -> list[Source]:
    if not isinstance(value, list):
        return []
    found = [one for one in value if isinstance(one, dict) and isinstance(one.get("path"), str)]
    return [Source(one["path"], _weight(one.get("weight"))) for one in found]


def _weight(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 1.0
