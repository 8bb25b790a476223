"""What ``plan`` says where PEFT's own path will train: the estimate, and what it fits."""

from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from transformers.utils import is_flash_linear_attention_available

from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.families.table import family_of
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.plan import GIB
from qwen_lit.planner.reference import reference_memory
from qwen_lit.planner.search import limit


def reference(
    module: QwenModule, data: QwenDataModule, model: PeftModel, static: int, cards: Sequence[int]
) -> dict[str, Any]:
    """The estimate, its parts, and the smallest card that it fits.

    Args:
        module: with the settings.
        data: with its rows.
        model: of ``arithmetic_model``.
        static: bytes of its weights.
        cards: GiB of usual ones, for a run without a budget.
    """
    settings, budget, heaviest = module.settings, module.memory_budget, data.heaviest(1)
    padded = (len(heaviest["cu_seqlens"]) - 1) * heaviest["max_seqlen"]
    memory = reference_memory(
        model,
        static,
        heaviest["input_ids"].numel() if data.settings.packing else padded,
        heaviest["targets"].numel(),
        module.state_bytes,
        settings.gradient_checkpointing,
    )
    sizes = [budget] if budget else [card * GIB for card in cards]
    fitting = [size / GIB for size in sizes if memory.peak <= limit(size)]
    loops = sum(layer.state > 0 for layer in family_of(module.config).layers(module.config))
    return {
        "estimated_peak_gib": round(memory.peak / GIB, 2),
        "parts_bytes": dict(memory.parts),
        "fits": bool(fitting),
        "fits_gib": round(fitting[0], 2) if fitting else None,
        "chunk_loops": 0 if is_flash_linear_attention_available() else loops,
    }
