"""Qwen2.5-VL and Qwen3-VL, whose language models compute on text what Qwen2's and Qwen3's do.

The rotation of three positions (``mrope_section``) is that of one position where the three are equal.
"""

from qwen_lit.families import qwen2, qwen3
from qwen_lit.families.dense import dense_fields
from qwen_lit.families.gguf import VISION, Field, Gguf
from qwen_lit.families.layer import Config, text_config, value_of
from qwen_lit.families.wrappers import wrapped


def qwen2_5_vl_fields(config: Config) -> dict[str, Field]:
    """The shape of a Qwen2.5-VL's language model by GGUF's keys."""
    return dense_fields(text_config(config))


def qwen3_vl_fields(config: Config) -> dict[str, Field]:
    """The shape of a Qwen3-VL's language model by GGUF's keys; some of its layers take an image's features too."""
    deep = value_of(value_of(config, "vision_config", {}), "deepstack_visual_indexes", [])
    return qwen3.fields(text_config(config)) | {"n_deepstack_layers": len(deep)}


QWEN2_5_VL = wrapped(
    qwen2.QWEN2,
    "qwen2_5_vl",
    ("Qwen2.5-VL (text rows)",),
    on_disk="model",
    gguf=Gguf("qwen2vl", qwen2_5_vl_fields, left_out=VISION),
)
QWEN3_VL = wrapped(
    qwen3.QWEN3, "qwen3_vl", ("Qwen3-VL (text rows)",), gguf=Gguf("qwen3vl", qwen3_vl_fields, left_out=VISION)
)
