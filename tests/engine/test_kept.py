"""Gate and up that are kept in 8 bits: the loss to the bit, gradients within a percent, training that learns."""

import pytest
import torch

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from tests.engine.test_engine import AGAIN, ALL, AWAY, KEEP, QKVO, adapted, batch, gradients


def found(model, one, policies, **more):
    """The loss and the gradients of a batch, with dropout masks that do not differ."""
    torch.manual_seed(3)
    loss = FastEngine(model, Policies(policies, **more)).loss_sum(one)
    return loss.detach(), gradients(model, loss)


def off(these, those):
    """The largest relative error of a gradient."""
    return max(float((these[name] - one).norm() / one.norm()) for name, one in those.items())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_loss_is_the_same_to_the_bit_and_gradients_are_within_a_percent(family, targets, dropout, monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 0)
    model, one = adapted(family, target_modules=targets, lora_dropout=dropout), batch(True)
    loss, wanted = found(model, one, (KEEP,) * 3)
    kept = [
        found(model, one, way, kept="int8") for way in ((KEEP,) * 3, (AWAY,) * 3, (KEEP, AGAIN, KEEP), (AGAIN,) * 3)
    ]
    assert all(torch.equal(one, loss) for one, _ in kept)
    errors = [off(grads, wanted) for _, grads in kept]
    assert 1e-4 < errors[0] < 0.01 and errors[1] == errors[0]
    # A recomputed layer goes backward at once, from what it has just computed.
    assert 1e-4 < errors[2] < 0.01 and errors[3] < 1e-5


def test_an_mlp_in_pieces_keeps_nothing_in_8_bits():
    model, one = adapted("qwen2", target_modules=ALL), batch(True)
    plain, narrow = (found(model, one, (KEEP,) * 3, mlp_piece=10, kept=kept)[1] for kept in ("bf16", "int8"))
    assert all(torch.equal(narrow[name], grad) for name, grad in plain.items())


def test_training_with_it_follows_that_without():
    batches, curves = [batch(True, (40, 60, 30), seed) for seed in range(2)], {}
    for kept in ("bf16", "int8"):
        model = adapted("qwen2", target_modules=ALL)
        engine = FastEngine(model, Policies.of_counts(3, kept=kept))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses = curves[kept] = []
        for step in range(20):
            one = batches[step % 2]
            loss = engine.loss_sum(one) / len(one["targets"])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    narrow, wide = curves["int8"], curves["bf16"]
    assert narrow[0] == wide[0] and narrow[-1] < narrow[0] - 0.2
    assert max(abs(one - other) for one, other in zip(narrow, wide, strict=True)) < 0.02
