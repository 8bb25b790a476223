"""Export of a trained adapter: a merged bf16 model folder that other tools load."""

from qwen_lit.export.adapter import CONVERTED_MARKER
from qwen_lit.export.card import ModelCardFacts
from qwen_lit.export.folder import ExportError
from qwen_lit.export.merge import MergeReport, merge_adapter
from qwen_lit.export.serving import write_serving_files

__all__ = ["CONVERTED_MARKER", "ExportError", "MergeReport", "merge_adapter", "ModelCardFacts", "write_serving_files"]
