"""What the configuration and the checkpoint say of a plan reaches the planner."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import BitsAndBytesConfig

from qwen_lit.config import LoraSection
from qwen_lit.engine.products import NAMED, Products
from qwen_lit.errors import UserError
from qwen_lit.model.module import QwenModule
from qwen_lit.model.settings import ModelSettings
from qwen_lit.planner import choice
from qwen_lit.planner.choice import choose_engine
from qwen_lit.planner.plan import GIB
from tests.engine.test_engine import adapted
from tests.planner.test_planner import BUDGET, FakeGpu, work_of


class Rows:
    """Micro-batches of 50,000 tokens each."""

    def __init__(self):
        self.asked = []
        self.work = work_of(asked=self.asked)

    def most_tokens(self, counts):
        return {count: self.work.sizes[count] for count in counts}

    def mean_tokens(self):
        return self.work.mean

    def heaviest(self, count):
        return self.work.heaviest(count)


@pytest.fixture
def chosen(model_folder, monkeypatch):
    """The choice for a CUDA device on which every plan fits, by the settings of a module."""
    monkeypatch.setattr("qwen_lit.engine.supported.HAS_TRITON", True)

    def run(before=None, command="fit", processes=1, device="cuda", **settings):
        gpu, rows = FakeGpu(lambda engine: 0), Rows()
        monkeypatch.setattr(choice, "Gpu", lambda device: gpu)
        module = QwenModule(ModelSettings(str(model_folder), LoraSection(r=4, target_modules=["q_proj"]), **settings))
        module.model = adapted("qwen2")
        trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(device)),
            precision_plugin=SimpleNamespace(forward_context=nullcontext),
            state=SimpleNamespace(fn=command),
            micro_batches_per_step=8,
            num_devices=processes,
            world_size=1,
            is_global_zero=True,
        )
        return choose_engine(module, trainer, rows, before), gpu

    return run


def test_a_new_run_takes_what_is_fastest_and_one_that_goes_on_as_many_at_once_as_before(chosen):
    assert [chosen(before)[0].plan.micro_batches_at_once for before in (None, 1, 3, 4)] == [2, 1, 3, 4]


def test_the_budget_of_the_configuration_is_the_plan_s(chosen):
    assert [chosen(memory_budget=given)[0].plan.budget for given in (None, "1GiB", "16GiB")] == [BUDGET, GIB, BUDGET]


def test_a_plan_is_measured_where_it_trains_alone_and_told_with_its_peak(chosen):
    (fitted, gpu), (validated, idle) = chosen(), chosen(command="validate")
    assert gpu.tried == [fitted.fast] and not idle.tried
    assert fitted.description == f"fast, {fitted.plan}, measured 0.00"
    assert validated.description == f"fast, {validated.plan}"
    assert fitted.fast.policies == fitted.plan.policies


def test_states_of_the_optimizer_and_processes_of_the_machine_are_those_of_the_run(chosen, monkeypatch):
    asked = []
    monkeypatch.setattr(
        FakeGpu, "profile", lambda self, _, memory, count, meet: asked.append((memory, count)) or self.host
    )
    chosen(processes=4, optimizer="adamw")
    chosen(processes=2, optimizer="paged_adamw_8bit")
    assert [(memory.state_bytes, count) for memory, count in asked] == [(8, 4), (2, 2)]


def test_the_reference_is_taken_where_it_is_asked_for_on_a_gpu_too(chosen):
    found, gpu = chosen(engine="reference")
    assert (found.description, found.fast, found.plan) == ("reference", None, None) and not gpu.tried


def test_how_gate_and_up_are_kept_reaches_the_engine_and_is_told(chosen, caplog):
    found, gpu = chosen(kept="int8")
    assert found.fast.policies.kept == gpu.tried[-1].policies.kept == "int8"
    layers = found.fast.policies.packed
    assert layers and f"{layers} layers' gate and up kept in 8 bits" in found.description
    assert "8 bits" not in chosen()[0].description
    on_cpu = {"device": "cpu", "engine": "fast", "kept": "int8"}
    assert chosen(gradient_checkpointing=False, **on_cpu)[0].description.endswith(
        "2 layers' gate and up kept in 8 bits"
    )
    # Nothing is kept that way of layers that are recomputed.
    assert "8 bits" not in chosen(**on_cpu)[0].description
    assert not caplog.messages
    chosen(device="cpu", kept="int8")
    assert "model.kept: int8 changes nothing: the engine is reference (there is no CUDA device)" in caplog.messages


def test_the_reference_engine_is_refused_what_it_cannot_keep():
    with pytest.raises(UserError, match="model.kept is int8, which the reference engine cannot do"):
        ModelSettings("x", LoraSection(), kept="int8", engine="reference")


def test_products_are_the_engine_s_and_the_plan_s_where_the_device_computes_them_and_only_to_train(
    chosen, monkeypatch
):
    asked = []
    held = BitsAndBytesConfig(load_in_4bit=True)
    monkeypatch.setattr(choice, "refusal", lambda passes, device: asked.append((passes, device.type)))
    fitted, gpu = chosen(products="fp8", quantization_config=held)
    assert fitted.fast.products == Products("fp8") and gpu.tried == [fitted.fast] and fitted.refused is None
    assert asked == [(NAMED["fp8"], "cuda")]
    assert chosen(products="fp8", command="validate")[0].fast.products == Products()
    monkeypatch.setattr(choice, "refusal", lambda passes, device: "it has no fp8")
    refused, _ = chosen(products="fp8", quantization_config=held)
    assert refused.fast.products == Products() and refused.refused == "it has no fp8"
    assert len(asked) == 1


def test_all_ranks_take_bf16_where_one_of_them_is_refused(chosen, monkeypatch):
    monkeypatch.setattr(choice, "refusal", lambda passes, device: None)
    monkeypatch.setattr(choice, "gathered", lambda trainer, mine: [mine, "rank 1 has no fp8"])
    assert chosen(products="int8")[0].refused == "rank 1 has no fp8"


def test_products_in_8_bits_are_refused_where_the_reference_would_train(chosen):
    with pytest.raises(UserError, match="model.products is fp8, but model.engine is reference"):
        chosen(products="fp8", engine="reference")
    assert chosen(products="fp8", engine="reference", command="validate")[0].fast is None
