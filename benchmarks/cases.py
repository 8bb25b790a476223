"""What is trained to measure steps: the cases, their rows, and the memory that they may use."""

from typing import Any

import numpy as np

GIB = 2**30
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
CASES: dict[str, dict[str, Any]] = {
    "shipped": {"dropout": 0.1},
    "dropout 0": {"rows": 8, "peer_recompute": False},
    "dropout 0, 40 GiB": {"memory": 40, "rows": 4, "peer_recompute": False},
    "all linears": {"targets": ALL, "rows": 4, "peer_recompute": False},
    "24 GiB": {"memory": 24, "rows": 2, "peer_recompute": False},
    "16 GiB": {"memory": 16, "peer_recompute": False},
    "12 GiB": {"memory": 12, "peer_recompute": False},
    "8 GiB": {"memory": 8, "rows": 4},
    "8 GiB, one row": {"memory": 8},
    "4 GiB": {"memory": 4},
    "least memory": {"memory": 3, "least": True, "tokens": 2048, "steps": 3},
    "longest row, 8 GiB": {"memory": 8, "longest": 32_000, "tokens": 32_000, "steps": 1},
    "longest row, 24 GiB": {"memory": 24, "longest": 120_000, "tokens": 120_000, "steps": 1},
    "longest row, 80 GiB": {"longest": 343_000, "tokens": 343_000, "steps": 1},
    "length mix": {"mix": True, "rows": 8, "peer_tokens": 32_768},
    "length mix, 24 GiB": {"mix": True, "memory": 24, "rows": 8, "peer_tokens": 32_768},
}
"""By name. ``memory`` limits the process to so many GiB, and ``least`` asks for the smallest plan within that.
``longest`` is a row's tokens (2,048), ``tokens`` a step's (16,384), ``mix`` draws lengths. ``rows``, ``peer_tokens``
and ``peer_recompute`` are the hand tuning of a peer. ``products`` is as model.products."""


def documents(case: dict[str, Any], count: int, longest: int) -> list[tuple[Any, Any]]:
    """Random documents: of ``longest`` tokens each, or log-normal with a median of 300 and 60 % supervised."""
    draw = np.random.default_rng(1)
    if case.get("mix"):
        lengths = np.exp(draw.normal(5.7, 0.8, count)).astype(int).clip(30, longest)
    else:
        lengths = np.full(count, longest)
    begins = (0.4 * lengths).astype(int) if case.get("mix") else np.zeros(count, dtype=int)
    pairs = zip(lengths.tolist(), begins.tolist(), strict=True)
    return [(draw.integers(0, 150_000, n), np.array([[begin, n]])) for n, begin in pairs]


def limit_memory(case: dict[str, Any]) -> None:
    """Let this process use no more of the first GPU than the case says."""
    import torch

    if "memory" in case:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(case["memory"] * GIB / total)
