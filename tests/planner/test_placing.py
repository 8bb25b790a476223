"""What a plan sends to the host goes there, comes back by the next plan, and changes nothing that is computed."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from qwen_lit.engine.ends import waits
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.model.load import load_base
from qwen_lit.planner import placing as planning
from qwen_lit.planner.measure import pass_seconds, without_copies
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.placing import apply, away
from qwen_lit.planner.plan import Plan
from qwen_lit.planner.planner import Planner
from tests.engine.test_engine import batch
from tests.frozen.stores import CPU, snapshot
from tests.planner.test_planner import FakeGpu

LAYERS = 3


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A model whose 4-bit layers are all away."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 301}
    config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    folder = tmp_path_factory.mktemp("model")
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    base = load_base(folder, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), CPU)
    store = snapshot(base)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).eval(), store


def plan_of(streamed, **options):
    return Plan(1, Policies.of_counts(LAYERS, streamed=frozenset(streamed), **options), 0, 0)


PLANS = {
    "nothing": plan_of(()),
    "every layer and both ends": plan_of(range(LAYERS), offload_embedding=True, offload_head=True),
    "the head alone": plan_of((), offload_head=True),
    "layers and the embedding": plan_of((0, 1), offload_embedding=True),
}


def test_plans_one_after_the_other_compute_the_same(loaded):
    model, store = loaded
    base = model.get_base_model()
    memory = ModelMemory.of(model, 2)
    assert memory.blocks == store.sizes and memory.head == memory.embedding == 301 * 64 * 2
    losses = []
    for plan in [*PLANS.values(), PLANS["nothing"]]:
        engine = apply(plan, model)
        policies = plan.policies
        assert set(store.streamed) == policies.streamed and len(store.resident) == LAYERS - len(policies.streamed)
        assert waits(base.get_input_embeddings()) == policies.offload_embedding
        assert waits(base.get_output_embeddings()) == policies.offload_head
        # What is taken off the estimate is what is not on the device.
        assert away(model, memory) == -memory.beside(0, policies) + memory.beside(0, Policies.of_counts(LAYERS))
        losses.append(engine.loss_sum(batch(True)).item())
    assert len(set(losses)) == 1 and losses[0] > 0


def test_what_leaves_the_device_goes_before_anything_comes(loaded, monkeypatch):
    model, store = loaded
    apply(plan_of(range(LAYERS), offload_embedding=True), model)
    order = []
    ends, place = planning.place_ends, store.place
    monkeypatch.setattr(planning, "place_ends", lambda *given: order.append(given[1:]) or ends(*given))
    monkeypatch.setattr(store, "place", lambda streamed: order.append(set(streamed)) or place(streamed))
    apply(PLANS["the head alone"], model)
    # The head goes, the layers come, and then the embedding.
    assert order == [(True, True), set(), (False, True)]


@pytest.mark.parametrize("name", ["nothing", "every layer and both ends"])
def test_bytes_before_the_first_step_count_what_waits_on_the_host(loaded, name):
    model, store = loaded
    apply(PLANS[name], model)
    ends = 2 * 301 * 64 * 2 * (name != "nothing")
    found = Planner(model, FakeGpu(int), int, nullcontext, 2)
    assert found.static == ends + (store.sizes[0] if name != "nothing" else 0)


def test_launching_is_timed_without_copies_and_the_layers_are_bound_anew(loaded, monkeypatch):
    model, store = loaded
    engine, made = apply(plan_of(range(LAYERS)), model), []
    plain = store.ring.copies.begin
    monkeypatch.setattr(store.ring.copies, "begin", lambda *given: made.append(given[0]) or plain(*given))
    before, ring = engine.loss_sum(batch(True)).item(), store.ring
    assert made and not made.clear()
    with without_copies(store):
        assert store.ring is not ring
        FastEngine(model).loss_sum(batch(True))
    assert store.ring is ring and not made
    for layer in store.layers:
        with pytest.raises(RuntimeError, match="before it is on the device"):
            next(iter(layer.modules.values())).weight.quant_state.absmax  # noqa: B018
    assert engine.loss_sum(batch(True)).item() == before
    apply(plan_of(()), model)
    with without_copies(store):
        assert engine.loss_sum(batch(True)).item() == before


def test_a_pass_over_the_streamed_layers_copies_them(loaded, monkeypatch):
    model, store = loaded
    apply(plan_of(range(LAYERS)), model)
    made, plain = [], store.ring.copies.begin
    monkeypatch.setattr(store.ring.copies, "begin", lambda *given: made.append(given[0]) or plain(*given))
    assert pass_seconds(store) > 0 and set(made) == set(range(LAYERS)) and len(made) >= 2 * LAYERS - 2
