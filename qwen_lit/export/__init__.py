# SPDX-License-Identifier: MIT
"""Export of a trained adapter: a merged bf16 model folder that other tools load."""

from qwen_lit.export.folder import ExportError, write_serving_files
from qwen_lit.export.merge import CONVERTED_MARKER, MergeReport, merge_adapter

__all__ = ["CONVERTED_MARKER", "ExportError", "MergeReport", "merge_adapter", "write_serving_files"]
