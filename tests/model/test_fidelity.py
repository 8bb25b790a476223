"""Cosine and error of a gradient with products in 8 bits are those of two plain passes, and leave nothing behind."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.data.batches import collate
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.engine.products import Products
from qwen_lit.model.fidelity import LEAST, Fidelity, compare, compared, measure, worst
from qwen_lit.model.load import load_base
from tests.engine.test_engine import ALL, AWAY, CPU, INPUT, KEEP, batch, four_bit, gradients
from tests.frozen.stores import snapshot

PLAIN = SimpleNamespace(forward_context=nullcontext)
AUTOCAST = SimpleNamespace(forward_context=lambda: torch.autocast("cpu", torch.bfloat16))


def as_module(engine):
    return SimpleNamespace(fast=engine, device=CPU, loss_sum=engine.loss_sum)


@pytest.mark.parametrize(
    ("policies", "precision"),
    [
        (Policies((KEEP, KEEP)), PLAIN),
        (Policies((INPUT, INPUT), mlp_piece=16), AUTOCAST),
        (Policies((AWAY, KEEP)), AUTOCAST),
    ],
    ids=["kept", "recomputed in pieces", "on the host"],
)
def test_a_measure_is_that_of_two_backward_passes_and_leaves_nothing_behind(model_folder, policies, precision):
    model, one = four_bit(model_folder, lora_dropout=0.2, target_modules=ALL), batch(True)
    engine = FastEngine(model, policies, Products("fp8"))
    passes = []
    for products in (Products(), Products("fp8")):
        torch.manual_seed(5)
        found = gradients(model, FastEngine(model, policies, products).loss_sum(one))
        passes.append(torch.cat([one.flatten() for one in found.values()]).double())
    wide, narrow = passes
    model.zero_grad()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = measure(as_module(engine), precision, one)
    assert torch.equal(torch.get_rng_state(), before)
    assert engine.products == Products("fp8") and not engine.arena.workspace.buffers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert found.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(wide, narrow, 0)), abs=1e-4)
    assert found.error == pytest.approx(float((wide - narrow).norm() / wide.norm()), rel=1e-2)
    assert 0.9 < found.cosine < 0.99999


def test_layers_that_are_streamed_are_measured_like_those_that_are_there(model_folder, monkeypatch):
    torch.manual_seed(1)
    plain = four_bit(model_folder)
    wanted = measure(as_module(FastEngine(plain, None, Products("fp8"))), PLAIN, batch(True))

    def away(*given):
        base = load_base(*given)
        snapshot(base).place(range(2), 2)
        return base

    monkeypatch.setattr("tests.engine.test_engine.load_base", away)
    torch.manual_seed(1)
    engine = FastEngine(four_bit(model_folder), None, Products("fp8"))
    assert engine.store is not None
    assert measure(as_module(engine), PLAIN, batch(True)) == wanted


def test_a_gradient_by_a_of_zero_is_no_nan(model_folder):
    model = four_bit(model_folder)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    found = measure(as_module(FastEngine(model, None, Products("fp8"))), PLAIN, batch(True))
    assert 0.9 < found.cosine <= 1 and 0 < found.error < 0.5


@pytest.mark.parametrize(
    ("wide", "narrow", "wanted"),
    [
        ([3.0, 4.0], [3.0, 4.0], Fidelity(1.0, 0.0)),
        ([3.0, 4.0], [-4.0, 3.0], Fidelity(0.0, math.sqrt(2))),
        ([3.0, 4.0], [0.0, 0.0], Fidelity(0.0, 1.0)),
        ([0.0, 0.0], [0.0, 0.0], Fidelity(1.0, 0.0)),
        ([0.0, 0.0], [0.0, 1.0], Fidelity(0.0, math.inf)),
        ([1e30, 0.0], [1e30, 0.0], Fidelity(1.0, 0.0)),
        ([math.nan, 0.0], [0.0, 1.0], None),
    ],
)
def test_cosine_and_error_of_any_gradient(wide, narrow, wanted):
    found = compare(*([torch.tensor(one[:1]), torch.tensor(one[1:])] for one in (wide, narrow)))
    assert found == wanted and (found is None or found.below(0.5) == (found.cosine < 0.5))


def test_a_gradient_in_8_bits_that_is_not_finite_is_below_every_floor_and_the_worst_of_all_ranks():
    lost = compare([torch.ones(2)], [torch.tensor([1.0, math.inf])])
    assert math.isnan(lost.cosine) and lost.below(0)
    assert worst([Fidelity(0.9, 0.1), lost, Fidelity(0.8, 0.3)]).below(0)
    assert worst([Fidelity(0.9, 0.4), Fidelity(0.8, 0.3)]) == Fidelity(0.8, 0.4)


def test_the_first_micro_batch_that_trains_something_is_compared():
    empty, full = batch(True, (5,)), batch(True, (7, 3))
    empty["targets"] = empty["targets"][:0]
    assert compared([empty, full, batch(True)]) is full and compared([empty]) is None


def test_a_check_takes_half_a_per_cent_of_the_time_between_two():
    step = [batch(True, (1000, 1048), seed) for seed in range(4)]
    assert compared(step) is step[0] and compared(step, 200) is step[0]
    # Of one micro-batch a step, 0.4 of its tokens; of more checks no less than a few.
    assert compared(step[:1], 200)["tokens"] == 819 and compared(step[:1], 1)["tokens"] == LEAST
    # What trains nothing at its beginning is taken as a whole.
    late = collate([(range(2048), [(2000, 2048)])], 0)
    assert compared([late], 200) is late
