"""What chat talks to: of the models in a folder the first that fits into memory, loaded."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import BitsAndBytesConfig

from qwen_lit.errors import UserError, shortened
from qwen_lit.export.adapter import UNSUPPORTED, read_adapter
from qwen_lit.export.folder import BaseModel, ExportError, read_json
from qwen_lit.export.merge import fit_names
from qwen_lit.families.table import family_of
from qwen_lit.frozen.cache import cache_of_training
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.hardware import product_dtype
from qwen_lit.hub import fetch, find
from qwen_lit.hub_libraries import Hub
from qwen_lit.model.base_files import check_base
from qwen_lit.model.load import (
    load_config,
    load_tokenizer,
    read_adapted,
)
from qwen_lit.names import HUB_NAME, expanded
from qwen_lit.planner.settle import free_bytes, least_bytes, settle
from qwen_lit.prequantized import own_quantization
from qwen_lit.progress import timed
from qwen_lit.quantization import on_disk, planned_weights, usable
from qwen_lit.run import Run, is_adapter, is_model, training_config

ROOM = 1.1
"""Memory that a conversation takes, over its weights."""
TOKENS = 4096
"""Of a conversation for whose keys and values there is room beside layers that are on the device."""
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16, bnb_4bit_use_double_quant=True
)


@dataclass
class Choice:
    """A model that chat can talk to, and how its weights are held."""

    folder: Path
    """An adapter, or a model."""
    base: str
    """The model's folder, or the adapter's base: a folder or a hub name."""
    quantization: BitsAndBytesConfig | None = None
    hub: Hub = "huggingface"
    """The hub that a base without a folder of its own is fetched from."""
    streams: bool = False
    """Whether layers that do not fit the device wait on the host."""

    @property
    def adapter(self) -> bool:
        """Whether the folder is an adapter on its base."""
        return is_adapter(self.folder)

    @property
    def held(self) -> str:
        """In what the weights are held, where they are quantised."""
        if self.quantization is None:
            return ""
        kind = f"4 bits ({self.quantization.bnb_4bit_quant_type})" if self.quantization.load_in_4bit else "8 bits"
        return kind + ", layers on the host" * self.streams

    def __str__(self) -> str:
        if self.adapter:
            return f"{Path(self.base).name} with the adapter {self.folder}"
        trained = training_config(self.folder).get("model", {}).get("model_name_or_path")
        return f"{Path(trained).name}, fine-tuned ({self.folder})" if trained else str(self.folder)

    def bytes_needed(self, device: torch.device) -> int:
        """Memory of the loaded weights; 0 where the files are not on this machine.

        Of a model whose layers are streamed, what it takes at least, with room for a conversation.

        Raises:
            UserError: the folder or its base is broken.
        """
        base = find(self.base, self.hub)
        if base is None:
            return 0
        sizes = self._sizes(base, device)
        total = sum(sizes.values())
        if self.streams:
            config = load_config(base)
            family = family_of(config)
            blocks = [
                sum(sizes[f"{family.block(number)}.{one.path}.weight"] for one in layer.linears)
                for number, layer in enumerate(family.layers(config))
            ]
            total += least_bytes(config, blocks, TOKENS) - sum(blocks)
        return total + sum(file.stat().st_size for file in self.folder.glob("adapter_model.safetensors"))

    def _sizes(self, base: Path, device: torch.device) -> dict[str, int]:
        """Bytes of each weight once it is loaded, by its name in the model."""
        config, there = read_json(base / "config.json"), BaseModel(base).where
        held = on_disk(planned_weights(load_config(base), self.quantization, device, base), config, there)
        size = product_dtype(device).itemsize

        def bytes_of(name: str) -> int:
            shape = there[name][2]
            numbers = math.prod(shape)
            return held[name].bytes_of(numbers, shape[0]) if name in held else numbers * size

        return {
            own: sum(bytes_of(name) for name in names if name in there)
            for own, names in family_of(config).weights(config, there).items()
        }

    def can_stream(self, device: torch.device) -> bool:
        """Whether its layers can wait on the host: in 4 bits that this program quantises, and without experts."""
        base = find(self.base, self.hub)
        if device.type != "cuda" or base is None or self.quantization is None or not self.quantization.load_in_4bit:
            return False
        config = load_config(base)
        dense = all(layer.feed_forward != "experts" for layer in family_of(config).layers(config))
        return dense and own_quantization(config) is None

    def check(self) -> None:
        """Reject what cannot be loaded, from the heads of its files.

        Raises:
            UserError: the base is not there, a file is damaged, or the adapter is of another base.
        """
        base = find(self.base, self.hub)
        if base is None and not HUB_NAME.match(self.base):
            raise UserError(
                f"the base of {self.folder} is not at {self.base}; move it there, or name its folder as "
                f"base_model_name_or_path in {self.folder / 'adapter_config.json'}."
            )
        if base is not None:
            check_base(base, load_config(base))
        config = adapter_config(self.folder) if self.adapter else {}
        # PEFT reads more kinds of adapters than can be merged.
        if base is None or not self.adapter or any(config.get(key) for key in UNSUPPORTED):
            return
        try:
            adapter, weights = read_adapter(self.folder), BaseModel(base)
        except ExportError as error:
            raise UserError(f"{error}; export the adapter again.") from error
        try:
            fit_names(adapter, weights, read_json(base / "config.json"))
        except ExportError as error:
            raise UserError(
                f"{self.folder} is not an adapter of {base} ({error}); give the base it was trained on."
            ) from error


def choose(path: str, quantize: bool | None, device: torch.device) -> tuple[Choice, str]:
    """The first of ``choices`` that fits the device, and why those before it were passed over.

    Args:
        path: ``lora_adapter/``, ``final_model/``, or the output folder that holds them.
        quantize: hold the base in 4 bits, or not; None holds it as it was trained, in 4 bits where only that fits.
        device: where it answers.

    Raises:
        UserError: there is none, or none that fits.
    """
    free = free_bytes(device)
    passed: list[str] = []
    try:
        for choice in offered(Path(expanded(path)), quantize, device):
            choice.check()
            needed = ROOM * choice.bytes_needed(device)
            if needed <= free:
                return choice, "; ".join(passed)
            how = f" in {choice.held}" * bool(choice.held)
            passed.append(f"{choice.folder.resolve().name}{how} needs {_gib(needed)}, {device} has {_gib(free)} free")
    except (UserError, ExportError) as error:
        reason = str(error).removeprefix("model_name_or_path: ")
        if not passed:
            raise UserError(f"chat: {reason}") from error
        passed.append(reason.rstrip("."))
    if not passed:
        raise UserError(f"chat: {path} holds neither an adapter nor a model; give lora_adapter/ or final_model/.")
    raise UserError(f"chat: {'; '.join(passed)}. Free memory, or serve a small GGUF file (export.gguf: q4_k_m).")


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def offered(given: Path, quantize: bool | None, device: torch.device) -> Iterator[Choice]:
    """Each of ``choices``, and then the last one with layers on the host, where the device and its form allow that.

    Args:
        given: as of ``choices``.
        quantize: as of ``choose``.
        device: as of ``choose``.
    """
    last = None
    for last in choices(given, quantize):
        yield last
    if last is not None and last.can_stream(device):
        yield replace(last, streams=True)


def choices(given: Path, quantize: bool | None) -> Iterator[Choice]:
    """What a folder offers, the most faithful first: the merged model, the adapter as trained, either in 4 bits."""
    run = Run(given)
    inside = [folder for folder in (run.merged, run.adapter) if is_adapter(folder) or is_model(folder)]
    found = [given] if is_adapter(given) or is_model(given) else inside
    if quantize:
        # What is merged was not trained in 4 bits.
        found = found[::-1]
    for folder in found:
        base = base_of(folder) if is_adapter(folder) else str(folder)
        hub: Hub = training_config(folder).get("model", {}).get("hub", "huggingface")
        if own := quantized_in_files(base, hub):
            # It is held in nothing else.
            yield Choice(folder, base, own, hub)
            continue
        trained = trained_in(folder, base, hub) if is_adapter(folder) else None
        four_bits = trained if trained is not None and trained.load_in_4bit else FOUR_BITS
        yield Choice(folder, base, (trained if quantize is None else four_bits if quantize else None), hub)
        if quantize is None and folder == found[-1] and trained is not four_bits:
            yield Choice(folder, base, four_bits, hub)


def adapter_config(adapter: Path) -> dict[str, Any]:
    """PEFT's configuration of an adapter folder.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_json(adapter / "adapter_config.json")
    except ExportError as error:
        raise UserError(f"{error}; export the adapter again.") from error


def base_of(adapter: Path) -> str:
    """The base that an adapter names.

    Raises:
        UserError: it names none.
    """
    base = adapter_config(adapter).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter / 'adapter_config.json'} names no base; export the adapter again.")
    folder = Path(expanded(base))
    return str(folder) if folder.is_dir() else str(base)


def quantized_in_files(base: str, hub: Hub) -> BitsAndBytesConfig | None:
    """How a base's own files are quantised; None where they are not, or it is not on this machine."""
    folder = find(base, hub)
    return None if folder is None else own_quantization(load_config(folder, base), base)


def trained_in(adapter: Path, base: str, hub: Hub) -> BitsAndBytesConfig | None:
    """How an adapter's base was held in training; in 4 bits where that is not known."""
    trained = training_config(adapter).get("model")
    if not trained:
        return FOUR_BITS
    held = trained.get("quantization_config")
    config = BitsAndBytesConfig(**held) if held else None
    there = Path(base).is_dir() or HUB_NAME.match(base)
    return usable(config, load_config(fetch(base, hub))) if there else config


def load(choice: Choice, device: torch.device) -> tuple[Any, Any]:
    """The model and the tokenizer.

    Raises:
        UserError: they cannot be loaded, or do not fit after all.
    """
    base = fetch(choice.base, choice.hub, weights=True)
    try:
        with timed(f"loading {choice}"):
            # The base of an adapter is quantised again and again; a merged model is not worth a file.
            cache = cache_of_training(choice.folder) if choice.adapter else None
            model = load_frozen(base, choice.quantization, device, cache)
            settle(model, TOKENS, choice.folder if choice.adapter else None)
            model.config.use_cache = True
            tokenizer = load_tokenizer(base, choice.base)
            if choice.adapter:
                model = read_adapted(model, choice.folder)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(
            f"chat: {device} ran out of memory while {choice} was loaded; free some of it, or give --load_in_4bit."
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError, UserError) as error:
        reason = shortened(" ".join(str(error).split()))
        raise UserError(f"chat: cannot load {choice} ({reason}); give a model whose base is here.") from error
    if not tokenizer.chat_template:
        raise UserError(f"chat: {choice.base} has no chat template; give an instruct model, or an adapter of one.")
    return model.eval(), tokenizer
