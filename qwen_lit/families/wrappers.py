"""Models whose files hold more than the language model that is trained, such as a vision tower.

An adapter is written for the whole model, as vLLM and transformers' own class read it: with the names of the language
model alone, PEFT would find nothing to adapt there, and only warn.
"""

import re
from dataclasses import replace
from typing import Any

from qwen_lit.families.gguf import Gguf, in_wrapper
from qwen_lit.families.layer import Family, text_config
from qwen_lit.families.mixtures import from_peft

OTHER_PARTS = r".*\bvisual\b.*"
"""PEFT's ``exclude_modules`` in the whole model, where names such as ``gate_proj`` fit its vision tower too."""
TO_LANGUAGE_MODEL = {r"^model\.language_model\.": "model."}
"""The names of weights in the whole model, and those in its language model, as PEFT maps them while it loads."""
_IN_LANGUAGE_MODEL = re.compile(r"^(\^?)model(\\?\.)(?=layers|embed_tokens|norm)")
_IN_WHOLE = re.compile(r"^(\^?)model(\\?\.)language_model\\?\.")
_NAMED = ("target_modules", "target_parameters", "modules_to_save", "rank_pattern", "alpha_pattern", "exclude_modules")


def wrapped(
    text: Family,
    model_type: str,
    releases: tuple[str, ...],
    on_disk: str = "model.language_model",
    gguf: Gguf | None = None,
) -> Family:
    """The family of the files that hold a language model and more.

    Args:
        text: the language model's own family.
        model_type: of the files' config.json.
        releases: what people call these models.
        on_disk: the decoder's place in the files.
        gguf: the language model in GGUF, where it is another than the language model's own.
    """
    return replace(
        text,
        model_type=model_type,
        releases=releases,
        layers=lambda config: text.layers(text_config(config)),
        decoder_on_disk=on_disk,
        decoder_in_wrapper="model.language_model",
        text=text.model_type,
        gguf=gguf or in_wrapper(text.gguf, text_config),
    )


def for_whole(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config with the names of the whole model, of which it adapts the language model alone.

    Args:
        config: what PEFT writes as adapter_config.json for the language model.
    """
    found = _renamed(config, _IN_LANGUAGE_MODEL, r"\1model\2language_model\2")
    found["exclude_modules"] = found.get("exclude_modules") or OTHER_PARTS
    return found


def for_language_model(config: dict[str, Any]) -> dict[str, Any]:
    """An adapter's config with the names of the language model, whichever it was written with.

    Args:
        config: what its adapter_config.json holds.
    """
    found = _renamed(config, _IN_WHOLE, r"\1model\2")
    if found.get("exclude_modules") == OTHER_PARTS:
        found["exclude_modules"] = None
    return from_peft(found)


def weight_for_language_model(name: str) -> str:
    """The name of a weight in the language model, whichever it was written with.

    Args:
        name: as in an adapter's file, with PEFT's prefix or without.
    """
    return re.sub(r"^(base_model\.model\.)?model\.language_model\.", r"\1model.", name)


def _renamed(config: dict[str, Any], pattern: re.Pattern[str], name: str) -> dict[str, Any]:
    """A config in which every module is named anew that a pattern fits."""

    def renamed(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(name, value)
        if isinstance(value, dict):
            return {renamed(key): one for key, one in value.items()}
        return type(value)(renamed(one) for one in value) if isinstance(value, list | set) else value

    return {key: renamed(value) if key in _NAMED else value for key, value in config.items()}
