"""Which linears an adapter is put on: named by the user or by the family, and checked before any weight is read."""

import copy
import re
from dataclasses import replace
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from qwen_lit.errors import UserError
from qwen_lit.experts.lora import adapting
from qwen_lit.experts.targets import check_experts, resolve_all
from qwen_lit.families.table import family_of
from qwen_lit.model.load import empty_model


def settle_targets(config: Any, lora: LoraConfig) -> None:
    """Give an adapter that names no targets those of the model's family, write out ``all-linear``, and check them.

    Args:
        config: of the model.
        lora: changed in place.

    Raises:
        UserError: as of ``check_targets``.
    """
    if lora.target_modules is None and not lora.target_parameters:
        lora.target_modules = list(family_of(config).targets)
    resolve_all(config, lora)
    check_targets(config, lora)


def check_targets(config: Any, lora: LoraConfig) -> None:
    """Reject LoRA targets that PEFT would refuse or pass over, before any weight is read.

    PEFT takes a text for a regular expression that is a module's whole name, and passes over a name of a list that
    matches nothing.

    Raises:
        UserError: a name matches no module of the model, or PEFT cannot adapt what it matches.
    """
    targets = lora.target_modules
    if not targets and not lora.target_parameters:
        usual = ", ".join(family_of(config).targets)
        raise UserError(f"lora_config.target_modules is not set; name linears, for example [{usual}].")
    model = empty_model(config)
    modules = dict(model.named_modules())
    names = list(modules)
    check_experts(config, lora, names)
    known = sorted({name.rsplit(".", 1)[-1] for name, one in modules.items() if isinstance(one, nn.Linear)})
    named = {"target_modules": [] if isinstance(targets, str) else targets, "modules_to_save": lora.modules_to_save}
    for key, listed in named.items():
        for target in listed or []:
            if not any(name == target or name.endswith("." + target) for name in names):
                raise UserError(f"lora_config.{key}: {target!r} matches no linear; the model has {known}.")
    if isinstance(targets, str) and targets != "all-linear":
        check_pattern(targets, names, known)
    plain = replace(copy.deepcopy(lora), init_lora_weights=True, use_dora=False)
    try:
        with adapting(model, plain):
            inject_adapter_in_model(plain, model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"model.lora_config: {' '.join(str(error).split())}") from error


def check_pattern(pattern: str, names: list[str], known: list[str]) -> None:
    """Reject a regular expression of targets that is none, or that no module's whole name matches.

    Raises:
        UserError: with how a name is written instead.
    """
    try:
        matched = any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise UserError(f"lora_config.target_modules: {pattern!r} is no regular expression ({error}).") from error
    if not matched:
        raise UserError(
            f"lora_config.target_modules: the text {pattern!r} is a regular expression that matches no linear's whole "
            f"name; write names as a list, [{pattern}], or all-linear. The model has {known}."
        )
