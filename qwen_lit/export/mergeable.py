"""Which adapters can be merged, checked before they are trained."""

import copy
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer

from qwen_lit.errors import UserError
from qwen_lit.export.adapter import RESIDUAL_INITS, UNSUPPORTED
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
    if lora.lora_bias:
        with torch.device("meta"):
            model = put_adapter(empty_model(config), copy.deepcopy(lora))
        layers = [(name, one) for name, one in model.named_modules() if isinstance(one, LoraLayer)]
        options += [
            f"lora_bias on {base_name(name)}, which has no bias,"
            for name, one in layers
            if getattr(one.get_base_layer(), "bias", None) is None
        ]
    if options:
        raise UserError(
            f"model.lora_config.{options[0]} cannot be merged into the base; leave it out, or set export.merge to "
            "false and serve lora_adapter/ with PEFT."
        )
