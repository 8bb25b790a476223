"""What an adapter was trained with, from its checkpoint or its folder: that is what it is used with."""

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from safetensors import SafetensorError, safe_open

from qwen_lit.config import LoraSection
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import CONVERTED_MARKER, RESIDUAL_INITS, saved_name
from qwen_lit.families.wrappers import for_language_model, weight_for_language_model
from qwen_lit.model.base import fingerprint
from qwen_lit.model.load import empty_model, put_adapter
from qwen_lit.model.resume import FREE, canonical, differences, meaning, stored
from qwen_lit.names import expanded
from qwen_lit.run import Run, is_adapter, training_config

log = logging.getLogger(__name__)
NAME = "model_name_or_path"


@dataclasses.dataclass
class Trained:
    """What is known of an adapter."""

    source: Path
    """A checkpoint of ours, or an adapter folder."""
    lora: dict[str, Any]
    """Fields of PEFT's LoraConfig."""
    base: str | None
    """The base's folder or hub name."""
    fingerprint: str | None
    """Digest of the base's files, as of ``model.base.fingerprint``; None where it is not known."""
    config: dict[str, Any]
    """The whole configuration of its run; empty where it is not known."""


def read(source: Path) -> Trained:
    """What a checkpoint or an adapter folder says of itself.

    Raises:
        UserError: it is neither.
    """
    if source.is_file():
        then = stored(source)
        if not then:
            raise UserError(f"{source} is not a checkpoint of this program; give one, or an adapter folder.")
        config = then.get("config", {})
        prefix = "model.lora_config."
        shape = {key.removeprefix(prefix): one for key, one in then["frozen"].items() if key.startswith(prefix)}
        lora = config.get("model", {}).get("lora_config") or shape
        base = config.get("model", {}).get(NAME) or then.get("free", {}).get(f"model.{NAME}")
        return Trained(source, lora, base, then.get("base"), config)
    try:
        said = for_language_model(json.loads((source / "adapter_config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: its adapter_config.json cannot be read ({error}).") from error
    if str(said.get("peft_type")).upper() != "LORA":
        raise UserError(f"{source}: is a {said.get('peft_type')} adapter; only LoRA adapters are used here.")
    known = {one.name for one in dataclasses.fields(LoraSection)}
    lora = {key: value for key, value in said.items() if key in known and meaning(f"model.lora_config.{key}") != FREE}
    config = training_config(source)
    # The same targets in the user's own words, such as all-linear.
    written = config.get("model", {}).get("lora_config", {}).get("target_modules")
    if isinstance(written, str):
        lora["target_modules"] = written
    return Trained(source, lora, said.get("base_model_name_or_path"), None, config)


def find_adapter(given: str) -> Path:
    """The adapter folder or checkpoint that ``model.init_adapter`` means.

    Raises:
        UserError: it is neither.
    """
    path = Path(expanded(given))
    for folder in (path, Run(path).adapter):
        if is_adapter(folder):
            return folder
    if not path.is_file():
        what = "is no adapter folder" if path.is_dir() else "does not exist"
        raise UserError(f"model.init_adapter: {given} {what}; give a lora_adapter/ folder, or a checkpoint.")
    return path


def take_over(model: Any, trained: Trained) -> None:
    """Let a configuration's section ``model`` be what an adapter was trained with; each difference is logged.

    Args:
        model: the section; changed in place.
        trained: the adapter.

    Raises:
        UserError: the base it was trained on is not there, and the configuration names another.
    """
    take_base(model, trained)
    given = as_plain(model)
    whole = trained.config.get("model", {})
    kept = {"lora_config": trained.lora}
    if "quantization_config" in whole:
        kept["quantization_config"] = whole["quantization_config"]
    changes = differences(canonical({"model": kept}), canonical({"model": {k: given.get(k) for k in kept}}))
    for key, (then, now) in changes.items():
        if meaning(key) != FREE and not key.endswith("lora_dropout"):
            log.warning("%s: trained with %s, the configuration says %s; what was trained is taken", key, then, now)
    for key, value in trained.lora.items():
        model.lora_config[key] = value
    if "quantization_config" in whole:
        held = whole["quantization_config"]
        model.quantization_config = Namespace(**held) if held else None


def take_base(model: Any, trained: Trained) -> None:
    """The base that an adapter was trained on, or the same in another place.

    Raises:
        UserError: it is not there, and the configuration names another.
    """
    given, base = model[NAME], trained.base
    hub = trained.config.get("model", {}).get("hub") or model["hub"]
    if base is None or Path(expanded(given)).resolve() == Path(expanded(base)).resolve():
        model["hub"] = hub
        return
    there, mine = fingerprint(base, hub), fingerprint(given, model["hub"])
    then = trained.fingerprint or there
    if then is not None and then == mine:
        return
    if there is not None and trained.fingerprint in (None, there):
        log.warning("the adapter of %s was trained on %s, not on %s; %s is taken", trained.source, base, given, base)
        model[NAME], model["hub"] = base, hub
        return
    if then is not None and mine is not None:
        raise UserError(
            f"model.{NAME}: {trained.source} was trained on {base}, which is not there any more, and {given} is "
            "another model; give the one it was trained on."
        )
    log.warning(
        "the adapter of %s was trained on %s, which is not on this machine; %s is taken, and cannot be compared with "
        "it",
        trained.source,
        base,
        given,
    )


def begin_from(model: Any, trained: Trained) -> None:
    """Let the LoRA settings of a new run be those of the adapter it starts from.

    Args:
        model: the section of the configuration; changed in place.
        trained: the adapter.

    Raises:
        UserError: the configuration says another LoRA or another base, or the adapter changes its base.
    """
    init = str(trained.lora.get("init_lora_weights", "")).lower()
    if init.startswith(RESIDUAL_INITS) and not (trained.source / CONVERTED_MARKER).is_file():
        raise UserError(
            f"model.init_adapter: {trained.source} was initialised by {init}, which changes the base; give the "
            "lora_adapter/ of that run, which is converted."
        )
    given, plain = as_plain(model)["lora_config"], dataclasses.asdict(LoraSection())
    wanted = {"model": {"lora_config": trained.lora}}
    changes = differences(canonical(wanted), canonical({"model": {"lora_config": given}}))
    for key, (then, now) in changes.items():
        name = key.removeprefix("model.lora_config.")
        if meaning(key) == FREE or name == "lora_dropout" or now in (plain.get(name), None):
            continue
        raise UserError(
            f"{key} is {now}, but the adapter of model.init_adapter was trained with {then}; leave it out: what the "
            "adapter was trained with is taken from it."
        )
    for key, value in trained.lora.items():
        if key != "lora_dropout":
            model.lora_config[key] = value
    if trained.base is None:
        return
    hub = trained.config.get("model", {}).get("hub") or model["hub"]
    then = trained.fingerprint or fingerprint(trained.base, hub)
    now = fingerprint(model[NAME], model["hub"])
    if then and now and then != now:
        raise UserError(
            f"model.{NAME} is {model[NAME]}, but the adapter of model.init_adapter was trained on {trained.base}; "
            "start from an adapter of the same base."
        )
    if then is None and trained.base != model[NAME]:
        log.warning(
            "model.init_adapter was trained on %s, which is not on this machine; %s cannot be compared with it",
            trained.base,
            model[NAME],
        )


def as_plain(model: Any) -> dict[str, Any]:
    """The section as nested dicts."""
    return {key: value.as_dict() if isinstance(value, Namespace) else value for key, value in model.as_dict().items()}


def weights(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint or an adapter folder, by the names of an adapter's file.

    Raises:
        UserError: they cannot be read.
    """
    try:
        if source.is_file():
            state = torch.load(source, map_location="cpu", weights_only=True)["state_dict"]
            return {saved_name(name): tensor.contiguous() for name, tensor in state.items()}
        with safe_open(source / "adapter_model.safetensors", framework="pt") as file:
            return {weight_for_language_model(name): file.get_tensor(name) for name in file.keys()}
    except (OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{source}: its weights cannot be read ({error}).") from error


def check_shapes(config: Any, lora: Any, source: Path) -> None:
    """Refuse an adapter that does not fit the model, before the base is loaded.

    Args:
        config: of the base model.
        lora: PEFT's LoraConfig.
        source: a checkpoint or an adapter folder.

    Raises:
        UserError: names or shapes differ.
    """
    with torch.device("meta"):
        model = put_adapter(empty_model(config), dataclasses.replace(lora))
    mine = {saved_name(name): p.shape for name, p in model.named_parameters() if p.requires_grad}
    theirs = {name: tensor.shape for name, tensor in weights(source).items()}
    wrong = sorted(name for name in mine.keys() | theirs.keys() if mine.get(name) != theirs.get(name))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{source} does not fit the model: {name} is {_shape(theirs.get(name))} in it and "
            f"{_shape(mine.get(name))} in the model, and {len(wrong) - 1} more differ; give an adapter of this base."
        )


def _shape(shape: Any) -> str:
    return "not" if shape is None else "x".join(map(str, shape))


def log_measured(name: str, source: Path | None, data: QwenDataModule) -> None:
    """Say what ``validate`` measures, before the model is loaded.

    Args:
        name: of the base.
        source: the checkpoint or the adapter; None measures the base alone.
        data: its rows are prepared.

    Raises:
        UserError: there are no rows to measure it on.
    """
    if data.val_rows is None or not len(data.val_rows):
        raise UserError(
            "validate: no row is held out; set data.val_size (a share or a count), or data.val_dataset_path."
        )
    base = f"the base {name} without an adapter (give --ckpt_path last, best, a file or an adapter)"
    log.info("validate measures %s", source or base)
