"""Tiny models with linear attention, of each family that has it."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 301,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
EXPERTS = {
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
THREE = {"mrope_section": [2, 1, 1], "mrope_interleaved": True}
HYBRIDS = {
    "qwen3_next": {**EXPERTS, "rope_parameters": ROPE},
    "qwen3_5_text": {"intermediate_size": 96, "rope_parameters": ROPE | THREE},
    "qwen3_5_moe_text": {**EXPERTS, "rope_parameters": ROPE | THREE},
}


def hybrid(kind: str, **sizes):
    """A model in float32, whose fourth layer attends; states decay slowly, as trained ones do."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **HYBRIDS[kind], **sizes}))
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.fill_(-3.0)
    return model
