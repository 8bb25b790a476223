"""The memory plan: how many rows share a micro-batch, and which layers are computed again in backward."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from qwen_lit.engine.engine import PIECE, FastEngine, linears_of
from qwen_lit.engine.lora_linear import lora_columns, parts_of, read_linear, width_of
from qwen_lit.engine.offload import BLOCK
from qwen_lit.errors import UserError
from qwen_lit.families.layer import Layer
from qwen_lit.families.table import family_of
from qwen_lit.lines import plural

GIB = 2**30
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}
# What is left free: the allocator's rounding, and libraries that take memory beside it.
MARGIN = 0.04
LIBRARIES = GIB // 4
FRAGMENTS = 0.06
LONG_FRAGMENTS = 0.35
SCANT = 1.3
"""How much longer a plan takes that moves the embedding or inputs, or does the MLP in pieces: few logits at a time."""

CUBLAS = 2**26
"""Bytes of cuBLAS's own workspaces, one for each of the threads of forward and backward."""


@dataclass(frozen=True)
class Plan:
    """What the planner has chosen."""

    micro_batches_at_once: int
    """Micro-batches of an optimizer step that are computed in one forward and backward pass."""
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
    piece: int = 0
    """Tokens of which the MLP holds the activations at a time; 0 for all."""
    resident_layers: int = 0
    """Layers whose weights are held dequantised."""
    offload_layers: int = 0
    """Layers of which all that backward needs waits in host memory, but for the last of them."""
    fits: bool = True
    """False for the smallest plan there is, where that is more than the budget."""

    def __str__(self) -> str:
        moved = [", embedding on the CPU"] * self.host_embedding + [", inputs offloaded"] * self.offload
        moved += [f", MLP in pieces of {self.piece} tokens"] * (self.piece > 0)
        moved += [f", {self.offload_layers} layers' activations offloaded"] * (self.offload_layers > 0)
        moved += [f", {self.resident_layers} layers' weights held in bf16"] * (self.resident_layers > 0)
        return (
            f"{plural(self.micro_batches_at_once, 'micro-batch')} at once, "
            f"{self.recompute_layers} layers recomputed{''.join(moved)}, "
            f"estimated peak {self.estimate / GIB:.2f} of {self.budget / GIB:.2f} GiB"
            + ("" if self.fits else ", WHICH MAY NOT FIT")
        )


@dataclass(frozen=True)
class HostProfile:
    """What is measured of a machine before it is planned for; without arguments, what is safe on any."""

    share: float = 0.0
    """Of the layers, how many can send to the host's memory what they keep while all compute."""
    memory: int = 2**62
    """Bytes of the host's memory that may be pinned."""
    launch: int = 0
    """Tokens that the device computes in the time in which the host launches a micro-batch."""


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
    again: int = 0
    """Per token, of one recomputed layer, beside its backward."""
    attention: int = 0
    """Per token, of the backward of attention in a recomputed layer."""
    mixed: int = 0
    """Per token, of what a recomputed layer holds while its MLP goes in pieces."""
    piece: int = 0
    """Per token of such a piece."""
    selected: int = 0
    """Per token, of the copies of attention's result that the last layer makes to go on with fewer rows."""
    resident: int = 0
    """Of one layer's weights when they are held dequantised; 0 when they are not in 4 bits."""
    products: int = 0
    """Multiplications, not bytes, per token of one layer's forward."""

    @staticmethod
    def of(model: Any, state_bytes: int) -> "Shape":
        """Read from a PEFT model.

        Args:
            model: as for ``FastEngine``.
            state_bytes: of optimizer state per trained number.
        """
        base = model.base_model.model
        config, family = base.config, family_of(base.config)
        blocks, layers = base.get_submodule(family.decoder).layers, family.layers(config)
        size = base.get_input_embeddings().weight.element_size()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        # Layers may have adapters of their own; each number is that of the layer that needs most.
        needs = [_needs(block, layer, config, size) for block, layer in zip(blocks, layers, strict=True)]
        most = {name: max(need[name] for need in needs) for name in needs[0]}
        return Shape(
            layers=len(blocks),
            input=config.hidden_size * size,
            fixed=trained * (4 + size + state_bytes) + most.pop("augmented_weight") + CUBLAS,
            vocabulary=config.vocab_size * size,
            embedding=0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * size,
            **most,
        )

    def peak(
        self,
        static: int,
        tokens: int,
        recompute: int,
        chunk: int,
        host: bool = False,
        off: bool = False,
        piece: int = 0,
        away: int = 0,
    ) -> int:
        """Bytes at the peak of a micro-batch of ``tokens``, with ``static`` bytes allocated before."""
        static -= self.embedding if host else 0
        # Of offloaded inputs, the one in use and, of short rows, the one on its way are on the device.
        inputs = tokens * (min(1 + (tokens <= PIECE), recompute) if off else recompute) * self.input
        # The logits are gone when the layers' backward begins.
        loss = min(chunk, tokens) * self.vocabulary + 5 * tokens * self.input
        # The last of the layers for the host stays; where no kept one is above it, another is on its way.
        there = 0 if not away else 1 + (2 * away > self.layers)
        ends = tokens * (self.layers - recompute - away + there) * self.kept
        ends += max(loss, tokens * self.working) + tokens * self.selected if recompute < self.layers else loss
        ends += tokens * self.input if recompute and away else 0
        # The layers that keep everything are the last, and done with when the first ones are computed again. Below the
        # last layer, the input of the one that is computed again is among those on the device already.
        whole = recompute == self.layers
        again = tokens * (self.working + self.again - (0 if off or whole else self.input)) if recompute else 0
        again += tokens * self.selected if whole else 0
        if recompute and piece and piece < tokens:
            again = max(tokens * self.attention, tokens * self.mixed + piece * self.piece)
        if away:
            # What comes back for another layer comes while one computes.
            again = tokens * self.kept + max(again, tokens * (self.kept + self.working))
        return static + self.fixed + inputs + max(ends, again)


def _needs(block: Any, layer: Layer, config: Any, size: int) -> dict[str, int]:
    """What one layer adds to a ``Shape``, and its largest ``frame``; numbers of ``size`` bytes."""
    linears = {name: read_linear(one, True) for name, one in linears_of(block, layer).items()}
    groups = [[linears[one.name] for one in group] for group in layer.groups]
    rooms = [lora_columns(group) for group in groups]
    hidden, inner, heads = config.hidden_size, config.intermediate_size, layer.heads
    query, key = heads * layer.head_size, layer.key_heads * layer.head_size
    # Of attention, from the sum before its norm to the sum before the MLP's.
    masked = rooms[3] > 0 and groups[3][0].dropout > 0
    normed = (query + key) * layer.query_key_norm
    mixing = 2 * hidden + 2 * query + 2 * key + sum(rooms[:2]) + normed
    mixing += hidden * (rooms[0] > 0)
    kept = mixing + hidden * (rooms[2] > 0) + 2 * inner + 2 * rooms[2] + (inner + rooms[3]) * (rooms[3] > 0)
    # What the backward of the MLP takes, and what that of attention takes beyond what the MLP's has left.
    mlp = (2 - (rooms[3] > 0)) * hidden + inner * (1 + masked)
    attention = 6 * query + 2 * key - 2 * inner - inner * (rooms[3] > 0) - hidden * (rooms[2] > 0)
    working = max(mlp, attention)
    augmented = [
        (sum(linear.out for linear in part) + extra) * (width_of(part[0]) + extra)
        for group, extra in zip(groups, rooms, strict=True)
        for part in parts_of(group, group is groups[0])
    ]
    return {
        "kept": kept * size + 4 * heads,
        "working": working * size,
        "again": (kept + max(mlp + (0 if rooms[3] else inner), attention) - working) * size + 4 * heads,
        "attention": (4 * hidden + 6 * query + 5 * key + normed) * size,
        "mixed": (4 * hidden + 2 * query + 2 * key + normed) * size,
        "piece": ((4 + (rooms[3] > 0) + masked) * inner + 4 * hidden) * size,
        "selected": query * size,
        "resident": sum(augmented) * size * all(linear.quant_state is not None for linear in linears.values()),
        "augmented_weight": max(augmented) * size,
        "products": sum(linear.out * width_of(linear) for linear in linears.values()),
    }


def relative_time(recomputed: float, tokens: float, held: float = 0.0, launch: int = 0, away: float = 0.0) -> float:
    """Time of a token, over that of one that keeps everything in an endless micro-batch.

    Recomputing a layer costs a third of it, and sending it to the host a twentieth, as copies take memory's time from
    the products. A micro-batch costs as much as 220 tokens beside what it computes, and
    dequantising all weights as much as 260.

    Args:
        recomputed: share of the layers.
        tokens: of a micro-batch.
        held: share of the layers whose weights are held dequantised.
        launch: as of ``HostProfile``; recomputing launches half as much again.
        away: share of the layers whose activations go to the host.
    """
    device = (1 + 0.3 * recomputed + 0.045 * away) * (1 + (220 + 260 * (1 - held)) / tokens)
    return max(device, launch * (1 + 0.5 * recomputed) / tokens)


def time_of(plan: Plan, shape: Shape, tokens: float, launch: int = 0) -> float:
    """``relative_time`` of a plan, for micro-batches of so many tokens in the configuration."""
    recomputed, held, away = (
        count / shape.layers for count in (plan.recompute_layers, plan.resident_layers, plan.offload_layers)
    )
    moves = plan.host_embedding or plan.offload or plan.piece > 0
    return relative_time(recomputed, tokens * plan.micro_batches_at_once, held, launch, away) * (
        SCANT if moves else 1.0
    )


def _gaps(longest: int, tokens: int) -> float:
    """Share of the activations that is left free beside them.

    Blocks of a long row are large, and fit ill into the gaps that earlier ones leave; twice as many tokens of shorter
    rows still do without.

    Args:
        longest: tokens of the largest micro-batch of the configuration.
        tokens: of those that are computed as one.
    """
    return LONG_FRAGMENTS if longest > PIECE or tokens > 2 * PIECE else 0.0


def limit(budget: int) -> int:
    """Bytes that a plan may take of a budget."""
    return int(budget * (1 - MARGIN)) - LIBRARIES


def choose(
    shape: Shape,
    static: int,
    budget: int,
    sizes: Mapping[int, int],
    machine: HostProfile = HostProfile(),  # noqa: B008
    only: int | None = None,
    mean: float | None = None,
) -> Plan:
    """The fastest plan that fits.

    Args:
        shape: of the model.
        static: bytes allocated before the first step.
        budget: bytes that may be used.
        sizes: tokens of the largest micro-batches of the configuration together, by how many may be computed as one;
            1 is among them.
        machine: that the plan is for.
        only: so many are computed as one, if that fits.
        mean: tokens of a micro-batch of the configuration on average, by which time is judged; those of the largest
            where it is not given.

    Returns:
        The plan; the smallest one when none fits.
    """
    every = sorted(sizes, reverse=True)
    usual = sizes[1] if mean is None else mean
    for merges in [[only], every] if only is not None and only in sizes else [every]:
        small = _small(shape, static, budget, sizes, merges, machine)
        plans = _usual(shape, static, budget, sizes, merges, machine) + [plan for plan in small if plan.fits]
        if plans:
            return min(plans, key=lambda plan: (time_of(plan, shape, usual, machine.launch), plan.offload_layers))
    return small[-1]


def _usual(
    shape: Shape, static: int, budget: int, sizes: Mapping[int, int], merges: list[int], machine: HostProfile
) -> list[Plan]:
    """All plans that fit and leave everything where it is but the activations of some layers."""
    usable = limit(budget)
    chunk = max(128, min(2048, int(0.02 * budget) // shape.vocabulary // 128 * 128))
    plans = []
    for merge in merges:
        tokens = sizes[merge]
        gaps = _gaps(sizes[1], tokens)
        # A layer takes whole blocks of the host's memory.
        most = max(0, min(int(machine.share * shape.layers), machine.memory // (tokens * shape.kept + BLOCK)))
        for away, recompute in product(range(most + 1), range(shape.layers + 1)):
            if away + recompute > shape.layers:
                continue
            estimate = shape.peak(static, tokens, recompute, chunk, away=away)
            if estimate + gaps * (estimate - static) > usable:
                continue
            # What lies between activations of different sizes is lost to weights that stay.
            left = usable - estimate - int(max(FRAGMENTS, gaps) * (estimate - static))
            held = min(shape.layers, max(0, left // shape.resident)) if shape.resident else 0
            estimate += held * shape.resident
            plans.append(Plan(merge, recompute, chunk, estimate, budget, resident_layers=held, offload_layers=away))
    return plans


def _small(
    shape: Shape, static: int, budget: int, sizes: Mapping[int, int], merges: list[int], machine: HostProfile
) -> list[Plan]:
    """Plans that recompute every layer, from what costs least time to what takes least memory."""
    longest = sizes[1]
    ways = [
        (host, piece, off)
        for off in (False, True)[: 1 + (machine.memory >= sizes[merges[-1]] * shape.layers * shape.input)]
        for host in ((False, True) if shape.embedding else (False,))
        for piece in ((0, PIECE) if longest > PIECE else (0,))
    ]
    if longest > PIECE:
        # Smaller pieces dequantise the weights more often.
        ways += [(bool(shape.embedding), PIECE // parts, ways[-1][2]) for parts in (2, 4)]
    plans = []
    for (host, piece, off), merge in product(ways, merges):
        tokens = sizes[merge]
        if off and merge > merges[-1] and machine.memory < tokens * shape.layers * shape.input:
            continue
        estimate = shape.peak(static, tokens, shape.layers, 128, host, off, piece)
        gaps = int(_gaps(longest, tokens) * (estimate - static + shape.embedding * host))
        fits = estimate + gaps <= limit(budget)
        plans.append(Plan(merge, shape.layers, 128, estimate, budget, host, off, piece, fits=fits))
    return plans


def apply(plan: Plan, model: Any) -> FastEngine:
    """The engine of a plan; puts the embedding on the CPU or the device, as the plan says."""
    base = model.base_model.model
    embedding, device = base.get_input_embeddings(), base.get_submodule(family_of(base.config).norm).weight.device
    where = torch.device("cpu") if plan.host_embedding else device
    if embedding.weight.device != where:
        embedding.to(where)
        torch.cuda.empty_cache()
    return FastEngine(
        model,
        plan.recompute_layers,
        plan.loss_chunk,
        plan.offload,
        plan.piece,
        plan.resident_layers,
        plan.offload_layers,
    )


def free_memory(device: torch.device) -> int:
    """Bytes of the device that this process may use, those it holds already included."""
    free, total = torch.cuda.mem_get_info(device)
    limit = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(device) * total
    return int(min(free + torch.cuda.memory_reserved(device), limit))
