"""A memory plan: how many micro-batches are computed at once, and how the engine saves memory."""

import re
from dataclasses import dataclass

from qwen_lit.engine.policy import Policies
from qwen_lit.errors import UserError
from qwen_lit.lines import plural

GIB = 2**30
UNITS = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": GIB, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class Plan:
    """What the planner has chosen."""

    micro_batches_at_once: int
    """Micro-batches of an optimizer step that are computed in one forward and backward pass."""
    policies: Policies
    """How the engine saves memory, layer by layer."""
    estimate: int
    """Estimated bytes at the peak of a step."""
    budget: int
    """Bytes that may be used."""
    fits: bool = True
    """Whether the estimate is within the budget; False only for the smallest plan there is."""
    host: int = 0
    """Bytes of the host's memory that wait for the device, of all processes on the machine."""
    graph_tokens: int = 0
    """Tokens up to which a micro-batch is a CUDA graph; 0 for none."""
    graph_bytes: int = 0
    """Bytes that the graphs may take; they are in the estimate."""

    def __str__(self) -> str:
        policies, resident = self.policies, len(self.policies.resident)
        moved = [f", {len(policies.streamed)} layers streamed"] * bool(policies.streamed)
        moved += [", embedding on the CPU"] * policies.offload_embedding
        moved += [", lm_head on the CPU"] * policies.offload_head
        moved += [", inputs offloaded"] * policies.offload_inputs
        moved += [f", MLP in pieces of {policies.mlp_piece} tokens"] * (policies.mlp_piece > 0)
        moved += [f", {policies.offloaded} layers' activations offloaded"] * (policies.offloaded > 0)
        moved += [f", {resident} layers' weights held in bf16"] * (resident > 0)
        moved += [f", micro-batches of up to {self.graph_tokens} tokens as CUDA graphs"] * (self.graph_tokens > 0)
        return (
            f"{plural(self.micro_batches_at_once, 'micro-batch')} at once, {policies.recomputed} layers recomputed"
            f"{''.join(moved)}{packed_words(policies)}"
            f", estimated peak {self.estimate / GIB:.2f} of {self.budget / GIB:.2f} GiB"
            + (f", {self.host / GIB:.2f} GiB of host memory" if self.host else "")
            + ("" if self.fits else ", WHICH MAY NOT FIT")
        )


def packed_words(policies: Policies) -> str:
    """What is said of layers that keep gate and up in 8 bits, to follow other words; empty where none does."""
    return f", {policies.packed} layers' gate and up kept in 8 bits" * (policies.packed > 0)


def parse_bytes(text: str) -> int:
    """Bytes of ``8GiB``, ``24GB`` or a plain number.

    Raises:
        UserError: it is not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(f"model.memory_budget is {text!r}; give a size such as 8GiB or 24GB.")
    return int(float(match[1]) * UNITS[match[2].upper()])
