"""Whether streamed layers train as resident ones do, bit for bit, on the device that is there.

    python benchmarks/equal.py [--shape qwen2.5-7b] [--layers 7] [--steps 20] [--tokens 4096] [--dropout 0.1]

One base of random weights, one adapter, the same steps again and again: with every layer resident, twice, which says
whether the device itself repeats what it computes; then with layers streamed. Losses and the adapter of each run are
compared with those of the resident run that saves memory in the same way.
"""

# Before torch, whose allocator it sets.
# isort: off
import qwen_lit  # noqa: F401
import torch

# isort: on
import argparse
import sys
from dataclasses import dataclass
from typing import Any

from cases import QKVO, documents
from lightning.fabric.utilities import move_data_to_device
from made import made_base
from peft import LoraConfig, PeftModel
from random_base import NF4
from torch.nn.attention import SDPBackend

from qwen_lit.data.batches import collate
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.frozen.store import FrozenStore
from qwen_lit.kernels import attention
from qwen_lit.model.load import add_adapter
from qwen_lit.model.optim import OPTIMIZERS


@dataclass
class Trainer:
    """Makes the same steps from the same adapter again and again."""

    model: PeftModel
    batches: list[Any]

    def __post_init__(self) -> None:
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.first = [parameter.detach().clone() for parameter in self.trained]

    @property
    def store(self) -> FrozenStore:
        """Of the base."""
        found: FrozenStore = self.model.base_model.model.frozen
        return found

    def run(self, policy: Policy, streamed: tuple[int, ...], slots: int) -> tuple[list[float], list[torch.Tensor]]:
        """The loss of each step, and the adapter after the last one.

        Args:
            policy: of every layer.
            streamed: numbers of layers.
            slots: that these share.
        """
        self.store.place(streamed, slots)
        with torch.no_grad():
            for parameter, value in zip(self.trained, self.first, strict=True):
                parameter.copy_(value)
        torch.manual_seed(2)
        engine = FastEngine(self.model, Policies((policy,) * len(self.store.layers), streamed=frozenset(streamed)))
        groups = [{"params": self.trained, "lr": 2e-4}]
        on_gpu = self.store.device.type == "cuda"
        optimizer = OPTIMIZERS["paged_adamw_8bit" if on_gpu else "adamw"].build(groups, (0.9, 0.999))
        losses = []
        for batch in self.batches:
            with torch.autocast(self.store.device.type, dtype=torch.bfloat16):
                loss = engine.loss_sum(batch) / batch["targets"].numel()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses, [parameter.detach().clone() for parameter in self.trained]


def told(run: tuple[list[float], list[torch.Tensor]], expected: tuple[list[float], list[torch.Tensor]]) -> str:
    """Whether two runs are equal, or where they part."""
    (losses, adapter), (there, other) = run, expected
    apart = next((step for step, pair in enumerate(zip(losses, there, strict=True), 1) if pair[0] != pair[1]), None)
    most = max(float((one - two).abs().max()) for one, two in zip(adapter, other, strict=True))
    same = apart is None and all(torch.equal(one, two) for one, two in zip(adapter, other, strict=True))
    return "equal" if same else f"NOT equal: losses part at step {apart}, adapters by {most:.1e}"


def main() -> int:
    """Compare every way; the exit status is 1 where one is not equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b")
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dropout", type=float, default=0.1)
    given = parser.parse_args()
    # Attention's fused backward adds in whatever order its blocks end.
    attention.BACKENDS[:] = [SDPBackend.MATH]
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    base = made_base(given.shape, NF4, device, given.layers)
    torch.manual_seed(1)
    model = add_adapter(base, LoraConfig(r=32, lora_alpha=64, lora_dropout=given.dropout, target_modules=QKVO), False)
    length = min(2048, given.tokens)
    docs = documents({}, given.steps * given.tokens // length, length)
    per_step = given.tokens // length
    parts = [docs[at : at + per_step] for at in range(0, len(docs), per_step)]
    trainer = Trainer(model, [move_data_to_device(collate(part, 0), device) for part in parts])
    every, failed = tuple(range(given.layers)), False
    ways = [("all streamed, 2 slots", every, 2), ("all, 3 slots", every, 3), ("each second, 2 slots", every[::2], 2)]
    for policy in (Policy.KEEP, Policy.RECOMPUTE, Policy.OFFLOAD):
        expected = trainer.run(policy, (), 2)
        print(f"{policy.value}: losses {expected[0][0]:.4f} to {expected[0][-1]:.4f}", flush=True)
        for name, streamed, slots in [("resident again", (), 2), *ways]:
            said = told(trainer.run(policy, streamed, slots), expected)
            failed = failed or said != "equal"
            print(f"{policy.value}: {name}: {said}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
