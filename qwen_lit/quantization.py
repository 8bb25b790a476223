"""Which weights of the base are quantised, and how: asked of the loaded model, or before of the headers of its files
or transformers' own rule.

Nothing else says so: memory, engine, verdict and merge ask ``loaded_weights`` or ``planned_weights``, and what a
family keeps as it is in the files reaches both through ``usable``.
"""

import copy
import logging
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as F
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from qwen_lit.errors import UserError
from qwen_lit.experts.stacked import held_4bit
from qwen_lit.families.layer import is_tied
from qwen_lit.families.table import family_of
from qwen_lit.hub import has_weights
from qwen_lit.model.load import empty_model
from qwen_lit.prequantized import names_on_disk, own_quantization, stored_in

log = logging.getLogger(__name__)
WRAPPED = "base_model.model."
"""What PEFT puts before the names of the base."""


@dataclass(frozen=True)
class Held:
    """How bitsandbytes holds one weight."""

    kind: str
    """nf4, fp4 or int8."""
    blocksize: int = 0
    """Numbers that share a scale; 0 for int8, where each row has one."""
    double: bool = False
    """Whether the scales are quantised too."""
    matrices: int = 1
    """Matrices of one parameter that are quantised each by itself, as experts are."""

    def __str__(self) -> str:
        return self.kind + ", double" * self.double

    def bytes_of(self, numbers: int, rows: int) -> int:
        """Memory of a weight, scales included: 4 bytes each, or, where they are quantised, 1 and 4 for each 256."""
        if self.kind == "int8":
            return numbers + 4 * rows
        numbers //= self.matrices
        blocks = -(-numbers // self.blocksize)
        return self.matrices * (-(-numbers // 2) + (blocks + 4 * -(-blocks // 256) if self.double else 4 * blocks))

    def round_trip(self, weight: Tensor) -> Tensor:
        """What the products see of a weight that is loaded from its file.

        Args:
            weight: ``[out, in]`` as stored, or ``[experts, out, in]``, on the device where it is quantised.

        Returns:
            The same shape in bf16, or in float32 for int8, whose products are scaled in float32.
        """
        if self.matrices > 1:
            alone = replace(self, matrices=1)
            parts = weight.reshape(self.matrices, -1, weight.shape[-1])
            return torch.cat([alone.round_trip(part) for part in parts]).view(weight.shape)
        loaded = weight.to(torch.bfloat16).contiguous()
        if self.kind == "int8":
            values, scales, _ = F.int8_vectorwise_quant(loaded.to(torch.float16))
            return F.int8_vectorwise_dequant(values, scales)
        packed, state = F.quantize_4bit(
            loaded, blocksize=self.blocksize, compress_statistics=self.double, quant_type=self.kind
        )
        return F.dequantize_4bit(packed, state)


def usable(quantization: BitsAndBytesConfig | None, config: Any) -> BitsAndBytesConfig | None:
    """The quantisation that will be used; None for a base in bf16.

    Of a base whose files are quantised it is theirs, and of the configured one the dtype of the products is taken.
    transformers takes a configuration that sets neither ``load_in_4bit`` nor ``load_in_8bit`` for 4 bits, in FP4; here
    it is none. A head that is tied to the embedding cannot be quantised: bitsandbytes would find no scales in it. What
    the model's family holds as it is in the file is skipped, whatever else is.

    Args:
        quantization: as configured.
        config: of the base model.

    Raises:
        UserError: bitsandbytes has no such quantisation, or it saves nothing.
    """
    own = own_quantization(config)
    if own is not None:
        if quantization is not None and quantization.load_in_4bit:
            own.bnb_4bit_compute_dtype = quantization.bnb_4bit_compute_dtype
        log.info("the base is quantised already and stays as its files are; model.quantization_config is not used")
        return own
    if quantization is None:
        return None
    if not quantization.is_quantizable():
        log.info("model.quantization_config sets neither load_in_4bit nor load_in_8bit: the base is held in bf16")
        return None
    kind = quantization.bnb_4bit_quant_type
    if quantization.load_in_4bit and kind not in ("nf4", "fp4"):
        raise UserError(f"model.quantization_config.bnb_4bit_quant_type is {kind!r}; nf4 or fp4 is expected.")
    if quantization.load_in_8bit and quantization.llm_int8_has_fp16_weight:
        raise UserError(
            "model.quantization_config.llm_int8_has_fp16_weight keeps the base in 16 bits and only computes in 8; "
            "leave it false, or set quantization_config to null."
        )
    skipped = quantization.llm_int8_skip_modules
    for pattern in skipped or []:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(
                f"model.quantization_config.llm_int8_skip_modules: {pattern!r} is no name and no pattern ({error})."
            ) from error
    family = family_of(config)
    if quantization.load_in_8bit and any(layer.feed_forward == "experts" for layer in family.layers(config)):
        raise UserError(
            "model.quantization_config.load_in_8bit leaves the experts, nearly all of the model, in 16 bits; set "
            "load_in_4bit instead, which holds them in 4 bits, or quantization_config to null."
        )
    plain = {one.path for layer in family.layers(config) for one in layer.linears if one.linear and not one.quantized}
    if skipped is None and not plain:
        # transformers skips the head by itself.
        return quantization
    tied = skipped is None or is_tied(config)
    wanted = [*(skipped or []), *([family.head] if tied else []), *sorted(plain)]
    quantization = copy.copy(quantization)
    quantization.llm_int8_skip_modules = list(dict.fromkeys(wanted))
    return quantization


def base_name(name: str) -> str:
    """The base's own name of a module or parameter that PEFT has wrapped."""
    return name.removeprefix(WRAPPED).replace(".base_layer", "")


def loaded_weights(model: nn.Module) -> dict[str, Held]:
    """How a model's quantised weights are held, by the names of the base.

    Args:
        model: loaded, or prepared for loading; with or without an adapter.
    """
    found: dict[str, Held] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        own = base_name(name) + ".weight"
        if isinstance(module, Linear4bit) and isinstance(weight, Params4bit):
            found[own] = Held(weight.quant_type, weight.blocksize, weight.compress_statistics)
        elif isinstance(module, Linear8bitLt) and isinstance(weight, Int8Params):
            found[own] = Held("int8")
        for parameter, form in held_4bit(module).items():
            matrices = form.count * form.parts
            found[f"{base_name(name)}.{parameter}"] = Held(form.kind, form.blocksize, form.double, matrices)
    return found


def planned_weights(
    config: Any, quantization: BitsAndBytesConfig | None, device: torch.device, folder: Path | None = None
) -> dict[str, Held]:
    """How a model's weights will be held, before one is read.

    The headers of quantised files say so; else, or where they are yet to be fetched, transformers' own quantizer, run
    without weights.

    Args:
        config: of the base model.
        quantization: as ``usable`` returns it.
        device: where the base will be loaded; ``llm_int8_enable_fp32_cpu_offload`` quantises nothing on the CPU.
        folder: of the base's files, if there is one.
    """
    if quantization is None:
        return {}
    if folder is not None and own_quantization(config) is not None and has_weights(folder):
        return _stored_weights(folder)
    model = empty_model(config, torch.bfloat16)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": str(device)})
    return loaded_weights(model)


def _stored_weights(folder: Path) -> dict[str, Held]:
    """How a model's weights are held in its files, by the names of the base."""
    stored, found = stored_in(folder), {}
    for own, names in names_on_disk(folder, stored).items():
        if all(name in stored for name in names):
            one = stored[names[0]]
            found[own] = Held(one.kind, one.blocksize, one.double)
    return found


def described(held: dict[str, Held], linears: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """What a base is held in, in a few words.

    Args:
        held: its quantised weights.
        linears: of the model, in all.
        dtype: of weights that are not quantised.
    """
    kinds = " and ".join(sorted({str(one) for one in held.values()}))
    plain = "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    count = sum(one.matrices for one in held.values())
    return f"{kinds}, {count} of {linears} linears" if held else f"none, {plain}"


def count_linears(config: Any) -> int:
    """Linears of a model, its head included and each expert's counted, gate and up too.

    Args:
        config: of the base model.
    """
    return 1 + sum(
        max(one.count, len(one.parts)) for layer in family_of(config).layers(config) for one in layer.linears
    )


def on_disk(held: Mapping[str, Held], config: Any, there: Container[str] = ()) -> dict[str, Held]:
    """How quantised weights are held, by their names in the base's files.

    Args:
        held: by the names of the base, as ``loaded_weights`` and ``planned_weights`` tell.
        config: what the base's config.json holds, which tells how its files name their weights.
        there: names in the files, as of ``Family.weights``.
    """
    names = family_of(config).weights(config, there)
    # Each part of what is one parameter is quantised by itself.
    return {
        name: replace(how, matrices=max(1, how.matrices // len(names[own])))
        for own, how in held.items()
        for name in names[own]
    }


def check_trained_whole(held: dict[str, Held], modules: Iterable[str], config: Any) -> None:
    """Refuse to train a quantised weight as a whole: it has no gradient.

    Args:
        held: the base's quantised weights.
        modules: that are trained whole.
        config: of the base model.

    Raises:
        UserError: ``modules_to_save`` names one.
    """
    own_files = own_quantization(config) is not None
    for module in modules:
        remedy = f"add {module} to model.quantization_config.llm_int8_skip_modules"
        remedy = "the files hold it so: give the original bf16 model" if own_files else remedy
        for name, how in held.items():
            own = name.removesuffix(".weight") if name.endswith(".weight") else name.rpartition(".")[0]
            if own == module or own.endswith("." + module):
                raise UserError(
                    f"model.lora_config.modules_to_save names {module}, but {own} is held in {how.kind} and cannot be "
                    f"trained whole; {remedy}."
                )
