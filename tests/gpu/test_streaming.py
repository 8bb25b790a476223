"""Layers that are streamed to the device, for real: bits, memory, pins that are refused, and what is under way."""

import gc

import pytest
import torch
from peft import LoraConfig
from transformers import BitsAndBytesConfig

from qwen_lit.engine import offload
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.frozen.fed import Feeder
from qwen_lit.frozen.host import LinkCopies, copies_of, measured_rate
from qwen_lit.frozen.link import CudaLink
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import store_of
from qwen_lit.kernels import attention
from qwen_lit.model.load import add_adapter
from tests.gpu.test_engine import ALL, DEVICE, batch, saved

pytestmark = pytest.mark.gpu

LAYERS = 5
EVERY = range(LAYERS)
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)


class Refusing(CudaLink):
    """A system that pins nothing: CUDA itself refuses, as it is asked for memory that is not there."""

    def register(self, address, size, mapped):
        return super().register(4096, size, mapped)


def fed(blocks, numbers, device):
    return LinkCopies(blocks, numbers, CudaLink(device), 0)


def refused(blocks, numbers, device):
    return LinkCopies(blocks, numbers, Refusing(device), 2**62)


def half(blocks, numbers, device):
    return LinkCopies(blocks, numbers, CudaLink(device), sum(blocks.sizes) // 2)


def pinned(blocks, numbers, device):
    return LinkCopies(blocks, numbers, CudaLink(device), 2**62)


WAYS = {"pinned": pinned, "fed": fed, "half fed": half, "refused": refused}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Loads a base of five layers from one file of blocks; all of its layers are away."""
    folder = saved(tmp_path_factory.mktemp("model"), num_hidden_layers=LAYERS)
    cache = tmp_path_factory.mktemp("bases")
    return lambda: load_frozen(folder, FOUR_BITS, DEVICE, str(cache))


@pytest.fixture
def repeatable(monkeypatch):
    """Sums are taken in one order, so that equal numbers have equal bits; all that may wait on the host does."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(offload, "SMALL", 0)
    monkeypatch.setattr(attention, "FLASH", ())
    attention.flash.cache_clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    attention.flash.cache_clear()


def trained(base, streamed, slots, options, dropout, steps=20):
    """Losses of some steps and of validations between them, and the adapter."""
    store = store_of(base)
    store.place(streamed, slots)
    torch.manual_seed(3)
    model = add_adapter(base, LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=ALL), False).train()
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    engine = FastEngine(model, Policies.of_counts(LAYERS, **options))
    torch.manual_seed(5)
    losses = []
    for step in range(steps):
        loss = engine.loss_sum(batch([512] * 4, step % 3))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if step % 5 == 0:
            with torch.no_grad():
                losses.append(engine.loss_sum(batch([512] * 2, 100)))
    found = [one.item() for one in losses], [one.detach().clone() for one in parameters]
    store.release()
    return found


@pytest.fixture(scope="module")
def resident(base):
    """What resident layers come to, computed once for each way of training."""
    known = {}

    def found(options, dropout):
        key = (tuple(options.items()), dropout)
        if key not in known:
            known[key] = trained(base(), (), 2, options, dropout)
        return known[key]

    return found


KEPT, AGAIN, AWAY = {}, {"recompute": LAYERS}, {"offload_activations": LAYERS}
INPUTS = {"recompute": LAYERS, "offload_inputs": True}


@pytest.mark.parametrize(
    ("streamed", "slots", "way", "options", "dropout"),
    [
        (EVERY, 2, "pinned", KEPT, 0.0),
        (EVERY, 2, "pinned", KEPT, 0.1),
        (EVERY, 3, "pinned", KEPT, 0.1),
        (EVERY, 2, "pinned", AGAIN, 0.1),
        (EVERY, 3, "pinned", AGAIN, 0.1),
        (EVERY, 2, "pinned", INPUTS, 0.1),
        (EVERY, 2, "pinned", AWAY, 0.1),
        ((0, 2, 4), 2, "pinned", AGAIN, 0.1),
        ((3,), 2, "pinned", KEPT, 0.1),
        (EVERY, 2, "fed", AGAIN, 0.1),
        (EVERY, 3, "fed", KEPT, 0.1),
        (EVERY, 2, "half fed", AGAIN, 0.1),
        (EVERY, 2, "refused", AGAIN, 0.1),
    ],
    ids=str,
)
def test_twenty_steps_of_streamed_layers_have_the_bits_of_resident_ones(
    base, resident, repeatable, monkeypatch, streamed, slots, way, options, dropout
):
    losses, adapter = resident(options, dropout)
    # What is compared repeats, or equality would say nothing.
    assert losses[0] != losses[-1]
    monkeypatch.setattr("qwen_lit.frozen.store.copies_of", WAYS[way])
    found, there = trained(base(), streamed, slots, options, dropout)
    assert found == losses
    assert all(torch.equal(one, other) for one, other in zip(there, adapter, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_each_layer_is_what_is_read_in_any_order_while_the_device_is_behind(base, monkeypatch, way):
    monkeypatch.setattr("qwen_lit.frozen.store.copies_of", WAYS[way])
    store = store_of(base())
    store.place(EVERY)
    draw, busy = torch.Generator().manual_seed(0), torch.randn(4096, 4096, device=DEVICE)
    sums = [store.blocks.read(number).to(DEVICE).long().sum() for number in EVERY]
    wrong = []
    store.begin(turns=True)
    for number in torch.randint(0, LAYERS, (60,), generator=draw).tolist():
        slot = store.ring.arrive(number) or store.ring._slot_of(number)
        # Reads begin long after they are asked for, so a slot that is overwritten too early shows.
        busy = (busy @ busy).clamp(-1, 1)
        wrong.append((slot.memory[: store.sizes[number]].long().sum() != sums[number]).clone())
    assert not torch.stack(wrong).any()
    store.release()


def test_blocks_of_a_file_are_pinned_where_they_are_mapped_and_given_back(base):
    blocks = store_of(base()).blocks
    assert blocks.path is not None and blocks.path.is_file()
    for _ in range(2):
        copies = copies_of(blocks, EVERY, DEVICE)
        assert copies.pinned == set(EVERY) and copies.feeder is None
        # Memory that is registered cannot be registered again.
        assert CudaLink(DEVICE).register(blocks.read(0).data_ptr(), blocks.sizes[0], True) is not None
        copies.close()
    torch.zeros(8, device=DEVICE).add_(1)


def test_a_refused_pin_is_said_and_leaves_the_device_usable(base):
    copies = refused(store_of(base()).blocks, EVERY, DEVICE)
    assert not copies.pinned and isinstance(copies.feeder, Feeder) and not copies.pins.held
    assert copies.pins.refusal
    # The first kernel after it would raise an error that CUDA had kept.
    assert torch.ones(8, device=DEVICE).sum().item() == 8
    torch.cuda.synchronize()
    copies.close()


def test_a_layer_that_is_away_is_an_error_to_read_and_not_to_train_after_that(base):
    model = base()
    store = store_of(model)
    store.place(EVERY)
    x = torch.randn(4, 1024, dtype=torch.bfloat16, device=DEVICE)
    for number in (0, 3):
        with torch.no_grad(), pytest.raises(RuntimeError, match="before it is on the device"):
            store.layers[number].modules["self_attn.q_proj"](x)
    store.begin(turns=False)
    store.arrive(3)
    with torch.no_grad():
        assert store.layers[3].modules["self_attn.q_proj"](x).isfinite().all()
    with torch.no_grad(), pytest.raises(RuntimeError, match="before it is on the device"):
        store.layers[2].modules["self_attn.q_proj"](x)
    assert torch.ones(8, device=DEVICE).sum().item() == 8
    store.release()


def requested():
    """Bytes of the device that tensors have asked for; what the allocator adds is its own."""
    return torch.cuda.memory_stats()["requested_bytes.all.current"]


@pytest.mark.parametrize("way", ["pinned", "fed"])
@pytest.mark.parametrize("slots", [2, 3])
def test_streamed_layers_take_the_memory_of_their_slots(base, monkeypatch, slots, way):
    monkeypatch.setattr("qwen_lit.frozen.store.copies_of", WAYS[way])
    store = store_of(base())
    gc.collect()
    before, away = requested(), store.away
    store.place(EVERY, slots)
    assert requested() - before == slots * max(store.sizes) == away - store.away
    store.place(())
    assert requested() - before == sum(store.sizes) and not store.away
    store.release()
    assert requested() == before and store.away == away


def test_the_rate_is_that_of_what_comes(base):
    blocks = store_of(base()).blocks
    fast, slow = (measured_rate(blocks, EVERY, DEVICE, most) for most in (2**62, 0))
    # Links are of 10 to 500 GB a second; one that is fed is no faster than one that reads by itself.
    assert 1e9 < fast < 1e12 and 1e8 < slow < 1.5 * fast
