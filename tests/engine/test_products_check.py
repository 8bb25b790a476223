"""A device is asked whether it multiplies in 8 bits; here the CPU stands for it."""

from types import SimpleNamespace

import pytest
import torch

from qwen_lit.engine import products_check
from qwen_lit.engine.products import NAMED, Kind
from qwen_lit.engine.products_check import refusal

CPU = torch.device("cpu")
CARD = SimpleNamespace(type="cuda")


@pytest.fixture
def card(monkeypatch):
    """A card whose numbers are the CPU's; ``seconds`` are those of a product in 8 bits and of one in bf16."""
    monkeypatch.setattr(products_check, "WIDTHS", (128, 384))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    found = SimpleNamespace(seconds=(1.0, 2.0), asked=[])

    class OnCpu(products_check._Pair):
        def __init__(self, kind, tokens, inputs, outputs, device):
            found.asked.append((kind, inputs))
            super().__init__(kind, min(tokens, 67), min(inputs, 512), min(outputs, 256), CPU)

    monkeypatch.setattr(products_check, "_Pair", OnCpu)
    monkeypatch.setattr(
        products_check, "_seconds", lambda function, device: found.seconds[function.__name__ == "wide"]
    )
    return found


def test_a_card_that_is_right_and_faster_is_used(card):
    assert all(refusal(passes, CARD) is None for passes in NAMED.values())
    assert {kind for kind, _ in card.asked} == {Kind.FP8, Kind.INT8}


def test_the_cpu_and_bf16_are_not_asked(card):
    assert refusal(NAMED["fp8"], CPU) is None and refusal(NAMED["bf16"], CARD) is None and not card.asked


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y: y * 1.1, "an error of 0.1"),
        (lambda y: torch.full_like(y, float("nan")), "an error of nan"),
        (lambda y: y[:1], "an error of"),
    ],
)
def test_a_card_that_is_wrong_is_told(card, monkeypatch, wrong, words):
    right = products_check.product
    monkeypatch.setattr(products_check, "product", lambda *given: wrong(right(*given)))
    for kind, name in ((Kind.FP8, "fp8"), (Kind.INT8, "int8")):
        found = refusal(NAMED[name], CARD)
        assert f"Card: a product in {kind.value} of 128 numbers has {words}" in found


def test_an_error_for_wide_rows_alone_is_found(card, monkeypatch):
    right = products_check.product
    monkeypatch.setattr(products_check, "product", lambda x, *more: right(x, *more) * (1 + (x.values.shape[1] > 128)))
    assert "of 384 numbers has an error of 1.0" in refusal(NAMED["int8"], CARD)


def test_what_the_library_says_is_told(card, monkeypatch):
    def missing(*given):
        raise RuntimeError("torch._scaled_mm is not built here\nand more")

    monkeypatch.setattr(products_check, "product", missing)
    assert refusal(NAMED["fp8"], CARD) == "Card: RuntimeError: torch._scaled_mm is not built here"


def test_a_card_that_is_slower_is_told(card):
    card.seconds = (3.0, 2.0)
    assert refusal(NAMED["int8"], CARD) == "Card: a product in int8 takes 1.50 times as long as in bf16"
