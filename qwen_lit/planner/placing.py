"""Puts the parts of a model where a plan says: on the device, or on the host."""

from typing import Any

from peft import PeftModel

from qwen_lit.engine.ends import place_ends, waits
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.products import Products
from qwen_lit.frozen.store import store_of
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import Plan


def apply(plan: Plan, model: PeftModel, products: Products | None = None) -> FastEngine:
    """The engine of a plan; moves what the plan moves to the host, and back what it does not.

    Args:
        plan: as chosen.
        model: on the device.
        products: as of ``FastEngine``.

    Raises:
        torch.OutOfMemoryError: the device has no room for what is to be on it.
    """
    base: Any = model.base_model.model
    policies, store = plan.policies, store_of(base)
    before = waits(base.get_input_embeddings()), waits(base.get_output_embeddings())
    # What leaves makes room for what comes.
    place_ends(base, *(one or other for one, other in zip(before, policies.ends_on_host, strict=True)))
    if store is not None:
        store.place(policies.streamed)
    place_ends(base, *policies.ends_on_host)
    return FastEngine(model, policies, products)


def away(model: PeftModel, memory: ModelMemory) -> int:
    """Bytes that the device would take more if all that may wait on the host were on it.

    Args:
        model: on the device.
        memory: of it.
    """
    base: Any = model.base_model.model
    store = store_of(base)
    ends = memory.embedding * waits(base.get_input_embeddings()) + memory.head * waits(base.get_output_embeddings())
    return ends + (0 if store is None else store.away)
