"""Micro-batches that are filled up to a shape: few shapes, and nothing that is computed changes."""

import numpy as np
import pytest
import torch

from qwen_lit.data.batches import collate
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.shapes import Inputs, most_tokens, shape_of, tokens_of
from qwen_lit.kernels.dropout import Seed, dropped
from qwen_lit.kernels.loss import IGNORED, head_loss, head_loss_reference
from tests.engine.test_engine import ALL, CPU, adapted


def batch(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return collate([(draw.integers(0, 301, n), np.array([[n // 2, n]])) for n in lengths], 0)


def test_few_shapes_hold_every_number_of_tokens_with_little_to_fill_up():
    shapes = {tokens_of(tokens) for tokens in range(1, 8193)}
    assert len(shapes) == 16 and {256, 1280, 2048, 2560, 8192} <= shapes
    for tokens in (1, 256, 257, 1168, 2048, 2049, 5000, 8192):
        assert tokens <= tokens_of(tokens) <= max(tokens + 255, tokens * 5 // 4)
        assert tokens_of(tokens_of(tokens)) == tokens_of(tokens)
    assert [most_tokens(tokens) for tokens in (0, 255, 256, 1500, 3670, 4096)] == [0, 0, 256, 1280, 3584, 4096]


def test_documents_that_are_filled_up_are_never_taken_for_equally_long():
    for count in range(1, 70):
        for length in (1, 13, 146, 500, 1024, 1025):
            one = batch([length] * (count - 1) + [length + 1])
            shape = shape_of(one)
            assert shape.exact or shape.documents * shape.longest != shape.tokens
            assert shape.exact or shape.documents > count
            assert shape.longest >= max(one["max_seqlen"], shape.tokens - one["input_ids"].numel())
            assert shape.targets >= one["targets"].numel()


def test_equal_documents_of_a_shape_s_own_size_stay_as_they_are():
    one = batch([256] * 2)
    shape = shape_of(one)
    assert shape.exact and (shape.documents, shape.longest) == (2, 256)
    inputs = Inputs(shape, CPU)
    inputs.fill(one, 5, torch.tensor(1.0))
    for name in ("input_ids", "position_ids", "cu_seqlens"):
        assert torch.equal(inputs.batch[name], one[name])


def test_every_token_that_fills_up_is_in_a_document_of_its_own():
    inputs = Inputs(shape_of(batch((70, 33, 90))), CPU)
    for lengths, borders in (((70, 33, 90), [0, 70, 103, 193]), ((100, 50), [0, 100, 150]), ((256,), [0, 256])):
        inputs.fill(batch(lengths), 1, torch.tensor(1.0))
        assert inputs.batch["cu_seqlens"].tolist() == borders + [256] * (10 - len(borders))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_what_fills_a_micro_batch_up_changes_no_loss_and_no_gradient(dropout):
    model = adapted("qwen3", lora_dropout=dropout, target_modules=ALL)
    engine = FastEngine(model)
    inputs = None
    # The second and the third leave nothing in what the last is written to.
    for number, lengths in enumerate([(70, 33, 1, 90), (251,), (3, 100, 99), (60, 1, 60, 30)]):
        one = batch(lengths, number)
        inputs = inputs or Inputs(shape_of(one), CPU)
        assert shape_of(one) == inputs.shape
        found = []
        for filled in (False, True):
            inputs.fill(one, 11 + number, torch.tensor(1.0))
            loss = engine.loss_sum(inputs.batch if filled else one, Seed(inputs.seed))
            model.zero_grad()
            loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in engine.trained)])
        for left, right in zip(*found, strict=True):
            # Attention's sums alone are of other lengths.
            assert torch.allclose(left, right, rtol=1e-4, atol=1e-5 * float(left.abs().max()))


def test_a_micro_batch_without_supervised_tokens_is_filled_up_too():
    model = adapted("qwen2")
    engine, one = FastEngine(model), batch((9, 5))
    one["target_index"], one["targets"] = one["target_index"][:0], one["targets"][:0]
    inputs = Inputs(shape_of(one), CPU)
    inputs.fill(one, 1, torch.tensor(1.0))
    loss = engine.loss_sum(inputs.batch)
    loss.backward()
    assert float(loss.detach()) == 0 and all(not p.grad.any() for p in engine.trained)


def test_a_target_that_is_ignored_has_neither_loss_nor_gradient():
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8)
    targets = torch.tensor([3, IGNORED, 19, 0, IGNORED, 7])
    loss = head_loss(hidden, head, targets, 4)
    (grad,) = torch.autograd.grad(loss, hidden)
    (wanted,) = torch.autograd.grad(head_loss_reference(hidden, head, targets), hidden)
    assert torch.allclose(loss, head_loss_reference(hidden, head, targets))
    assert torch.allclose(grad, wanted, atol=1e-6) and not grad[1].any() and wanted[0].any()


def test_a_seed_on_the_device_draws_what_the_number_does():
    x, on_device = torch.ones(50, 70), torch.tensor([40])
    assert torch.equal(dropped(x, 0.2, Seed(on_device) + 3), dropped(x, 0.2, 43))
    on_device.fill_(41)
    assert torch.equal(dropped(x, 0.2, Seed(on_device) + 3), dropped(x, 0.2, 44))
