"""Models that the engine's tests share."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Models whose widths integers can be multiplied at, with biases and with norms of heads."""
    found = {}
    for family, config, model in (
        ("qwen2", Qwen2Config, Qwen2ForCausalLM),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM),
    ):
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "vocab_size": 301}
        made = model(config(**sizes, num_attention_heads=4, num_key_value_heads=4, head_dim=32))
        for name, parameter in made.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        found[family] = str(tmp_path_factory.mktemp(family))
        made.save_pretrained(found[family])
    return found
