"""The products that 8 bits hurt most are found by one forward pass, wherever the layers are."""

import math

import pytest
import torch
from transformers import Qwen2ForCausalLM

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.footprint import layer_sizes
from qwen_lit.engine.policy import Policies
from qwen_lit.engine.probe import damages, expected, work_of, worst
from qwen_lit.engine.products import NAMED, Products
from qwen_lit.model.load import load_base
from tests.engine.test_engine import INPUT, batch
from tests.engine.test_products import adapted
from tests.frozen.stores import snapshot

INT8 = Products("mixed8")


@pytest.fixture(scope="module")
def engine(folders):
    return FastEngine(adapted(folders["qwen2"]), None, INT8)


@pytest.mark.parametrize(
    ("norm", "names", "bad"), [("input", ("q", "k", "v"), (1, 0)), ("post_attention", ("gate", "up"), (1, 2))]
)
def test_a_product_whose_input_has_one_channel_a_thousand_times_as_large_is_the_worst(
    folders, tmp_path, norm, names, bad
):
    made = Qwen2ForCausalLM.from_pretrained(folders["qwen2"])
    layer = made.model.layers[1]
    getattr(layer, f"{norm}_layernorm").weight.data[5] *= 1000
    for name, module in layer.named_modules():
        if name.endswith(tuple(f"{one}_proj" for one in names)):
            # The channel takes the range of 8 bits, and nothing comes of it in bf16.
            module.weight.data[:, 5] = 0
    made.save_pretrained(tmp_path / "planted")
    planted = FastEngine(adapted(str(tmp_path / "planted"), ["o_proj"]), None, INT8)
    found = damages(planted, batch(True), INT8)
    others = [damage for one, damage in found.items() if one != bad]
    assert len(found) == 12 and found[bad] > 5 * max(others) > 0
    assert worst(found, work_of(layer_sizes(planted.model)), 0.3)[0] == bad


def test_streamed_and_recomputed_layers_and_pieces_of_the_mlp_are_looked_at_alike_and_nothing_is_left_behind(
    folders, monkeypatch
):
    torch.manual_seed(1)
    engine = FastEngine(adapted(folders["qwen2"]), None, INT8)
    wanted, state = damages(engine, batch(True), INT8), torch.get_rng_state()

    def away(*given):
        base = load_base(*given)
        snapshot(base).place(range(3), 2)
        return base

    monkeypatch.setattr("tests.engine.test_products.load_base", away)
    torch.manual_seed(1)
    streamed = FastEngine(adapted(folders["qwen2"]), Policies((INPUT,) * 3, mlp_piece=16), Products())
    assert streamed.store is not None
    torch.set_rng_state(state)
    found = damages(streamed, batch(True), INT8)
    assert torch.equal(torch.get_rng_state(), state) and not streamed.arena.workspace.buffers
    assert found == pytest.approx(wanted, rel=0.1) and all(0 < one < 0.1 for one in found.values())
    # What follows is a pass like any other.
    torch.manual_seed(5)
    loss = streamed.loss_sum(batch(True))
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("name", NAMED)
def test_kinds_are_those_of_forward(engine, name):
    found = damages(engine, batch(True), Products(name, frozenset({(0, 0)})))
    assert len(found) == (11 if NAMED[name].forward.narrow else 0) and (0, 0) not in found


def test_a_result_that_is_not_finite_is_the_worst(engine, monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.probe._share", lambda stream, change: change.sum() * math.nan)
    assert set(damages(engine, batch(True), INT8).values()) == {math.inf}


def test_the_most_damage_for_its_cost_is_left_first_within_the_share():
    work = {(0, 0): 1, (0, 3): 4, (1, 0): 1, (1, 3): 4}
    damage = {(0, 0): 1.0, (0, 3): 3.0, (1, 0): 0.5, (1, 3): 1.0}
    assert worst(damage, work, 1.0) == ((0, 3), (0, 0), (1, 0), (1, 3))
    # What does not fit is passed over.
    assert worst(damage, work, 0.25) == ((0, 0), (1, 0)) and worst(damage, work, 0.5) == ((0, 3), (0, 0))
    assert worst({**damage, (1, 3): math.inf}, work, 0.4) == ((1, 3),) and worst({}, work, 1.0) == ()
    assert expected(work, 0.5) == ((0, 0), (0, 3)) and not expected(work, 0.0)
