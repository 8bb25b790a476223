"""The memory plan: how many rows share a micro-batch, and which layers are computed again in backward."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from qwen_lit.errors import UserError
from qwen_lit.kernels.engine import FastEngine, linears
from qwen_lit.kernels.linear import read_member

GIB = 2**30
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# What is left free: the allocator's rounding, and libraries that take memory beside it.
MARGIN = 0.04
LIBRARIES = GIB // 4


@dataclass(frozen=True)
class Plan:
    """What the planner has chosen."""

    merge: int
    """Micro-batches of the configuration that are computed as one."""
    recompute_layers: int
    loss_chunk: int
    """Rows of logits that exist at a time."""
    estimate: int
    """Bytes at the peak."""
    budget: int
    """Bytes that may be used."""
    host_embedding: bool = False
    """The embedding stands on the CPU."""
    offload: bool = False
    """Inputs of recomputed layers wait in host memory."""

    def __str__(self) -> str:
        moved = [", embedding on the CPU"] * self.host_embedding + [", inputs offloaded"] * self.offload
        return (
            f"micro-batches merged by {self.merge}, {self.recompute_layers} layers recomputed{''.join(moved)}, "
            f"estimated peak {self.estimate / GIB:.2f} of {self.budget / GIB:.2f} GiB"
        )


def parse_bytes(text: str) -> int:
    """Bytes of ``8GiB``, ``24GB`` or a plain number.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(f"model.memory_budget is {text!r}; give a size such as 8GiB or 24GB.")
    return int(float(match[1]) * UNITS[match[2].upper()])


@dataclass(frozen=True)
class Shape:
    """Bytes that a model needs, by what they grow with."""

    layers: int
    kept: int
    """Per token of one layer, when nothing is recomputed."""
    input: int
    """Per token of one layer, when it is recomputed."""
    working: int
    """Per token, of one layer's backward."""
    fixed: int
    """Gradients, optimizer states and the buffer for a dequantised weight."""
    vocabulary: int
    """Of one row of logits."""
    embedding: int = 0
    """What moving the embedding to the CPU frees; 0 when lm_head shares it."""

    @staticmethod
    def of(model: Any, state_bytes: int) -> "Shape":
        """Read from a PEFT model.

        Args:
            model: as for ``FastEngine``.
            state_bytes: of optimizer state per trained number.
        """
        base = model.base_model.model
        block, config = base.model.layers[0], base.config
        found = linears(block)
        ranks = {name: 0 if (a := read_member(one, True).a) is None else len(a) for name, one in found.items()}
        adapted = {name: rank > 0 for name, rank in ranks.items()}
        hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        query, key = heads * block.self_attn.head_dim, config.num_key_value_heads * block.self_attn.head_dim
        kept = 2 * hidden + query + 2 * key + query + 2 * inner
        kept += hidden * any(adapted[name] for name in ("q_proj", "k_proj", "v_proj"))
        kept += hidden * (adapted["gate_proj"] or adapted["up_proj"]) + inner * adapted["down_proj"]
        kept += (query + key) * hasattr(block.self_attn, "q_norm") + sum(ranks.values())
        size = base.get_input_embeddings().weight.element_size()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return Shape(
            layers=len(base.model.layers),
            kept=kept * size + 4 * heads,
            input=hidden * size,
            working=(3 * inner + 4 * hidden) * size,
            fixed=trained * (4 + state_bytes) + hidden * inner * size,
            vocabulary=config.vocab_size * size,
            embedding=0 if config.tie_word_embeddings else config.vocab_size * hidden * size,
        )

    def peak(self, static: int, tokens: int, recompute: int, chunk: int, host: bool = False, off: bool = False) -> int:
        """Bytes at the peak of a micro-batch of ``tokens``, with ``static`` bytes allocated before."""
        static -= self.embedding if host else 0
        # Of offloaded inputs, the one in use and the one on its way are on the device.
        saved = tokens * ((self.layers - recompute) * self.kept + (2 if off else recompute) * self.input)
        layer = tokens * (self.working + (self.kept if recompute else 0))
        # The logits are gone when the layers' backward begins.
        loss = min(chunk, tokens) * self.vocabulary + 3 * tokens * self.input
        return static + self.fixed + saved + max(layer, loss)


def relative_time(recomputed: float, tokens: int) -> float:
    """Time of a token, over that of one that keeps everything in an endless micro-batch.

    Recomputing a layer costs a third of it; a dequantisation as much as 320 tokens' products.

    Args:
        recomputed: share of the layers.
        tokens: of a micro-batch.
    """
    return (1 + 0.3 * recomputed) * (1 + 320 / tokens)


def needed(estimate: int) -> int:
    """The smallest budget under which a plan with this estimate is chosen."""
    return int((estimate + LIBRARIES) / (1 - MARGIN)) + 1


def choose(shape: Shape, static: int, budget: int, tokens: int, merges: list[int]) -> Plan:
    """The fastest plan that fits.

    Args:
        shape: of the model.
        static: bytes allocated before the first step.
        budget: bytes that may be used.
        tokens: most tokens of one micro-batch of the configuration.
        merges: how many micro-batches may be computed as one, each.

    Returns:
        The plan; the smallest one when none fits.
    """
    usable = int(budget * (1 - MARGIN)) - LIBRARIES
    chunk = max(128, min(2048, int(0.02 * budget) // shape.vocabulary // 128 * 128))
    best: tuple[float, Plan] | None = None
    for merge in merges:
        for recompute in range(shape.layers + 1):
            estimate = shape.peak(static, tokens * merge, recompute, chunk)
            if estimate > usable:
                continue
            cost = relative_time(recompute / shape.layers, tokens * merge)
            if best is None or cost < best[0]:
                best = cost, Plan(merge, recompute, chunk, estimate, budget)
            break
    if best is not None:
        return best[1]
    host = shape.embedding > 0
    kept_on = shape.peak(static, tokens, shape.layers, 128, host)
    if kept_on <= usable:
        return Plan(1, shape.layers, 128, kept_on, budget, host)
    return Plan(1, shape.layers, 128, shape.peak(static, tokens, shape.layers, 128, host, True), budget, host, True)


def apply(plan: Plan, model: Any) -> FastEngine:
    """The engine of a plan; moves the embedding to the CPU where the plan says so."""
    if plan.host_embedding:
        model.base_model.model.get_input_embeddings().to("cpu")
        torch.cuda.empty_cache()
    return FastEngine(model, plan.recompute_layers, plan.loss_chunk, plan.offload)


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, those it holds already included."""
    free, total = torch.cuda.mem_get_info(device)
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), limit))
