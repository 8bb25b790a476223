"""A small real model with an adapter, as ``fidelity.py`` trains it, and its copies in float32."""

# Before torch, whose allocator it sets.
# isort: off
import qwen_lit  # noqa: F401
import torch

# isort: on
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitsandbytes.functional import dequantize_4bit
from cases import ALL
from lightning.fabric.utilities import move_data_to_device
from packed import Rows
from peft import LoraConfig, PeftModel
from random_base import NF4
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qwen_lit.data.batches import Batch, padded
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.products import Products
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.families.table import family_of
from qwen_lit.model.documents import keep_apart
from qwen_lit.model.load import add_adapter, freeze, load_base, read_model
from qwen_lit.model.loss import reference_loss


@dataclass
class Bench:
    """A model with an adapter, and what computes its loss."""

    model: PeftModel
    rows: Rows
    device: torch.device

    @staticmethod
    def load(folder: Path, rows: Rows, device: torch.device, rank: int = 16) -> "Bench":
        """The model with its linears in NF4 and an adapter on all of them.

        Args:
            folder: of a checkpoint or of a packed model.
            rows: that it trains.
            device: where.
            rank: of the adapter.
        """
        # Files that are in 4 bits already stay as they are.
        return Bench(adapted(load_base(folder, NF4, device), rank), rows, device)

    def __post_init__(self) -> None:
        if reason := unsupported_reason(self.model, self.device):
            raise SystemExit(reason)
        self.engine = FastEngine(self.model)
        self.trained = trained_of(self.model)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.engine.layers)

    def begin(self, seed: int) -> None:
        """Draw the adapter as PEFT does: A uniform, B zero; the same numbers on every device.

        Args:
            seed: of the run.
        """
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, one in self.trained.items():
                drawn = (torch.rand(one.shape, generator=generator) * 2 - 1) / one.shape[1] ** 0.5
                one.copy_(drawn if ".lora_A." in name else torch.zeros(()))

    def set(self, adapter: dict[str, Tensor]) -> None:
        """Take the numbers of an adapter.

        Args:
            adapter: by the names of ``trained``.
        """
        with torch.no_grad():
            for name, one in self.trained.items():
                one.copy_(adapter[name])

    def taken(self) -> dict[str, Tensor]:
        """A copy of the adapter on the CPU."""
        return {name: one.detach().cpu().clone() for name, one in self.trained.items()}

    def loss(self, batch: Batch, products: Products) -> Tensor:
        """The summed loss by the fast engine."""
        self.engine.products = products
        return self.engine.loss_sum(move_data_to_device(batch, self.device))

    def peft_loss(self, batch: Batch) -> Tensor:
        """The summed loss by the modules of transformers and PEFT, in bf16 by autocast."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return plain_loss(self.model, batch, self.device)

    def gradient(self, batch: Batch, products: Products) -> "Gradient":
        """That of the mean loss of a batch, by the fast engine."""
        return Gradient.of(self.loss(batch, products), batch, self.trained)


@dataclass(frozen=True)
class Gradient:
    """Of the mean loss of a batch."""

    loss: float
    """In nats."""
    parts: dict[str, Tensor]
    """float32 on the device, by the names of ``trained_of``."""

    @staticmethod
    def of(total: Tensor, batch: Batch, trained: dict[str, nn.Parameter]) -> "Gradient":
        """By backward.

        Args:
            total: summed loss of the batch.
            batch: whose supervised tokens are counted; of one without any, the sum is taken.
            trained: the parameters.
        """
        mean = total / max(1, batch["targets"].numel())
        found = torch.autograd.grad(mean, list(trained.values()), allow_unused=True)
        parts = {
            name: torch.zeros_like(one) if grad is None else grad.float()
            for (name, one), grad in zip(trained.items(), found, strict=True)
        }
        return Gradient(mean.item(), parts)

    @property
    def flat(self) -> Tensor:
        """All of it, float32 ``[numbers]``."""
        return torch.cat([one.flatten() for one in self.parts.values()])


def adapted(base: Any, rank: int) -> PeftModel:
    """A base with an adapter on all seven linears, without dropout."""
    return add_adapter(base, LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=ALL), False)


def trained_of(model: PeftModel) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def plain_loss(model: PeftModel, batch: Batch, device: torch.device) -> Tensor:
    """The summed loss by transformers' and PEFT's modules, a document a row, in whatever dtype they have."""
    base: Any = model.get_base_model()
    return reference_loss(base, family_of(base.config), padded(move_data_to_device(batch, device), 0))


def exact_copy(bench: Bench) -> PeftModel:
    """The model in float32, with the very numbers that bf16 products multiply: each 4-bit weight as it is dequantised
    to bf16. By transformers' own modules its products are in float32; nothing of the fast engine is in it."""
    base: Any = bench.model.get_base_model()
    config = copy.deepcopy(base.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.float32
    with bench.device:
        found: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = {}
    for name, one in base.named_parameters():
        held = getattr(one, "quant_state", None)
        if ".lora_" not in name:
            own = name.replace(".base_layer.", ".")
            state[own] = (one.data if held is None else dequantize_4bit(one.data, held)).float()
    lost, unknown = found.load_state_dict(state, strict=False)
    assert not unknown and set(lost) <= {"lm_head.weight"}, (lost, unknown)
    return _exact(found, bench)


def unquantised_copy(bench: Bench, folder: Path) -> PeftModel:
    """The model in float32 as its checkpoint has it, before anything was quantised.

    Args:
        bench: whose adapter it gets.
        folder: of the checkpoint, with the vocabulary of the bench's model.
    """
    return _exact(read_model(folder, bench.device, None, torch.float32), bench)


def _exact(base: Any, bench: Bench) -> PeftModel:
    keep_apart(base)
    freeze(base)
    rank = next(one.shape[0] for name, one in bench.trained.items() if ".lora_A." in name)
    model = adapted(base, rank)
    with torch.no_grad():
        for name, one in trained_of(model).items():
            one.copy_(bench.trained[name])
    return model
