"""Saved tensors wait on the host and come back as they were, a layer ahead, and no more of them than needed."""

import weakref

import pytest
import torch
from torch import nn

from qwen_lit.engine.offload import HostBlocks, HostStore

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 0)


def layers(count=5):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(8, 8) * 0.3) for _ in range(count)]


def run(weights, x, store=None, seen=None):
    kept = []
    for weight in weights:
        if store is None:
            x = (x @ weight).tanh() * x
            continue
        with store.layer(last=weight is weights[-1]):
            x = (x @ weight).tanh() * x
        kept.append(store.last)
        if seen is not None:
            x.register_hook(lambda _: seen.append(sum(one.here for one in kept)))
    return x, kept


def test_gradients_are_those_of_tensors_that_stay():
    x, results = torch.randn(3, 8), []
    for store in (None, HostStore(CPU, [])):
        weights, start = layers(), x.clone().requires_grad_()
        run(weights, start, store)[0].sum().backward()
        results.append([start.grad, *(weight.grad for weight in weights)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_a_layer_leaves_when_the_next_begins_and_comes_back_one_ahead():
    seen, start = [], torch.randn(3, 8, requires_grad=True)
    out, kept = run(layers(), start, HostStore(CPU, []), seen)
    assert [one.here for one in kept] == [False] * 4 + [True] and not kept[-1].memories
    assert all(memory.here is None for one in kept[:-1] for memory in one.memories.values())
    out.sum().backward()
    # Before its backward a layer is here or on its way, and those below it are not.
    assert seen == [1, 2, 3, 4, 5]
    assert all(memory.here is None for one in kept for memory in one.memories.values())


def test_views_of_one_memory_travel_as_one_and_stay_views():
    class Both(torch.autograd.Function):
        @staticmethod
        def forward(ctx, whole):
            ctx.save_for_backward(whole, whole[:, 2:5], whole.t())
            return whole.sum()

        @staticmethod
        def backward(ctx, grad):
            whole, part, turned = ctx.saved_tensors
            assert part.stride() == (8, 1) and part.storage_offset() == 2
            assert len({one.untyped_storage().data_ptr() for one in (whole, part, turned)}) == 1
            assert torch.equal(whole, expected) and torch.equal(turned, expected.t())
            return grad * whole

    store, start = HostStore(CPU, []), torch.randn(3, 8, requires_grad=True)
    expected = start.detach().clone()
    with store.layer():
        out = Both.apply(start * 1)
        # What the layer leaves is not what was saved.
        assert len(store.last.memories) == 1
    with store.layer():
        pass
    (out * 2).backward()
    assert torch.equal(start.grad, 2 * expected)


def test_parameters_shared_and_small_tensors_are_not_moved(monkeypatch):
    weight, shared = nn.Parameter(torch.randn(8, 8)), torch.randn(3, 8)
    store = HostStore(CPU, [shared])
    with store.layer():
        (torch.randn(3, 8) @ weight) * shared
    assert len(store.last.memories) == 1
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 1000)
    with store.layer():
        torch.randn(3, 8) @ weight
    assert not store.last.memories


def test_a_batch_that_is_given_up_leaves_no_memory_taken():
    x, store = torch.randn(3, 8, requires_grad=True), HostStore(CPU, [])
    out, kept = run(layers(), x, store)
    seen = [weakref.ref(one) for one in kept]
    del out, kept, store
    assert all(one() is None for one in seen)


def test_a_second_backward_is_refused_rather_than_wrong():
    out, _ = run(layers(), torch.randn(3, 8, requires_grad=True), HostStore(CPU, []))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward twice"):
        out.sum().backward()


def test_blocks_of_the_host_serve_batches_of_every_size(monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.offload.BLOCK", 100)
    pool, used = HostBlocks(), []
    for rows in (9, 3, 7, 9, 1):
        x = torch.randn(rows, 8)
        wanted, found = (x.clone().requires_grad_() for _ in range(2))
        run(layers(), wanted)[0].sum().backward()
        run(layers(), found, HostStore(CPU, [], pool=pool))[0].sum().backward()
        assert torch.equal(found.grad, wanted.grad)
        used.append({block.data_ptr() for block in pool.free})
    # Each layer but the last had one or more.
    assert len(used[0]) >= 4 and all(one == used[0] for one in used)
