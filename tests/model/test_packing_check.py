"""Packing is refused where a row would see those before it, whatever the model."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.config import LoraSection
from qwen_lit.engine.engine import FastEngine
from qwen_lit.errors import UserError
from qwen_lit.model import documents
from qwen_lit.model.documents import keep_apart
from qwen_lit.model.load import add_adapter
from qwen_lit.model.module import QwenModule
from qwen_lit.model.packing_check import PARTS, ROW, check_packing
from qwen_lit.model.settings import ModelSettings
from tests.hybrids import EXPERTS, HYBRIDS, SIZES, hybrid

ATTENTION = {"qwen2": {}, "qwen3": {}, "qwen3_moe": EXPERTS}


def small(kind):
    if kind in HYBRIDS:
        return hybrid(kind)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **SIZES, **ATTENTION[kind], intermediate_size=96)
    )


@pytest.fixture
def module_of(model_folder, monkeypatch):
    """A module whose model is of a kind, with dropout, in training mode."""
    monkeypatch.setattr(QwenModule, "pads", False)

    def make(kind, dtype=torch.float32, autocast=False):
        made = QwenModule(ModelSettings(str(model_folder), LoraSection(r=4, target_modules=["q_proj"])))
        base = small(kind).to(dtype).requires_grad_(False)
        keep_apart(base)
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
        made.config, made.model = base.config, add_adapter(base, lora, False)
        context = partial(torch.autocast, "cpu", dtype=torch.bfloat16) if autocast else nullcontext
        trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=context))
        monkeypatch.setattr(QwenModule, "trainer", trainer)
        return made

    return make


def mixing(self, hidden_states, *arguments, documents=None, **more):
    """The forward of a mixer that is told the borders and passes over them."""
    return super(documents_class, self).forward(hidden_states, *arguments, **more)


documents_class = documents._KeepsApart


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [*ATTENTION, *HYBRIDS])
def test_every_family_may_be_packed(module_of, kind, precision):
    check_packing(module_of(kind, getattr(torch, precision), precision == "bfloat16"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_mixer_that_carries_its_state_over_a_border_is_refused(module_of, monkeypatch, kind, precision):
    monkeypatch.setattr(documents_class, "forward", mixing)
    with pytest.raises(
        UserError, match=rf"would see each other in this {kind} model: .* set data.packing to false\.$"
    ):
        check_packing(module_of(kind, getattr(torch, precision), precision == "bfloat16"))


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_over_a_border_is_refused(module_of, kind):
    module = module_of(kind)
    decoder = module.model.get_base_model().model
    plain = decoder.forward

    def endless(input_ids, position_ids, **more):
        return plain(input_ids=input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **more)

    decoder.forward = endless
    with pytest.raises(UserError, match="would see each other"):
        check_packing(module)


def test_the_engine_that_trains_is_asked(module_of, monkeypatch):
    module = module_of("qwen3")
    module.fast = FastEngine(module.model)
    check_packing(module)
    plain = __import__("qwen_lit.engine.engine", fromlist=["attention"]).attention
    whole = torch.tensor([0, 2 * ROW], dtype=torch.int32)
    monkeypatch.setattr(
        "qwen_lit.engine.engine.attention",
        lambda q, k, v, borders, longest: plain(q, k, v, whole.clamp(max=len(q)), len(q)),
    )
    with pytest.raises(UserError, match="set data.packing to false and model.engine to reference"):
        check_packing(module)


def test_the_look_leaves_nothing_behind_and_costs_a_few_short_forwards(module_of, monkeypatch):
    module, seen = module_of("qwen3_5_text"), []
    plain = QwenModule.loss_sum
    monkeypatch.setattr(QwenModule, "loss_sum", lambda self, one: seen.append(one) or plain(self, one))
    module.model.base_model.model.model.norm.eval()
    parameter = next(p for p in module.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    modes = [one.training for one in module.modules()]
    state, buffers = torch.get_rng_state(), {name: one.clone() for name, one in module.named_buffers()}
    check_packing(module)
    assert [one["lengths"] for one in seen] == PARTS * [[ROW], [ROW, ROW]]
    assert sum(one["targets"].numel() for one in seen) == 2 * (ROW - 1)
    assert modes == [one.training for one in module.modules()] and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(one, buffers[name]) for name, one in module.named_buffers())
    assert bool((parameter.grad == 1).all())
    assert all(p.grad is None for p in module.parameters() if p is not parameter)


def test_a_model_whose_loss_is_no_number_is_left_to_the_first_step(module_of):
    module = module_of("qwen3")
    module.model.base_model.model.model.norm.weight.data.fill_(float("nan"))
    check_packing(module)


def test_a_fit_that_would_leak_ends_before_its_first_step(arguments, monkeypatch, capsys):
    plain = QwenModule.loss_sum

    def leaking(self, batch):
        return plain(self, batch) * len(batch["lengths"])

    monkeypatch.setattr(QwenModule, "loss_sum", leaking)
    monkeypatch.setattr(QwenModule, "training_step", lambda *_: pytest.fail("a step is made"))
    assert main([*arguments, "--data.packing", "true"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: packed rows would see each other in this qwen2 model: tokens have the loss ")
