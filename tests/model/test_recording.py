"""Micro-batches as graphs, where a recording that replays by running again stands for CUDA's: what goes in and comes
out, and when what is recorded."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.products import Products
from qwen_lit.kernels.dropout import Seed
from qwen_lit.model import graphs
from qwen_lit.model.graphs import SEEN, Graphs
from qwen_lit.model.module import QwenModule
from tests.engine.test_engine import ALL, adapted
from tests.engine.test_shapes import batch
from tests.frozen.test_ranks import child
from tests.runs import ended

SHARE = torch.tensor(1 / 64)
LENGTHS = [(70, 33, 1, 90), (251,), (3, 100, 99), (60, 1, 60, 30), (80, 80, 80)]


class Recorder:
    """Replays by running again; writes down what was recorded."""

    def __init__(self):
        self.runs, self.taken = [], 0

    def record(self, run):
        self.runs.append(run)
        self.taken += 10
        losses = torch.zeros(())

        def replay():
            # As a graph's, the loss is overwritten by the next replay.
            return losses.copy_(run())

        return replay


class Fails(Recorder):
    def record(self, run):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")


def made(model, recorder=Recorder, room=100, need=lambda tokens: 10, limit=512):
    return Graphs(FastEngine(model), limit, room, need, recorder)


def unrecorded(model, batches, draws):
    """Losses and gradients of the same micro-batches as they come, by their own size."""
    engine, losses = FastEngine(model), []
    model.zero_grad()
    for one, seed in zip(batches, draws, strict=True):
        loss = engine.loss_sum(one, Seed(torch.tensor([seed])))
        (loss * SHARE).backward()
        losses.append(loss.detach())
    return losses, [p.grad for p in engine.trained]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_accumulated_gradients_and_losses_are_those_of_every_micro_batch_by_itself(dropout):
    model = adapted("qwen2", lora_dropout=dropout, target_modules=ALL)
    batches = [batch(lengths, number) for number, lengths in enumerate(LENGTHS)]
    torch.manual_seed(7)
    draws = [FastEngine.draw() for _ in batches]
    wanted = unrecorded(model, batches, draws)
    mine = made(model)
    model.zero_grad()
    torch.manual_seed(7)
    losses = [mine.add_gradients(one, SHARE) for one in batches]
    assert len(mine.recording.runs) == 1
    found = [one.grad for one in mine.engine.trained]
    for left, right in zip([*wanted[0], *wanted[1]], [*losses, *found], strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-5 * float(left.abs().max()))


def test_when_a_shape_is_recorded_changes_no_bit(monkeypatch):
    model, one, results = adapted("qwen2", lora_dropout=0.3), batch((70, 33)), []
    for seen in (0, 2, 10):
        monkeypatch.setattr(graphs, "SEEN", seen)
        mine = made(model)
        model.zero_grad()
        torch.manual_seed(3)
        losses = [mine.add_gradients(one, SHARE) for _ in range(4)]
        assert len(mine.recording.runs) == (seen < 4)
        results.append([*losses, *(p.grad.clone() for p in mine.engine.trained)])
    assert all(torch.equal(*pair) for found in results[1:] for pair in zip(found, results[0], strict=True))


def test_replays_draw_other_dropout_and_the_same_from_the_same_state():
    mine, one = made(adapted("qwen2", lora_dropout=0.3)), batch((70, 33))
    for _ in range(SEEN + 1):
        mine.add_gradients(one, SHARE)
    state = torch.get_rng_state()
    first, second = (float(mine.add_gradients(one, SHARE)) for _ in range(2))
    torch.set_rng_state(state)
    assert first != second and [float(mine.add_gradients(one, SHARE)) for _ in range(2)] == [first, second]


def test_gradients_join_those_that_are_there_and_start_anew_after_a_step():
    model = adapted("qwen2")
    mine, one = made(model), batch((70, 33))
    (FastEngine(model).loss_sum(one) * SHARE).backward()
    alone = [p.grad.clone() for p in mine.engine.trained]
    mine.add_gradients(one, SHARE)
    (FastEngine(model).loss_sum(one) * SHARE).backward()
    for p, first in zip(mine.engine.trained, alone, strict=True):
        assert torch.allclose(p.grad, 3 * first, rtol=1e-4, atol=1e-5 * float(first.abs().max()))
        p.grad = None
    mine.add_gradients(one, SHARE)
    for p, first in zip(mine.engine.trained, alone, strict=True):
        assert torch.allclose(p.grad, first, rtol=1e-4, atol=1e-5 * float(first.abs().max()))


def test_a_step_of_the_optimizer_shows_in_the_next_replay():
    model = adapted("qwen2")
    mine, one = made(model), batch((70, 33))
    optimizer = torch.optim.SGD(mine.engine.trained, 0.5)
    losses = []
    for _ in range(SEEN + 4):
        losses.append(float(mine.add_gradients(one, SHARE)))
        optimizer.step()
        optimizer.zero_grad()
    assert len(mine.recording.runs) == 1 and losses == sorted(losses, reverse=True) and losses[-1] < losses[SEEN]


def test_what_is_larger_than_the_limit_is_left_to_the_engine():
    mine = made(adapted("qwen2"), limit=512)
    assert mine.take(batch((500, 12))) and not mine.take(batch((500, 13)))
    assert [mine.computed(tokens) for tokens in (1, 256, 257, 513)] == [256, 256, 512, 513]


def test_what_cannot_be_recorded_goes_on_with_one_line(caplog):
    mine, ones = made(adapted("qwen2"), Fails), [batch((70, 33)), batch((300, 33))]
    losses = [float(mine.add_gradients(one, SHARE)) for _ in range(SEEN + 3) for one in ones]
    assert len(set(losses)) == 2
    assert [one.message for one in caplog.records] == [
        "no more CUDA graphs are recorded (RuntimeError: operation not permitted when stream is capturing); training "
        "goes on"
    ]


def test_no_more_is_recorded_than_there_is_room_for(monkeypatch):
    small, large = batch((70, 33)), batch((300, 33))

    def recorded(first, second, **options):
        mine = made(adapted("qwen2"), **options)
        for one in [first, second] * (SEEN + 1):
            mine.add_gradients(one, SHARE)
        return [one.inputs.shape.tokens for one in mine.known.values() if one.replay is not None]

    by_tokens = {"need": lambda tokens: tokens}
    assert recorded(small, large, room=600, **by_tokens) == [256, 512]
    # A smaller one uses the memory of a larger one, which finds no room beside the smaller.
    assert recorded(large, small, room=512, **by_tokens) == [512, 256]
    assert recorded(small, large, room=265, **by_tokens) == [256]
    assert recorded(small, large, room=100, **by_tokens) == []
    monkeypatch.setattr(graphs, "MOST", 1)
    assert recorded(small, large) == [256]


def test_a_workspace_that_recordings_use_is_not_taken_once_more_after_a_validation():
    mine, one = made(adapted("qwen2")), batch((70, 33))
    workspace, size = mine.engine.arena.workspace, ((4,), torch.float32, torch.device("cpu"))
    before = workspace.get(*size)
    for _ in range(SEEN + 1):
        mine.add_gradients(one, SHARE)
    workspace.get((4,), torch.int8, torch.device("cpu"))
    workspace.clear()
    assert [one.dtype for one in workspace.buffers.values()] == [torch.float32]
    assert workspace.get(*size).data_ptr() == before.data_ptr()
    mine.release()
    workspace.clear()
    assert not workspace.buffers


def test_a_weight_that_has_moved_or_other_products_record_anew():
    mine, one = made(adapted("qwen2")), batch((70, 33))
    for _ in range(SEEN + 1):
        mine.add_gradients(one, SHARE)
    first = mine.recording
    mine.add_gradients(one, SHARE)
    assert mine.recording is first and len(first.runs) == 1
    moved = mine.engine.trained[0]
    moved.data = moved.data.clone()
    mine.add_gradients(one, SHARE)
    second = mine.recording
    assert second is not first and not second.runs
    mine.engine.products = Products("int8")
    mine.add_gradients(one, SHARE)
    assert mine.recording is not second
    mine.release()
    assert not mine.known


OF_RANKS = [[(70, 33), (300, 33)], [(20,), (251, 300), (1, 90)]]
"""Rows of each rank's passes, of which those of more than 256 tokens are not graphs."""


def rank(number, folder):
    """One of two ranks: its gradients of a step are left in ``folder``."""
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=number, world_size=2)
    model = adapted("qwen2")
    strategy = SimpleNamespace(block_backward_sync=DistributedDataParallel(model).no_sync)
    mine, engine = made(model, limit=256), FastEngine(model)
    module = SimpleNamespace(graphs=mine, trainer=SimpleNamespace(world_size=2, strategy=strategy))
    module.device, module.loss_sum, module.manual_backward = (
        torch.device("cpu"),
        engine.loss_sum,
        torch.Tensor.backward,
    )
    module._add_by_autograd = lambda *given: QwenModule._add_by_autograd(module, *given)
    passes = OF_RANKS[number]
    for place, lengths in enumerate(passes):
        QwenModule._add_gradients(module, batch(lengths), lambda: 2 * SHARE, place + 1 == len(passes))
    torch.save([p.grad for p in mine.engine.trained], folder / f"{number}.pt")
    dist.barrier()


def test_ranks_have_the_sum_of_all_their_gradients_after_the_last_pass(tmp_path):
    model = adapted("qwen2")
    engine = FastEngine(model)
    for lengths in sum(OF_RANKS, []):
        (engine.loss_sum(batch(lengths)) * SHARE).backward()
    assert [ended(pid) for pid in [child(rank, number, tmp_path) for number in range(2)]] == [0, 0]
    found = [torch.load(tmp_path / f"{number}.pt") for number in range(2)]
    for p, one, other in zip(engine.trained, *found, strict=True):
        assert torch.equal(one, other)
        assert torch.allclose(one, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))
