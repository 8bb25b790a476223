"""Ranks that stream from one copy learn what one process learns; a file is made once, whoever is killed meanwhile."""

import os
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from qwen_lit.distributed import reduce_trained_alone
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.frozen import loading
from qwen_lit.frozen.blocks import Layout
from qwen_lit.frozen.cache import Ranks, blocks_in_memory, cached_blocks
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.store import FrozenStore
from qwen_lit.model.load import load_base
from tests.engine.test_engine import batch
from tests.frozen.stores import CPU, snapshot
from tests.runs import ended, wait_for

LAYERS, STEPS, RANKS, KEY = 3, 3, 2, "key"
HELD = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
LENGTHS = ((7, 13, 1, 20), (5, 3))
"""Of each rank's documents."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS, "vocab_size": 301}
    made = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(made)
    return made


class Trained(nn.Module):
    """What DDP wraps: the model, and its loss by the fast engine."""

    def __init__(self, folder: Path, shared: Callable[[FrozenStore], Blocks | None] | None = None) -> None:
        super().__init__()
        base = load_base(folder, HELD, CPU)
        if shared is not None:
            one = snapshot(base)
            blocks = shared(one)
            assert blocks is not None
            base.frozen = FrozenStore(blocks, one.layers, CPU)
            base.frozen.place(range(LAYERS))
        torch.manual_seed(1)
        self.model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])).train()
        self.engine = FastEngine(self.model, Policies((Policy.RECOMPUTE,) * LAYERS))

    def forward(self, one):
        return self.engine.loss_sum(one)

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}


def learn(trained: Trained, micro_batches, wrapped=None, share: float = 1.0) -> dict[str, torch.Tensor]:
    """The adapter after some steps on micro-batches, whose losses are divided by the tokens of all ranks."""
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=10.0)
    tokens = sum(batch(True, one)["targets"].numel() for one in LENGTHS)
    for step in range(STEPS):
        for lengths in micro_batches:
            loss = (wrapped or trained)(batch(True, lengths, step))
            (loss * share / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained.trained()


def mappings() -> list[dict[str, str]]:
    """What the kernel says of this process's mappings of blocks."""
    found: list[dict[str, str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ (\d+) +(.*)", line):
            kind, inode, name = head.groups()
            found.append({"file": name, "kind": kind, "inode": inode})
        else:
            key, _, value = line.partition(":")
            found[-1][key] = value.strip()
    return [one for one in found if KEY in one["file"] or "memfd:qwen_lit" in one["file"]]


def layouts_of(store: FrozenStore) -> list[Layout]:
    return [layer.layout for layer in store.layers]


def noted(store: FrozenStore, made: Path) -> Iterator[torch.Tensor]:
    """The blocks of a store; that they were asked for is noted."""
    with made.open("a") as file:
        file.write("made\n")
    # As long as others need to ask for them too.
    time.sleep(0.2)
    yield from map(store.blocks.read, range(LAYERS))


def rank(number: int, folder: Path, shared: Path, kept: bool) -> None:
    """One of two ranks that train; what it finds is left in ``shared``."""
    dist.init_process_group("gloo", store=dist.FileStore(str(shared / "store"), RANKS), rank=number, world_size=RANKS)

    def gathered(value):
        found = [None] * RANKS
        dist.all_gather_object(found, value)
        return found

    def blocks(store):
        made = partial(noted, store, shared / "made")
        if kept:
            return cached_blocks(shared, "base", layouts_of(store), KEY, made)
        return blocks_in_memory(layouts_of(store), KEY, made, Ranks(gathered, number, 0))

    trained = Trained(folder, blocks)
    reduce_trained_alone(trained)
    adapter = learn(trained, [LENGTHS[number]], DistributedDataParallel(trained), RANKS)
    torch.save({"adapter": adapter, "mappings": mappings()}, shared / f"{number}.pt")
    dist.barrier()


def child(work: Callable[..., None], *given) -> int:
    """The id of a forked process that does something."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)
            work(*given)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid


@pytest.mark.parametrize("kept", [True, False], ids=["of a file", "in memory"])
def test_two_ranks_stream_from_one_copy_and_learn_what_one_process_learns(folder, tmp_path, kept):
    expected = learn(Trained(folder), LENGTHS)
    assert [ended(pid) for pid in [child(rank, number, folder, tmp_path, kept) for number in range(RANKS)]] == [0, 0]
    assert (tmp_path / "made").read_text() == "made\n"
    found = [torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in range(RANKS)]
    for name, weight in expected.items():
        assert all(torch.equal(one["adapter"][name], weight) for one in found)
    (first,), (second,) = (one["mappings"] for one in found)
    assert first["inode"] == second["inode"] and first["file"] == second["file"]
    for one in (first, second):
        assert one["kind"].endswith("s") and one["Rss"] == one["Size"]
        # A file's pages of its own would be anonymous ones.
        assert not kept or one["Anonymous"] == "0 kB"


def test_a_writer_that_is_killed_leaves_the_file_to_one_of_those_who_wait(folder, tmp_path):
    store, begun = snapshot(load_base(folder, HELD, CPU)), tmp_path / "begun"
    left = {name: tmp_path / f"{KEY}.{name}.tmp" for name in ("another machine", "a dead machine")}
    for one in left.values():
        one.write_text("half of it")
    os.utime(left["a dead machine"], (0, 0))

    def killed():
        yield store.blocks.read(0)
        begun.touch()
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)

    def ask(blocks):
        found = cached_blocks(tmp_path, "base", layouts_of(store), KEY, blocks)
        assert found is not None
        assert all(torch.equal(found.read(number), store.blocks.read(number)) for number in range(LAYERS))

    first = child(ask, killed)
    wait_for(begun)
    others = [child(ask, partial(noted, store, tmp_path / "made")) for _ in range(3)]
    assert [ended(pid) for pid in (first, *others)] == [-signal.SIGKILL, 0, 0, 0]
    assert (tmp_path / "made").read_text() == "made\n"
    assert list(tmp_path.glob("*.tmp")) == [left["another machine"]]


@pytest.mark.parametrize("room", [0, 2**40], ids=["without room", "with room"])
def test_a_rank_that_has_the_file_alone_does_as_the_others(folder, tmp_path, monkeypatch, room):
    monkeypatch.setattr(loading, "_room", lambda device, given: room)
    skeleton = loading._skeleton(folder, HELD, CPU)
    ranks = Ranks(lambda mine: [mine, (False, room > 0, False)])
    found = loading._blocks(skeleton, folder, CPU, str(tmp_path), None, ranks)
    assert list(tmp_path.glob("*.safetensors"))
    assert (found is None) == (room > 0)
    assert found is None or found.path is None


@pytest.mark.parametrize(
    ("several", "memory", "once"), [(True, 2**40, True), (True, 1000, False), (False, 2**40, False)]
)
def test_without_a_cache_one_rank_of_a_machine_reads_for_the_others_where_it_has_the_memory(
    folder, monkeypatch, several, memory, once
):
    monkeypatch.setattr(loading, "_room", lambda device, given: 2**40)
    monkeypatch.setattr(loading, "host_memory", lambda: memory)
    asked = []
    monkeypatch.setattr(loading, "blocks_in_memory", lambda *given: asked.append(given[-1]) or "blocks")
    ranks = Ranks(lambda mine: [mine, mine], several=several)
    found = loading._blocks(loading._skeleton(folder, HELD, CPU), folder, CPU, None, None, ranks)
    assert found == ("blocks" if once else None) and asked == [ranks] * once
