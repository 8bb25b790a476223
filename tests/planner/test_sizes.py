"""What the released models take, from their configs alone: parameters, memory, the work of a token."""

import pytest
import torch
from transformers import AutoConfig, BitsAndBytesConfig

from qwen_lit.commands.plan import static_bytes
from qwen_lit.families.table import family_of
from qwen_lit.model.load import count_parameters, empty_model
from qwen_lit.planner.flops import token_flops
from qwen_lit.quantization import planned_weights, usable

GIB = 2**30
CPU = torch.device("cpu")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
HYBRID = {
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
RELEASED = {
    "Qwen3.5-0.8B": {
        "model_type": "qwen3_5_text",
        **HYBRID,
        "vocab_size": 248320,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "intermediate_size": 3584,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "linear_num_value_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3.5-9B": {
        "model_type": "qwen3_5_text",
        **HYBRID,
        "vocab_size": 248320,
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "intermediate_size": 12288,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    },
    "Qwen3.8-27B": {
        "model_type": "qwen3_5_text",
        **HYBRID,
        "vocab_size": 248320,
        "hidden_size": 5120,
        "num_hidden_layers": 64,
        "intermediate_size": 17408,
        "num_attention_heads": 24,
        "num_key_value_heads": 4,
        "linear_num_value_heads": 48,
        "tie_word_embeddings": False,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "intermediate_size": 6144,
        "tie_word_embeddings": False,
    },
    "Qwen3.5-35B-A3B": {
        "model_type": "qwen3_5_moe_text",
        **HYBRID,
        "vocab_size": 248320,
        "hidden_size": 2048,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
    "Qwen3-Next-80B-A3B": {
        "model_type": "qwen3_next",
        **HYBRID,
        "vocab_size": 151936,
        "hidden_size": 2048,
        "num_hidden_layers": 48,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "num_experts": 512,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "tie_word_embeddings": False,
    },
}
"""The parts of config.json that sizes follow from."""


def config_of(name):
    given = dict(RELEASED[name])
    return AutoConfig.for_model(given.pop("model_type"), **given)


@pytest.mark.parametrize(
    ("name", "parameters", "in_nf4"),
    [
        ("Qwen3.5-0.8B", 752_393_024, 0.71),
        ("Qwen3.5-9B", 8_953_803_264, 7.12),
        ("Qwen3.8-27B", 26_895_998_464, 16.47),
        ("Qwen3-30B-A3B", 30_532_122_624, 15.55),
        ("Qwen3.5-35B-A3B", 34_660_610_688, 18.09),
        ("Qwen3-Next-80B-A3B", 79_674_391_296, 39.22),
    ],
)
def test_the_released_models_have_the_size_that_is_known_of_them(name, parameters, in_nf4):
    """The language model alone, without vision tower and multi-token prediction; embedding and head in bf16."""
    config = config_of(name)
    layers, ends = family_of(config).layers(config), config.vocab_size * config.hidden_size
    ends = ends * (2 - config.tie_word_embeddings) + config.hidden_size
    by_table = sum(one.numbers for layer in layers for one in layer.linears)
    by_table += sum(one.size for layer in layers for one in layer.vectors)
    assert count_parameters(config) == by_table + ends == parameters
    model = empty_model(config, torch.bfloat16).requires_grad_(False)
    held = planned_weights(config, usable(NF4, config), CPU)
    assert static_bytes(model, held) / GIB == pytest.approx(in_nf4, abs=0.01)


@pytest.mark.parametrize(
    ("name", "active", "in_state"),
    # By hand, a layer of 35B-A3B passes 8 experts of 3 x 2048 x 512, a shared one, a router of 2048 x 256, and
    # 33.7 or 27.3 million numbers of its mixer.
    [("Qwen3.5-9B", 6.92e9, 0.0081), ("Qwen3-30B-A3B", 2.73e9, 0.0), ("Qwen3.5-35B-A3B", 2.437e9, 0.0282)],
)
def test_the_work_of_a_token_is_that_of_the_weights_it_passes(name, active, in_state):
    """Of 30 billion parameters a token passes fewer than 3; attention's own products are in a quarter of a hybrid."""
    config = config_of(name)
    model = torch.nn.Linear(1, 1)
    model.base_model = type("Base", (), {"model": type("Causal", (), {"config": config})})
    work, _ = token_flops(model, 0, 0.0)
    state = sum(18 * layer.state for layer in family_of(config).layers(config))
    assert (work - state) / 4 == pytest.approx(active, rel=0.005)
    assert state / work == pytest.approx(in_state, abs=2e-4)
    attending = sum(layer.attends for layer in family_of(config).layers(config))
    longer, _ = token_flops(model, 1000, 0.0)
    heads = config.num_attention_heads * config.head_dim
    assert longer - work == 3 * 2 * 1000 * heads * attending
    assert attending == config.num_hidden_layers // (4 if state else 1)


def test_an_adapter_on_experts_works_on_their_share_of_the_tokens():
    config = config_of("Qwen3-30B-A3B")
    model = torch.nn.Linear(1, 1)
    model.base_model = type("Base", (), {"model": type("Causal", (), {"config": config})})
    alone, _ = token_flops(model, 0, 0.0)
    a = torch.nn.Parameter(torch.empty(128 * 16, 2048, device="meta"))
    model.named_parameters = lambda: [("base_model.model.model.layers.3.mlp.experts.lora_A.default.weight", a)]
    assert token_flops(model, 0, 0.0)[0] - alone == 6 * 8 * 16 * 2048
    model.named_parameters = lambda: [("base_model.model.model.layers.3.self_attn.q_proj.lora_A.default.weight", a)]
    assert token_flops(model, 0, 0.0)[0] - alone == 6 * 128 * 16 * 2048
