"""``convert``: configurations of other trainers to ours; imports neither torch nor transformers."""

from qwen_lit.convert.command import converted, main
from qwen_lit.convert.kinds import hint, kind_of

__all__ = ["converted", "hint", "kind_of", "main"]
