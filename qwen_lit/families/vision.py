"""Qwen2.5-VL and Qwen3-VL, whose language models compute on text what Qwen2's and Qwen3's do.

The rotation of three positions (``mrope_section``) is that of one position where the three are equal.
"""

from qwen_lit.families.qwen2 import QWEN2
from qwen_lit.families.qwen3 import QWEN3
from qwen_lit.families.wrappers import wrapped

QWEN2_5_VL = wrapped(QWEN2, "qwen2_5_vl", ("Qwen2.5-VL (text rows)",), on_disk="model")
QWEN3_VL = wrapped(QWEN3, "qwen3_vl", ("Qwen3-VL (text rows)",))
