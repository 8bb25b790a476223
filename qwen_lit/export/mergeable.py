"""Which adapters can be merged, checked before they are trained."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper

from qwen_lit.errors import UserError
from qwen_lit.export.adapter import RESIDUAL_INITS, UNSUPPORTED
from qwen_lit.families.layer import is_tied
from qwen_lit.families.table import family_of
from qwen_lit.model.load import empty_model, put_adapter
from qwen_lit.quantization import base_name


def check_mergeable(lora: LoraConfig, config: Any) -> None:
    """Refuse to train what cannot be merged afterwards.

    Args:
        lora: PEFT's LoraConfig.
        config: of the base model.

    Raises:
        UserError: an option of PEFT's is set that changes more than weights, or the base itself.
    """
    init = str(lora.init_lora_weights).lower()
    options = [f"{key}: {value}" for key in UNSUPPORTED if (value := getattr(lora, key, None))]
    if init.startswith(RESIDUAL_INITS) and not init.startswith(("pissa", "olora")):
        options.append(f"init_lora_weights: {init}")
    options += _unwritable(lora, config)
    if options:
        raise UserError(
            f"model.lora_config.{options[0]} cannot be merged into the base; leave it out, or set export.merge to "
            "false and serve lora_adapter/ with PEFT."
        )


def _unwritable(lora: LoraConfig, config: Any) -> list[str]:
    """What of an adapter has no weight that it could be added to, as the options that ask for it.

    Args:
        lora: as for ``check_mergeable``.
        config: of the base model.
    """
    plain = copy.deepcopy(lora)
    plain.init_lora_weights = True
    with torch.device("meta"):
        model = put_adapter(empty_model(config), plain)
    family, tied = family_of(config), is_tied(config)
    ends = {family.embedding, family.head}
    layers = enumerate(family.layers(config))
    known = {f"{family.block(number)}.{one.path}" for number, layer in layers for one in layer.linears}
    found = []
    for name, one in model.named_modules():
        if not isinstance(one, LoraLayer) or isinstance(one, ParamWrapper):
            continue
        own, inner = base_name(name), one.get_base_layer()
        if own not in known | ends:
            found.append(f"target_modules, which match {own}, a {type(inner).__name__},")
        elif lora.lora_bias and getattr(inner, "bias", None) is None:
            found.append(f"lora_bias on {own}, which has no bias,")
        elif lora.use_dora and own == family.embedding:
            found.append(f"use_dora on {own}")
        elif lora.ensure_weight_tying and tied and own in ends:
            found.append(f"ensure_weight_tying with LoRA on {own}")
    return found
