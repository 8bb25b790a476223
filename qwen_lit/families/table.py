"""The families that are known. A new one is a file beside this one, and a line here."""

from qwen_lit.errors import UserError
from qwen_lit.families.layer import Config, Family, value_of
from qwen_lit.families.qwen2 import QWEN2
from qwen_lit.families.qwen3 import QWEN3

FAMILIES: dict[str, Family] = {
    "qwen2": QWEN2,
    "qwen3": QWEN3,
}
"""By the ``model_type`` of a config."""


def family_of(config: Config, name: str = "the model") -> Family:
    """The family of a model.

    Args:
        config: transformers' config, or the dict that config.json holds.
        name: of the model in the message.

    Raises:
        UserError: it is of no family that is known.
    """
    kind = value_of(config, "model_type")
    if kind not in FAMILIES:
        *others, last = (release for family in FAMILIES.values() for release in family.releases)
        known = f"{', '.join(others)} or {last}"
        raise UserError(f"model_name_or_path: {name} is a {kind!r}, not a {known} model; give one of these.")
    return FAMILIES[kind]
