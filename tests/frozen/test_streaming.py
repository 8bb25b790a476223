"""Layers whose weights come into a ring of slots compute what resident ones do, bit for bit."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.model.load import load_base
from tests.engine.test_engine import batch
from tests.frozen.stores import CPU, LateCopies, snapshot

LAYERS = 5


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def folder(request, tmp_path_factory):
    torch.manual_seed(0)
    config, kind = (Qwen2Config, Qwen2ForCausalLM) if request.param == "qwen2" else (Qwen3Config, Qwen3ForCausalLM)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 301}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    made = tmp_path_factory.mktemp(request.param)
    kind(config(**sizes, **heads)).bfloat16().save_pretrained(made)
    return made


def trained(folder, monkeypatch, streamed, slots=2, double=True, policy=Policy.KEEP, piece=0, steps=2):
    """Losses and the adapter after some steps, with dropout; and the copies that were made."""
    if monkeypatch is not None:
        monkeypatch.setattr("qwen_lit.frozen.store.copies_of", lambda blocks, numbers, device: LateCopies(blocks))
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double)
    base = load_base(folder, held, CPU)
    store = None
    if streamed is not None:
        store = snapshot(base)
        store.place(streamed, slots)
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]
    )
    model = get_peft_model(base, lora).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    engine = FastEngine(model, Policies((policy,) * LAYERS, mlp_piece=piece))
    losses = []
    for step in range(steps):
        loss = engine.loss_sum(batch(True, seed=step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        with torch.no_grad():
            losses.append(engine.loss_sum(batch(True, seed=100)).item())
    adapter = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    return losses, adapter, store


EVERY = range(LAYERS)


KEEP, AGAIN = Policy.KEEP, Policy.RECOMPUTE


@pytest.fixture(scope="module")
def resident(folder):
    """What resident layers come to, computed once for each way of training."""
    known = {}

    def found(double, policy, piece):
        if (double, policy, piece) not in known:
            known[double, policy, piece] = trained(folder, None, None, double=double, policy=policy, piece=piece)[:2]
        return known[double, policy, piece]

    return found


@pytest.mark.parametrize(
    ("streamed", "slots", "policy", "piece", "double"),
    [
        (EVERY, 2, KEEP, 0, True),
        (EVERY, 2, AGAIN, 0, True),
        (EVERY, 3, AGAIN, 0, True),
        (EVERY, 2, Policy.OFFLOAD, 0, True),
        (EVERY, 2, AGAIN, 8, True),
        (EVERY, 2, KEEP, 0, False),
        ((0, 2, 4), 2, KEEP, 0, True),
        ((1, 2), 3, AGAIN, 0, True),
        ((3,), 2, KEEP, 0, True),
    ],
    ids=str,
)
def test_streamed_layers_train_as_resident_ones(folder, resident, monkeypatch, streamed, slots, policy, piece, double):
    expected, there = resident(double, policy, piece)
    losses, adapter, store = trained(folder, monkeypatch, streamed, slots, double, policy, piece)
    assert losses == expected
    assert adapter.keys() == there.keys()
    assert all(torch.equal(adapter[name], there[name]) for name in there)
    assert store.streamed == tuple(streamed)
