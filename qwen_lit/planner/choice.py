"""Which engine trains: the fast one with its memory plan where it can run, PEFT's own path elsewhere."""

import logging
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import lightning as L
import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig, PretrainedConfig

from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import gathered, least
from qwen_lit.engine.engine import FastEngine, unsupported_reason
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.engine.products import NAMED, Products
from qwen_lit.engine.products_check import refusal
from qwen_lit.errors import UserError
from qwen_lit.families.table import family_of
from qwen_lit.model.probe import probed, told
from qwen_lit.model.products import ProductsInUse, refused
from qwen_lit.model.settings import ModelSettings
from qwen_lit.planner.measure import Gpu
from qwen_lit.planner.plan import GIB, Plan, packed_words
from qwen_lit.planner.planner import Planned, Planner, Work, possible_at_once
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)
FALLBACK = "fast (PyTorch fallback, no CUDA)"
"""How an engine on the CPU is described."""


@dataclass(frozen=True)
class Choice:
    """The engine that computes the loss, with its plan."""

    description: str
    """The engine and its plan in words, as the start of a run logs them."""
    fast: FastEngine | None = None
    """None for PEFT's own path."""
    plan: Plan | None = None
    """The memory plan of the fast engine on a GPU; None otherwise."""
    planner: Planner | None = None
    """What has made the plan."""
    work: Work | None = None
    """What the plan was made for."""
    refused: str | None = None
    """Why products are in bf16 that should be in 8 bits; None where they are as asked."""
    products: ProductsInUse | None = None
    """Those of the run, where a probe has found which of them stay in bf16; None where there was none."""


class Trainable(Protocol):
    """What is asked of a ``QwenModule`` here."""

    settings: ModelSettings
    config: PretrainedConfig
    model: PeftModel | None
    quantization_config: BitsAndBytesConfig | None
    memory_budget: int | None
    products: ProductsInUse

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state for each trained parameter."""


def choose_engine(
    module: Trainable, trainer: L.Trainer, data: QwenDataModule, before: int | None, graphs: int | None = None
) -> Choice:
    """The engine that ``model.engine`` allows.

    Args:
        module: with its model on this rank's device.
        trainer: all of its ranks call this.
        data: its rows are prepared.
        before: micro-batches that the resumed run has computed at once; None for a new run.
        graphs: tokens up to which micro-batches of the resumed run were CUDA graphs; None for a new run.

    Raises:
        UserError: ``engine`` is fast, and the model or the device does not allow it; or ``products`` are in 8 bits,
            and the reference would train.
        torch.OutOfMemoryError: no plan fits.
    """
    assert module.model is not None
    asked, device, kept = module.settings.engine, trainer.strategy.root_device, module.settings.kept
    reason = unsupported_reason(module.model, device)
    if asked == "auto" and device.type != "cuda":
        reason = reason or "there is no CUDA device"
    if asked == "fast" and reason:
        raise UserError(f"model.engine is fast, but {reason}; set it to auto.")
    if asked == "reference" or reason:
        if module.products.used != "bf16" and trainer.state.fn == "fit":
            raise refused(module.products.asked, reason or "model.engine is reference")
        if kept == "int8":
            log.warning("model.kept: int8 changes nothing: the engine is reference (%s)", reason)
        return Choice("reference" + (f" ({reason})" if reason and asked == "auto" else ""))
    quantization = module.quantization_config
    if quantization and quantization.load_in_4bit and quantization.bnb_4bit_compute_dtype != torch.bfloat16:
        given = str(quantization.bnb_4bit_compute_dtype).removeprefix("torch.")
        log.info("the fast engine computes in bfloat16; bnb_4bit_compute_dtype %s is for the reference", given)
    products, unused = _usable_products(module.products.products, trainer, device)
    probe = None
    if products.narrow and module.products.share_left:
        probe = Probe(module.products, trainer, data)
    if device.type != "cuda":
        layers = len(family_of(module.config).layers(module.config))
        policy = Policy.RECOMPUTE if module.settings.gradient_checkpointing else Policy.KEEP
        policies = Policies((policy,) * layers, kept=kept)
        engine = FastEngine(module.model, policies, products)
        if probe is not None:
            engine.products = probe(engine)
        found = None if probe is None else probe.products
        return Choice(FALLBACK + packed_words(policies), engine, refused=unused, products=found)
    planner = Planner(
        module.model,
        Gpu(device),
        partial(least, trainer),
        trainer.precision_plugin.forward_context,
        module.state_bytes,
        module.memory_budget,
        before,
        trainer.num_devices,
        products,
        kept,
        probe,
        graphs=0 if without_graphs(module.settings, trainer) else graphs,
        reserved=bucket_bytes(module.model) if trainer.world_size > 1 else 0,
    )
    work = Work(
        data.most_tokens(possible_at_once(options_of(trainer).micro_batches_per_step)),
        data.mean_tokens(),
        data.heaviest,
    )
    planned = planner.plan(work) if trainer.state.fn == "fit" else planner.plan_unmeasured(work)
    found = None if probe is None else probe.products
    return Choice(described(planned), planned.engine, planned.plan, planner, work, unused, found)


def bucket_bytes(model: torch.nn.Module) -> int:
    """Bytes that several ranks add gradients up in, float32: DDP's buckets, beside those of accumulated passes."""
    return 4 * sum(one.numel() for one in model.parameters() if one.requires_grad)


def described(planned: Planned) -> str:
    """An engine with its plan in words, as the start of a run logs it."""
    measured = "" if planned.peak is None else f", measured {planned.peak / GIB:.2f}"
    return f"fast, {planned.plan}{measured}"


@dataclass
class Probe:
    """Looks once for the products that stay in bf16."""

    products: ProductsInUse
    """Of the run, with what was found once it is called."""
    trainer: L.Trainer
    """All of its ranks look, and take what the first of them finds."""
    data: QwenDataModule
    """Its rows are prepared."""

    def __call__(self, engine: FastEngine) -> Products:
        """What the engine is to be given.

        Args:
            engine: whose layers are placed.
        """
        # Lightning makes new tensors on the device while it builds a model.
        with torch.device("cpu"):
            batch = self.data.heaviest(1)
        self.products = probed(self.products, engine, batch, lambda mine: gathered(self.trainer, mine)[0])
        if self.trainer.is_global_zero:
            log.info("products   %s", told(self.products))
        return self.products.products


def without_graphs(settings: ModelSettings, trainer: L.Trainer) -> str | None:
    """Why no micro-batch of a run is a CUDA graph, in words; None where some may be.

    Args:
        settings: the section ``model``.
        trainer: of the run.
    """
    if settings.graphs == "off":
        return "model.graphs is off"
    if trainer.state.fn != "fit":
        return "nothing is trained"
    if settings.neftune_noise_alpha > 0:
        return "the noise of NEFTune depends on the tokens of a micro-batch"
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "the loss is scaled for float16"
    return None


def _usable_products(products: Products, trainer: L.Trainer, device: torch.device) -> tuple[Products, str | None]:
    """The products that every rank's device computes rightly, and why they are not those that are asked for.

    Args:
        products: that are asked for.
        trainer: all of its ranks call this.
        device: of this rank.
    """
    if trainer.state.fn != "fit":
        # Nothing but training is in 8 bits.
        return Products(), None
    mine = refusal(NAMED[products.name], device) if products.narrow else None
    reasons = [reason for reason in gathered(trainer, mine) if reason is not None]
    if not reasons:
        return products, None
    if trainer.is_global_zero:
        log.warning("model.products: %s is not used: %s; products are in bf16", products.name, reasons[0])
    return Products(), str(reasons[0])
