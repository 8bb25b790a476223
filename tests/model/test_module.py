"""The module as Lightning handles it."""

import torch
from transformers import BitsAndBytesConfig

from qwen_lit.config import LoraSection
from qwen_lit.engine.ends import place_ends
from qwen_lit.engine.policy import Policies
from qwen_lit.model.load import add_adapter, load_base
from qwen_lit.model.module import QwenModule
from qwen_lit.model.settings import ModelSettings
from qwen_lit.planner.plan import Plan
from tests.frozen.stores import snapshot


def test_what_waits_on_the_host_stays_there_when_all_else_is_moved(model_folder):
    lora = LoraSection(r=4, target_modules=["q_proj"])
    for host in (False, True):
        module = QwenModule(ModelSettings(str(model_folder), lora))
        base = load_base(str(model_folder), None, torch.device("cpu"))
        module.model = add_adapter(base, lora, False)
        place_ends(base, host, host)
        ends = [base.get_input_embeddings(), base.get_output_embeddings()]
        weights = [one.weight.clone() for one in ends]
        assert module.to("meta") is module and module.device.type == "meta"
        assert all(one.device.type == "meta" for _, one in module.named_parameters())
        assert [one.weight.device.type for one in ends] == ["cpu" if host else "meta"] * 2
        if host:
            assert all(torch.equal(one.weight, weight) for one, weight in zip(ends, weights, strict=True))
            module.to(torch.float32)
            assert all(one.weight.dtype == torch.float32 for one in ends)


def test_what_the_store_holds_stays_where_it_is_when_all_else_is_moved(model_folder):
    lora = LoraSection(r=4, target_modules=["q_proj"])
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    module = QwenModule(ModelSettings(str(model_folder), lora))
    base = load_base(str(model_folder), held, torch.device("cpu"))
    store = snapshot(base)
    store.place([1])
    module.model = add_adapter(base, lora, False)
    assert module.store is store
    weights = [layer.mlp.up_proj.weight for layer in base.model.layers]
    places = [one.data_ptr() for one in weights]
    module.to("meta")
    assert {one.device.type for name, one in module.named_parameters() if "lora" in name or "norm" in name} == {"meta"}
    assert [layer.mlp.up_proj.weight for layer in base.model.layers] == weights
    assert [one.data_ptr() for one in weights] == places and {one.device.type for one in weights} == {"cpu"}
    # What stands for a layer that is away takes no memory.
    assert weights[1].untyped_storage().nbytes() == 1
    module.teardown("fit")
    assert not store.resident and store.ring is None and store.away == sum(store.sizes)


def test_as_many_micro_batches_are_computed_at_once_as_the_plan_says_and_one_without_a_plan(model_folder):
    module = QwenModule(ModelSettings(str(model_folder), LoraSection(r=4, target_modules=["q_proj"])))
    assert module.micro_batches_at_once == 1
    module.plan = Plan(3, Policies.of_counts(2), 0, 0)
    assert module.micro_batches_at_once == 3
