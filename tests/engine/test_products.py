"""Products in 8 bits in the engine: how near they are to those in bf16, and that no policy changes them."""

from dataclasses import replace

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.narrow import fitting, narrow_weight
from qwen_lit.engine.policy import Policies
from qwen_lit.engine.products import NAMED, Kind, Products
from qwen_lit.kernels.eight import transformed
from qwen_lit.kernels.footprint import LinearSize
from qwen_lit.model.load import load_base
from tests.engine.test_engine import ALL, CPU, QKVO, WAYS, batch, gradients

FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
NARROW = [name for name in NAMED if name != "bf16"]


def adapted(folder, targets=ALL, dropout=0.0):
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, lora_dropout=dropout, task_type="CAUSAL_LM")
    model = get_peft_model(load_base(folder, FOUR_BITS, CPU), lora).train()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


def trained(model, products, policies=None):
    """The loss of a batch, and all gradients as one vector."""
    torch.manual_seed(5)
    loss = FastEngine(model, policies, products).loss_sum(batch(True))
    found = gradients(model, loss)
    return loss.detach(), torch.cat([found[name].flatten() for name in sorted(found)])


def error(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("targets", [QKVO, ALL, ["gate_proj"], ["v_proj", "down_proj"]], ids=len)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_are_near_those_of_bf16_and_not_the_same(folders, family, targets, dropout):
    model = adapted(folders[family], targets, dropout)
    loss, wanted = trained(model, Products())
    found = {name: trained(model, Products(name)) for name in NARROW}
    assert all(not torch.equal(one, wanted) for _, one in found.values())
    # bf16's own error against float32 is about 1 % here, and forward of fp8_backward is that of bf16.
    assert abs(float(found["fp8_backward"][0] / loss) - 1) < 1e-3
    for name, most in (("fp8_backward", 0.08), ("int8", 0.08), ("fp8", 0.2)):
        assert error(found[name][1], wanted) < most, name
    assert abs(float(found["fp8"][0] / loss) - 1) < 1e-2
    assert error(found["int8"][1], wanted) < error(found["fp8"][1], wanted)


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("targets", [QKVO, ALL], ids=len)
def test_no_policy_changes_what_is_computed(folders, name, targets, monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 0)
    model = adapted(folders["qwen2"], targets, 0.1)
    loss, wanted = trained(model, Products(name))
    for way in WAYS:
        found_loss, found = trained(model, Products(name), Policies(way))
        assert torch.equal(found_loss, loss) and torch.equal(found, wanted), way


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("targets", [QKVO, ALL], ids=len)
def test_with_gate_and_up_kept_in_8_bits_the_loss_is_the_same_and_gradients_are_near(folders, name, targets):
    model = adapted(folders["qwen2"], targets)
    (loss, wanted), (found_loss, found) = (
        trained(model, Products(name), Policies.of_counts(3, kept=kept)) for kept in ("bf16", "int8")
    )
    assert torch.equal(found_loss, loss)
    # What eight bits of a gradient round moves with what they are made of.
    assert 1e-4 < error(found, wanted) < (0.02 if name == "int8" else 0.1)


@pytest.mark.parametrize("name", NARROW)
def test_pieces_of_the_mlp_have_the_products_of_the_whole(folders, name):
    model = adapted(folders["qwen2"], QKVO)
    loss, wanted = trained(model, Products(name))
    found_loss, found = trained(model, Products(name), replace(Policies.of_counts(3), mlp_piece=16))
    # Rows have scales of their own, so that a piece of them has the same numbers.
    assert torch.allclose(found_loss, loss, rtol=1e-5) and error(found, wanted) < 1e-2


@pytest.mark.parametrize("name", NARROW)
def test_what_is_not_trained_is_computed_in_bf16(folders, name):
    model = adapted(folders["qwen2"])
    with torch.no_grad():
        losses = [FastEngine(model, None, Products(one)).loss_sum(batch(True)) for one in ("bf16", name)]
    assert torch.equal(*losses)
    model.eval()
    losses = [FastEngine(model, None, Products(one)).loss_sum(batch(True)).detach() for one in ("bf16", name)]
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["fp8", "int8"])
def test_products_that_are_left_in_bf16_are(folders, name):
    model = adapted(folders["qwen2"])
    loss, wanted = trained(model, Products())
    every = frozenset((layer, group) for layer in range(3) for group in range(4))
    found_loss, found = trained(model, Products(name, every))
    assert torch.equal(found_loss, loss)
    wanted, errors = found, []
    for wide in (frozenset(), every - {(1, 2)}, every - {(0, 0)}):
        errors.append(error(trained(model, Products(name, wide))[1], wanted))
    assert 0 < errors[1] < errors[0] and 0 < errors[2] < errors[0]


def linears(model, place):
    engine = FastEngine(model, None, Products("fp8"))
    found = engine._linears(1, True)
    return [found[one.name] for one in engine.layers[1].groups[place]]


@pytest.mark.parametrize("kind", [Kind.FP8, Kind.INT8], ids=str)
@pytest.mark.parametrize("place", range(4))
def test_a_groups_weights_are_side_by_side_in_both_layouts(folders, kind, place):
    group = linears(adapted(folders["qwen2"]), place)
    weight = torch.cat([dequantize_4bit(one.weight, one.quant_state).float() for one in group])
    for turned in (False, True):
        found = narrow_weight(group, kind, turned)
        wanted = weight.t() if turned else weight
        wanted = wanted if kind is Kind.FP8 else transformed(wanted) / 128**0.5
        assert error(found.values.float() * found.scale[:, None], wanted) < (0.04 if kind is Kind.FP8 else 0.012)
        # The largest number of all, or of each row, is the largest that eight bits have.
        most = found.values.float().abs().amax(1)
        assert (most == 127).all() if kind is Kind.INT8 else most.max() == 448


def test_sizes_that_eight_bits_do_not_have_stay_in_bf16():
    for outputs, quantized, wanted in (
        (128, True, NARROW),
        (64, True, ["fp8_backward", "fp8"]),
        (72, True, []),
        (128, False, []),
    ):
        group = [LinearSize(128, 128), LinearSize(128, outputs, quantized=quantized)]
        assert [name for name in NARROW if fitting(NAMED[name], group).narrow] == wanted
