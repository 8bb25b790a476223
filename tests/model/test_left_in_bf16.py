"""mixed8 leaves its worst products in bf16: found once, the same on all ranks, and kept by the run."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.checkpoints import trained_at
from qwen_lit.cli import main
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.footprint import layer_sizes
from qwen_lit.engine.products import NAMED, Products
from qwen_lit.model.probe import TOKENS, estimated, probed
from qwen_lit.model.products import ProductsInUse, places
from qwen_lit.planner.choice import Probe
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.speed import pace_of
from tests.engine.test_engine import batch, four_bit
from tests.runs import begun, same, stopping

FP8 = ["--model.engine", "fast", "--model.products", "fp8", "--data.num_workers", "0", "--data.val_size", "0"]
QUICK = [*FP8, "--model.products_check_every", "0", "--trainer.max_steps", "3"]


@pytest.fixture
def leaving(monkeypatch):
    """fp8, which the tiny model has the widths for, leaves some too."""
    monkeypatch.setattr("qwen_lit.model.products.LEFT", {"fp8": 0.4})


def test_a_run_finds_them_once_tells_them_and_goes_on_with_them(command, tmp_path, leaving, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(command(whole, *QUICK)) == 0
    said = [line.getMessage() for line in caplog.records if " leaves " in line.getMessage()]
    assert len(said) == 1 and said[0].startswith("products   fp8 leaves ")
    main(command(out, *QUICK, *stopping(2)))
    checkpoint = next((out / "checkpoints").glob("step=*2.ckpt"))
    kept = torch.load(checkpoint, weights_only=True)["settings"]["products"]
    assert 0 < len(kept["wide"]) < kept["among"] == 8
    monkeypatch.setattr("qwen_lit.model.probe.damages", lambda *_: pytest.fail("they were looked for again"))
    assert main(command(out, *QUICK, "--ckpt_path", "last")) == 0
    assert same(whole, out)
    told = f"fp8, but for {len(kept['wide'])} of 8 products in bf16 ({places(kept['wide'])})"
    assert begun(out)["products"] == trained_at(checkpoint)["products"] == told
    assert told in (out / "lora_adapter" / "README.md").read_text()


def test_all_ranks_take_what_the_first_of_them_finds(model_folder, leaving, monkeypatch):
    engine, began = FastEngine(four_bit(model_folder)), ProductsInUse.of("fp8", None)
    first = replace(began, wide=((1, 2),), among=8)
    monkeypatch.setattr("qwen_lit.planner.choice.gathered", lambda trainer, mine: [first, mine])
    rows = SimpleNamespace(heaviest=lambda count: batch(True))
    probe = Probe(began, SimpleNamespace(is_global_zero=False), rows)
    assert probed(began, engine, batch(True), lambda mine: mine).wide != first.wide
    assert probe(engine) == Products("fp8", frozenset({(1, 2)})) and probe.products == first


@pytest.mark.parametrize("name", [name for name in NAMED if name != "mixed8"])
def test_other_choices_leave_none_and_look_for_none(name):
    began = ProductsInUse.of(name, None)
    assert probed(began, None, None, None) is began and began.products == Products(name)
    assert not ProductsInUse.of("mixed8", None).left("too far off", 3).share_left


def test_rows_are_looked_at_up_to_a_bound(model_folder, leaving, monkeypatch):
    seen = []
    monkeypatch.setattr("qwen_lit.model.probe.damages", lambda engine, one, products: seen.append(one) or {})
    probed(ProductsInUse.of("fp8", None), FastEngine(four_bit(model_folder)), batch(True, (9000,)), lambda mine: mine)
    assert seen[0]["tokens"] == TOKENS == 2048


def test_before_a_probe_memory_and_time_are_estimated_with_as_large_a_share(model_folder, leaving):
    model = four_bit(model_folder)
    began = ProductsInUse.of("fp8", None)
    guess, all_narrow = estimated(began, layer_sizes(model)), Products("fp8")
    assert guess.wide and min(guess.wide) == (0, 0)
    memory, narrow = (ModelMemory.of(model, 0, products=one) for one in (guess, all_narrow))
    assert memory.constants["buffer for a dequantised weight"] and "buffer for a dequantised weight" not in (
        narrow.constants
    )
    assert pace_of(narrow) < pace_of(memory) < 1
    found = replace(began, wide=((1, 3),), among=8)
    assert estimated(found, layer_sizes(model)).wide == {(1, 3)}


def test_products_are_told_by_their_layers():
    whole = [(layer, group) for layer in (0, 1, 2) for group in range(4)]
    assert places([*whole, (5, 3), (4, 0)]) == "layers 0 to 2; q|k|v of layer 4; down of layer 5"
    assert places([(1, 0), (1, 3), (2, 3), (2, 0), (4, 1)]) == "q|k|v, down of layers 1 to 2; o of layer 4"
    kept = ProductsInUse("mixed8", "mixed8", wide=((4, 1),), among=12)
    assert ProductsInUse.of("mixed8", kept.plain()) == kept
    assert str(replace(kept, checked=(3, 0.99, 0.1))).startswith(
        "mixed8, but for 1 of 12 products in bf16 (o of layer 4); at step 3 the gradient had cosine 0.9900"
    )
