"""Micro-batches as CUDA graphs: what they compute, and what becomes of one that cannot be recorded."""

from functools import partial

import pytest
import torch

from qwen_lit.cli import main
from qwen_lit.engine import engine as engine_file
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.kernels import attention
from qwen_lit.model import graphs
from qwen_lit.model.graphs import SEEN, Graphs
from qwen_lit.planner.graphs import graph_bytes
from qwen_lit.planner.memory import ModelMemory
from tests.gpu.test_engine import ALL, DEVICE, QKVO, batch, loaded, repeatable, saved  # noqa: F401
from tests.gpu.test_fit import on_the_gpu  # noqa: F401

pytestmark = pytest.mark.gpu

LENGTHS = [(146, 90, 200, 61, 180, 120, 99, 150), (700, 324), (1, 333, 600), (1000,), (80,) * 7]
EQUAL = (256,) * 4
"""Documents for which attention adds in one order, so that equal numbers have equal bits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


def made(model, launched=False, limit=2048, room=2**36):
    need = partial(graph_bytes, ModelMemory.of(model, 0), policies=Policies.of_counts(6))
    mine = Graphs(FastEngine(model), limit, room, need)
    mine.refused = launched
    return mine


def share():
    return torch.tensor(1 / 1000, device=DEVICE)


def trained(model, batches, add):
    """Losses and accumulated gradients of micro-batches."""
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        losses = [float(add(one)) for one in batches]
    return losses, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(found, wanted, most):
    assert found[0] == pytest.approx(wanted[0], rel=2e-3)
    for name, one in wanted[1].items():
        assert float((found[1][name] - one).norm() / one.norm()) < most, name


def replayed(mine):
    return [one.inputs.shape.tokens for one in mine.known.values() if one.replay is not None]


@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_micro_batches_of_many_lengths_have_the_losses_and_gradients_of_kernels_launched_one_by_one(
    folder, targets, dropout
):
    model = loaded(folder, targets, dropout)
    batches = [batch(lengths, number) for _ in range(SEEN + 2) for number, lengths in enumerate(LENGTHS)]
    mine, launched, engine = made(model), made(model, launched=True), FastEngine(model)

    def plain(one):
        loss = engine.loss_sum(one)
        (loss * share()).backward()
        return loss.detach()

    found = trained(model, batches, lambda one: mine.add_gradients(one, share()))
    assert not mine.refused and len(replayed(mine)) > 1
    # The backward of torch's varlen attention adds in no fixed order, and layers below multiply what differs.
    close(found, trained(model, batches, lambda one: launched.add_gradients(one, share())), 2e-2)
    close(found, trained(model, batches, plain), 2e-2)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_when_a_shape_is_recorded_changes_no_bit(folder, dropout, monkeypatch, repeatable):  # noqa: F811
    monkeypatch.setattr(attention, "FLASH", ())
    attention.flash.cache_clear()
    model, batches, results = loaded(folder, QKVO, dropout), [batch(EQUAL, number) for number in range(6)], []
    for seen in (10, 2, 4):
        monkeypatch.setattr(graphs, "SEEN", seen)
        mine = made(model)
        results.append(trained(model, batches, lambda one, mine=mine: mine.add_gradients(one, share())))
        assert len(replayed(mine)) == (seen < 6)
    attention.flash.cache_clear()
    for losses, found in results[1:]:
        assert losses == results[0][0]
        assert all(torch.equal(one, results[0][1][name]) for name, one in found.items())


def test_replays_draw_other_dropout_and_the_same_from_the_same_state(folder):
    mine, one = made(loaded(folder, QKVO, 0.1)), batch(EQUAL)
    for _ in range(SEEN + 1):
        mine.add_gradients(one, share())
    state = torch.get_rng_state()
    first, second = (float(mine.add_gradients(one, share())) for _ in range(2))
    torch.set_rng_state(state)
    assert replayed(mine) and first != second
    assert [float(mine.add_gradients(one, share())) for _ in range(2)] == [first, second]


def test_steps_of_an_optimizer_with_larger_micro_batches_between_learn_what_launched_ones_do(folder):
    losses = []
    for launched in (True, False):
        model = loaded(folder, QKVO)
        mine, engine = made(model, launched, limit=1024), FastEngine(model)
        optimizer = torch.optim.AdamW(engine.trained, 1e-3)
        torch.manual_seed(5)
        mine_losses = []
        for _ in range(8):
            for one in (batch(EQUAL, 1), batch((1500,), 2), batch((300, 200), 3)):
                mine.attach()
                if mine.take(one):
                    mine_losses.append(float(mine.add_gradients(one, share())))
                else:
                    (engine.loss_sum(one) * share()).backward()
            torch.nn.utils.clip_grad_norm_(engine.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert len(replayed(mine)) == (0 if launched else 2)
        losses.append(mine_losses)
    assert losses[1] == pytest.approx(losses[0], rel=5e-3) and losses[0][-2] < losses[0][0]


def test_what_waits_for_the_device_is_launched_instead_and_the_device_goes_on(folder, monkeypatch, caplog):
    plain = engine_file.head_loss

    def waits(*given):
        loss = plain(*given)
        assert float(loss.detach()) >= 0
        return loss

    monkeypatch.setattr(engine_file, "head_loss", waits)
    mine, one = made(loaded(folder, QKVO)), batch(EQUAL)
    losses = [float(mine.add_gradients(one, share())) for _ in range(SEEN + 3)]
    assert mine.refused and not replayed(mine) and max(losses) == pytest.approx(min(losses), rel=1e-3)
    assert caplog.text.count("no more CUDA graphs are recorded") == 1
    # Memory is given out and taken back as ever.
    before, drawn = torch.cuda.memory_allocated(), torch.rand(2**22, device=DEVICE)
    assert 0.4 < float(drawn.mean()) < 0.6
    del drawn
    assert torch.cuda.memory_allocated() == before


def test_graphs_take_no_more_than_was_planned(folder):
    model = loaded(folder, ALL, 0.1)
    memory, policies = ModelMemory.of(model, 0), Policies.of_counts(6)
    mine, room = made(model), graph_bytes(memory, 2048, policies)
    for lengths in ((2000,), (1000, 1), (300,), (500, 400), (1500, 100)):
        for _ in range(SEEN + 1):
            mine.add_gradients(batch(lengths), share())
    # 1,001 and 900 tokens have one shape.
    assert len(replayed(mine)) == 4 and 0 < mine.recording.taken <= room, (mine.recording.taken, room)
    mine.release()
    torch.cuda.empty_cache()
    assert not replayed(mine)


def test_fit_of_short_rows_trains_by_graphs(on_the_gpu, monkeypatch, caplog):  # noqa: F811
    caplog.set_level("INFO")
    recorded, plain = [], Graphs._record
    monkeypatch.setattr(Graphs, "_record", lambda self, one: (plain(self, one), recorded.append(one.replay))[0])
    short = ["--data.packing", "false", "--data.batch_size", "1", "--trainer.max_steps", "12"]
    assert main([*on_the_gpu, *short]) == 0
    told = " ".join(" ".join(record.message for record in caplog.records).split())
    assert "tokens as CUDA graphs" in told and recorded and all(recorded)
