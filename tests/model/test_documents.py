"""Packed documents see nothing of each other, in linear attention and its convolution as in attention."""

from functools import partial

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch.utils.checkpoint import checkpoint

from qwen_lit.config import LoraSection, QuantizationSection
from qwen_lit.data.batches import collate, padded
from qwen_lit.families.table import family_of
from qwen_lit.model.documents import FREE, SHARE, Documents, alike, keep_apart
from qwen_lit.model.load import add_adapter, load_base
from qwen_lit.model.loss import reference_loss
from qwen_lit.model.module import QwenModule
from qwen_lit.model.settings import ModelSettings
from tests.hybrids import HYBRIDS, hybrid

LENGTHS = (37, 1, 29, 170, 5, 64, 65, 2)


def documents(lengths=LENGTHS):
    draw = np.random.default_rng(0)
    return [(draw.integers(0, 301, length), np.array([[0, length]])) for length in lengths]


def loss_and_gradients(model, batches):
    model.zero_grad()
    of = model.loss_sum if isinstance(model, QwenModule) else partial(reference_loss, model, family_of(model.config))
    loss = torch.stack([of(one) for one in batches]).sum()
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(found, wanted):
    """The largest relative difference, of the loss and of any gradient."""
    ways = [((found[1][name] - one).norm() / one.norm()).item() for name, one in wanted[1].items() if one.norm()]
    return max(abs(found[0] / wanted[0] - 1), *ways)


def alone(made):
    return [collate([one], 0) for one in made]


@pytest.fixture(scope="module", params=HYBRIDS)
def apart(request):
    model = hybrid(request.param)
    keep_apart(model)
    return model.train(), loss_and_gradients(model, alone(documents()))


def test_loss_and_gradients_of_a_pack_are_those_of_its_documents_alone(apart):
    model, wanted = apart
    pack = collate(documents(), 0)
    assert len(alike(pack["lengths"])) > 2
    assert distance(loss_and_gradients(model, [pack]), wanted) < 1e-4
    assert distance(loss_and_gradients(model, [padded(pack, 0)]), wanted) < 1e-4
    # Told nothing of the borders, a mixer carries its state over them.
    borderless = loss_and_gradients(model, [pack | {"lengths": [sum(LENGTHS)]}])
    assert distance(borderless, wanted) > 1e-2


def test_recomputed_layers_lay_the_documents_out_again(apart):
    model, wanted = apart
    pack, calls = [collate(documents(), 0)], []
    hook = model.model.layers[0].linear_attn.register_forward_hook(lambda *_: calls.append(1))
    for recomputes in (False, True):
        for layer in model.model.layers:
            layer.gradient_checkpointing = recomputes
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        assert distance(loss_and_gradients(model, pack), wanted) < 1e-4
    hook.remove()
    assert len(calls) == 1 + 2


def test_keeping_apart_twice_is_as_once_and_leaves_names_and_answers_as_they_are():
    model, plain = hybrid("qwen3_5_text"), hybrid("qwen3_5_text")
    keep_apart(model)
    keep_apart(model)
    mixer, old = model.model.layers[0].linear_attn, plain.model.layers[0].linear_attn
    assert isinstance(mixer, type(old)) and type(mixer).__name__ == type(old).__name__
    assert type(mixer).__mro__.count(type(old)) == 1 and list(model.state_dict()) == list(plain.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_module_on_a_four_bit_base_learns_the_same_of_a_pack(tmp_path, monkeypatch, precision):
    hybrid("qwen3_5_text", num_hidden_layers=3).to(torch.bfloat16).save_pretrained(tmp_path)
    dtype = getattr(torch, precision)
    lora = LoraSection(r=4, target_modules=["in_proj_qkv", "in_proj_z", "out_proj", "gate_proj"])
    held = QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    monkeypatch.setattr("qwen_lit.model.load.product_dtype", lambda device: dtype)
    module = QwenModule(ModelSettings(str(tmp_path), lora, held))
    base = load_base(tmp_path, module.quantization_config, torch.device("cpu"))
    module.model = add_adapter(base, lora, True)
    assert isinstance(base.model.layers[0].linear_attn.in_proj_qkv.base_layer, Linear4bit)
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    made = documents()
    monkeypatch.setattr(QwenModule, "pads", False)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        wanted = loss_and_gradients(module, alone(made))
        found = loss_and_gradients(module, [collate(made, 0)])
    assert wanted[1] and all(".lora_" in name for name in wanted[1])
    assert distance(found, wanted) < (1e-4 if precision == "float32" else 5e-2)


@pytest.mark.parametrize(
    "lengths",
    [LENGTHS, (1,), (2048,), (1,) * 300, (2000, *range(1, 40)), tuple(range(1, 300, 3)), (5, 5, 5, 900, 900)],
    ids=lambda lengths: f"{len(lengths)} of {sum(lengths)}",
)
def test_documents_of_like_length_are_laid_out_together_and_little_is_padded(lengths):
    groups = alike(lengths)
    assert sorted(number for group in groups for number in group) == list(range(len(lengths)))
    rows = sum(len(group) * lengths[group[0]] for group in groups)
    assert all(lengths[group[0]] == max(lengths[number] for number in group) for group in groups)
    assert rows - sum(lengths) <= sum(lengths) / SHARE + FREE * len(groups) and len(groups) <= 8


def test_each_token_comes_back_from_the_row_of_its_document():
    pack = collate(documents(), 0)
    groups, back = Documents(pack).layout
    assert torch.equal(torch.cat([group.flatten() for group in groups])[back], torch.arange(sum(LENGTHS)))
    borders = pack["cu_seqlens"].tolist()
    for row in (row for group in groups for row in group.tolist()):
        start, end = next((a, b) for a, b in zip(borders, borders[1:], strict=False) if a == row[0])
        assert row == [min(start + place, end - 1) for place in range(len(row))]
