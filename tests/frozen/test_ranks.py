"""Two ranks that stream from one file learn what one process learns, and the host has the layers once."""

import os
import re
from dataclasses import replace
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
from qwen_lit.frozen.store import FrozenStore
from qwen_lit.model.load import load_base
from tests.engine.test_engine import batch
from tests.frozen.stores import CPU, snapshot

LAYERS, STEPS, RANKS = 3, 3, 2
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

    def __init__(self, folder: Path, file: Path | None) -> None:
        super().__init__()
        held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        base = load_base(folder, held, CPU)
        if file is not None:
            one = snapshot(base)
            memory = torch.from_file(str(file), shared=True, size=file.stat().st_size, dtype=torch.uint8)
            base.frozen = FrozenStore(replace(one.blocks, memory=memory), one.layers, CPU)
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


def mappings(file: Path) -> list[dict[str, str]]:
    """What the kernel says of this process's mappings of a file."""
    found: list[dict[str, str]] = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ (\d+) +(.*)", line):
            kind, inode, name = head.groups()
            found.append({"file": name, "kind": kind, "inode": inode})
        else:
            key, _, value = line.partition(":")
            found[-1][key] = value.strip()
    return [one for one in found if one["file"] == str(file)]


def rank(number: int, folder: Path, file: Path, shared: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(shared / "store"), RANKS), rank=number, world_size=RANKS)
    trained = Trained(folder, file)
    reduce_trained_alone(trained)
    adapter = learn(trained, [LENGTHS[number]], DistributedDataParallel(trained), RANKS)
    torch.save({"adapter": adapter, "mappings": mappings(file)}, shared / str(number))
    dist.barrier()


def ranks(*given) -> list[int]:
    """The exit codes of all ranks, which are forked."""
    children = []
    for number in range(RANKS):
        pid = os.fork()
        if not pid:
            try:
                rank(number, *given)
            except BaseException:
                import traceback

                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def test_two_ranks_stream_from_one_copy_and_learn_what_one_process_learns(folder, tmp_path):
    expected = learn(Trained(folder, None), LENGTHS)
    file = tmp_path / "blocks"
    held = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    file.write_bytes(snapshot(load_base(folder, held, CPU)).blocks.memory.numpy().tobytes())
    assert ranks(folder, file, tmp_path) == [0, 0]
    found = [torch.load(tmp_path / str(number), weights_only=True) for number in range(RANKS)]
    for name, weight in expected.items():
        assert all(torch.equal(one["adapter"][name], weight) for one in found)
    for one in found:
        (mapping,) = one["mappings"]
        assert mapping["inode"] == str(file.stat().st_ino) and mapping["kind"].endswith("s")
        assert mapping["Anonymous"] == "0 kB" and mapping["Rss"] == mapping["Size"]
