"""Experts in 4 bits on the device: what they compute, and the memory that loading and a step take."""

import gc

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.experts import products
from qwen_lit.experts.forward import Factors, experts_forward
from qwen_lit.experts.stacked import PARAMETERS, Stacked4bit, stacks
from qwen_lit.model.load import load_base, load_config
from qwen_lit.quantization import usable

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda:0")
COUNT, HIDDEN, INNER, FAN, RANK = 16, 512, 256, 4, 8
LAYERS, MANY = 6, 64
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


class Experts(nn.Module):
    """A layer's experts, held in 4 bits, as transformers' modules have them."""

    def __init__(self):
        super().__init__()
        self.num_experts, self.held_4bit = COUNT, {}
        for name, (rows, columns) in {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}.items():
            form = Stacked4bit(COUNT, rows, columns, PARAMETERS[name], "nf4", 64, True)
            weight = torch.randn(COUNT, rows, columns, device=DEVICE, dtype=torch.bfloat16) * columns**-0.5
            self.held_4bit[name] = form
            setattr(self, name, nn.Parameter(form.quantize(weight), requires_grad=False))

    def _apply_gate(self, made):
        gate, up = made.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def reference(module, hidden, index, weights, lora):
    """Each expert by itself, in float32, with its share of LoRA in its weight."""
    matrices = {}
    for name, form in module.held_4bit.items():
        a, b, scaling = lora[name]
        matrices[name] = form.dequantize(getattr(module, name)).float() + scaling * (b @ a)
    out = torch.zeros_like(hidden)
    for expert in range(COUNT):
        token, place = torch.where(index == expert)
        gate, up = (hidden[token] @ matrices["gate_up_proj"][expert].mT).chunk(2, dim=-1)
        made = nn.functional.silu(gate) * up @ matrices["down_proj"][expert].mT
        out = out.index_add(0, token, made * weights[token, place, None])
    return out


@pytest.mark.parametrize("group", [1, 2**27])
@pytest.mark.parametrize("rank", [RANK, 3])
def test_values_and_gradients_are_those_of_each_expert_by_itself(monkeypatch, group, rank):
    """With ranks that the grouped product takes and others, one expert at a time and all; one expert has no token."""
    monkeypatch.setattr(products, "GROUP_BYTES", group)
    torch.manual_seed(0)
    module, tokens = Experts(), 300
    index = torch.stack([torch.randperm(COUNT - 1, device=DEVICE)[:FAN] for _ in range(tokens)])
    sizes = {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
    leaves = [torch.randn(tokens, HIDDEN, device=DEVICE), torch.rand(tokens, FAN, device=DEVICE)]
    for out, inside in sizes.values():
        leaves += [torch.randn(COUNT, rank, inside, device=DEVICE) * inside**-0.5]
        leaves += [torch.randn(COUNT, out, rank, device=DEVICE) * 0.3]
    upstream, found = torch.randn(tokens, HIDDEN, device=DEVICE), []
    for compute in (experts_forward, reference):
        hidden, weights, *factors = [one.clone().requires_grad_() for one in leaves]
        lora = {name: Factors(*factors[2 * at : 2 * at + 2], 2.0) for at, name in enumerate(sizes)}
        ours = compute is experts_forward
        with torch.autocast("cuda", torch.bfloat16, enabled=ours):
            said = compute(module, hidden.bfloat16() if ours else hidden, index, weights, lora=lora)
        said.backward(upstream.to(said.dtype))
        found.append([said.float(), *(one.grad for one in (hidden, weights, *factors))])
    for mine, theirs in zip(*found, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 0.02
    for gradient in found[0][3:]:
        assert not gradient[COUNT - 1].any(), "an expert without a token has no gradient"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A mixture whose experts are nearly all of it: 0.6 billion numbers."""
    config = AutoConfig.for_model(
        "qwen3_moe",
        vocab_size=1000,
        hidden_size=1024,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        moe_intermediate_size=512,
        num_experts=MANY,
        num_experts_per_tok=4,
        tie_word_embeddings=False,
    )
    path = tmp_path_factory.mktemp("mixture")
    with DEVICE:
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    return path


def test_loading_never_has_the_experts_of_two_layers_in_16_bits(folder):
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = load_base(folder, usable(BitsAndBytesConfig(**NF4), load_config(folder)), DEVICE)
    held, peak = (one - before for one in (torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()))
    experts = sum(getattr(module, name).nbytes for _, module in stacks(model) for name in PARAMETERS)
    numbers = LAYERS * MANY * 3 * 1024 * 512
    assert 0.5 * numbers < experts < 0.53 * numbers
    # The gate and up matrices of a layer: each, stacked, and one below the other.
    largest = MANY * 2 * 1024 * 512 * 2
    print(
        f"held {held / 2**20:.0f} MiB, peak {peak / 2**20:.0f} MiB, experts in 16 bits {2 * numbers / 2**20:.0f} MiB"
    )
    assert peak < held + 3.5 * largest < 2 * numbers


def test_a_step_has_one_group_of_experts_in_16_bits_at_a_time(folder, monkeypatch):
    model = load_base(folder, usable(BitsAndBytesConfig(**NF4), load_config(folder)), DEVICE)
    embeds = torch.randn(1, 256, 1024, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    peaks = {}
    for group in (2**22, 2**27):
        monkeypatch.setattr(products, "GROUP_BYTES", group)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(inputs_embeds=embeds, use_cache=False).logits.float().sum().backward()
        peaks[group] = torch.cuda.max_memory_allocated() - before
    print({group: f"{peak / 2**20:.0f} MiB" for group, peak in peaks.items()})
    # Experts in 16 bits, and in 4 bits beside them.
    assert peaks[2**27] - peaks[2**22] < 2 * 2**27
    assert peaks[2**22] < LAYERS * MANY * 3 * 1024 * 512
