"""The module as Lightning handles it."""

import torch

from qwen_lit.config import LoraSection
from qwen_lit.engine.policy import Policies
from qwen_lit.model.load import add_adapter, load_base
from qwen_lit.model.module import QwenModule
from qwen_lit.model.settings import ModelSettings
from qwen_lit.planner.plan import Plan


def test_an_embedding_that_is_planned_for_the_cpu_stays_there_when_all_else_is_moved(model_folder):
    lora = LoraSection(r=4, target_modules=["q_proj"])
    for host in (False, True):
        module = QwenModule(ModelSettings(str(model_folder), lora))
        module.model = add_adapter(load_base(str(model_folder), None, torch.device("cpu")), lora, False)
        module.plan = Plan(1, Policies.of_counts(2, 2, offload_embedding=host), 0, 0)
        weight = module.model.get_input_embeddings().weight.clone()
        assert module.to("meta") is module and module.device.type == "meta"
        there = {name for name, one in module.named_parameters() if one.device.type == "cpu"}
        assert there == ({"model.base_model.model.model.embed_tokens.weight"} if host else set())
        if host:
            assert torch.equal(module.model.get_input_embeddings().weight, weight)
            assert module.to(torch.float32).model.get_input_embeddings().weight.dtype == torch.float32


def test_as_many_micro_batches_are_computed_at_once_as_the_plan_says_and_one_without_a_plan(model_folder):
    module = QwenModule(ModelSettings(str(model_folder), LoraSection(r=4, target_modules=["q_proj"])))
    assert module.micro_batches_at_once == 1
    module.plan = Plan(3, Policies.of_counts(2), 0, 0)
    assert module.micro_batches_at_once == 3
