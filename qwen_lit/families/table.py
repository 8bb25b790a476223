"""The families that are known. A new one is a file beside this one, and a line here."""

from qwen_lit.errors import UserError
from qwen_lit.families.layer import Config, Family, value_of
from qwen_lit.families.qwen2 import QWEN2
from qwen_lit.families.qwen3 import QWEN3
from qwen_lit.families.qwen3_5 import QWEN3_5, QWEN3_5_MOE, QWEN3_5_MOE_TEXT, QWEN3_5_TEXT
from qwen_lit.families.qwen3_moe import QWEN3_MOE
from qwen_lit.families.qwen3_next import QWEN3_NEXT
from qwen_lit.families.vision import QWEN2_5_VL, QWEN3_VL

FAMILIES: dict[str, Family] = {
    one.model_type: one
    for one in (
        QWEN2,
        QWEN3,
        QWEN3_5,
        QWEN3_5_TEXT,
        QWEN3_MOE,
        QWEN3_5_MOE,
        QWEN3_5_MOE_TEXT,
        QWEN3_NEXT,
        QWEN2_5_VL,
        QWEN3_VL,
    )
}
"""By the ``model_type`` of a config."""

OTHERS = {
    "qwen2_moe": "Qwen1.5 and Qwen2 mixture of experts; Qwen3-30B-A3B is its successor",
    "qwen2_vl": "Qwen2-VL; Qwen2.5-VL is its successor",
    "qwen3_vl_moe": "Qwen3-VL mixture of experts; Qwen3-VL-32B is dense",
    "qwen3_omni_moe": "Qwen3-Omni; Qwen3-30B-A3B is its language model alone",
    "qwen2_5_omni": "Qwen2.5-Omni; Qwen2.5-7B is its language model alone",
    "qwen4_exp": "Qwen3.8 Flash-Next; Qwen3.8-27B is its dense sister",
}
"""Other Qwens, by their ``model_type``: what they are, and what there is instead."""


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
        instead = OTHERS.get(str(kind), "")
        known = ", ".join(dict.fromkeys(release for family in FAMILIES.values() for release in family.releases))
        raise UserError(
            f"model_name_or_path: {name} is a {kind!r}{instead and f' ({instead})'}, which cannot be trained; "
            f"give one of {known}."
        )
    return FAMILIES[kind]
