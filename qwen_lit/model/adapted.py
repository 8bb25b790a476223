"""A frozen Qwen base with a LoRA adapter: how it is found, loaded, moved and stored, whatever is done with it."""

import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor

from qwen_lit.data.batches import Batch, padded
from qwen_lit.data.datamodule import QwenDataModule, data_of
from qwen_lit.distributed import gathered, reduce_trained_alone
from qwen_lit.engine.ends import cast_ends
from qwen_lit.engine.engine import FastEngine
from qwen_lit.export.adapter import RESIDUAL_INITS, saved_name
from qwen_lit.export.folder import read_json
from qwen_lit.families.table import family_of
from qwen_lit.frozen.cache import ALONE, Ranks
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import FrozenStore, disband, store_of
from qwen_lit.hub import fetch, is_folder
from qwen_lit.model.adapter_state import check_same, put, trained_parameters
from qwen_lit.model.base_files import check_base
from qwen_lit.model.graphs import Graphs, graphs_of
from qwen_lit.model.load import add_adapter, load_config
from qwen_lit.model.loss import reference_loss
from qwen_lit.model.neftune import add_noise
from qwen_lit.model.optim import optimizer_of
from qwen_lit.model.products import ProductsInUse
from qwen_lit.model.resume import stored
from qwen_lit.model.schedules import WITHOUT_WARMUP
from qwen_lit.model.settings import ModelSettings
from qwen_lit.model.targets import settle_targets
from qwen_lit.model.trained import find_adapter, weights
from qwen_lit.names import expanded
from qwen_lit.planner.choice import Choice, choose_engine, described
from qwen_lit.planner.plan import Plan, parse_bytes
from qwen_lit.planner.planner import Planned
from qwen_lit.planner.settle import hold_all, reads_base
from qwen_lit.quantization import Held, check_trained_whole, loaded_weights, planned_weights, usable
from qwen_lit.run import Run


class AdaptedModel(L.LightningModule):
    """A frozen Qwen base with a trained LoRA adapter."""

    def __init__(self, settings: ModelSettings, run: Run | None = None) -> None:
        """Finds the base and checks that the settings suit it; weights are read in ``configure_model``.

        Args:
            settings: the section ``model``.
            run: whose configuration is kept in checkpoints; None where no command is run.

        Raises:
            UserError: the model or a setting cannot work.
        """
        super().__init__()
        self.settings, self.lora_config, self.run = settings, settings.lora_config, run or Run(Path("output"))
        given = settings.model_name_or_path
        self.name = expanded(given) if is_folder(given) else given
        self.optimizer_name, self.optimizer = optimizer_of(
            settings.optimizer, settings.learning_rate, settings.weight_decay
        )
        self.warmup_ratio = 0.0 if settings.lr_scheduler in WITHOUT_WARMUP else settings.warmup_ratio
        self.memory_budget = parse_bytes(settings.memory_budget) if settings.memory_budget else None
        # A run that is resumed needs the adapter it once began from no more, so the folder may be gone.
        there = settings.init_adapter and Path(expanded(settings.init_adapter)).exists()
        self.init_adapter = find_adapter(settings.init_adapter) if settings.init_adapter and there else None
        self.folder = fetch(self.name, settings.hub)
        """The folder with the base's files: its config and tokenizer, and its weights once they are needed."""
        self.config = load_config(self.folder, self.name)
        """transformers' config of the language model."""
        self.family = family_of(read_json(self.folder / "config.json"))
        """Of the base's files, which may hold more than the language model."""
        self.quantization_config = usable(settings.quantization_config, self.config)
        self.quantized: dict[str, Held] | None = None
        settle_targets(self.config, self.lora_config)
        if self.lora_config.modules_to_save:
            held = self.held_weights(torch.device("cpu"))
            check_trained_whole(held, self.lora_config.modules_to_save, self.config)
        self.model: PeftModel | None = None
        self.initial_adapter: tempfile.TemporaryDirectory[str] | None = None
        self.fast: FastEngine | None = None
        self.plan: Plan | None = None
        self.graphs: Graphs | None = None
        """What records micro-batches of few tokens; None where the plan has none."""
        self.products = ProductsInUse.of(settings.products, None)
        self.engine_description = ""
        self.choice: Choice | None = None
        """How the engine was chosen; None before the model is loaded."""

    def teardown(self, stage: str) -> None:
        """Leave nothing on the device, as Lightning has moved all else to the CPU."""
        self.release_memory()

    def fetch_weights(self) -> None:
        """See that the base's weights are on this machine and can be read.

        Raises:
            UserError: they cannot be fetched, are damaged, or are not those of the model that config.json describes.
        """
        self.folder = fetch(self.name, self.settings.hub, weights=True)
        check_base(self.folder, self.config)

    def load_base(self, device: torch.device, ranks: Ranks = ALONE) -> Any:
        """The frozen base, whose layers are away where it has a store (``load_frozen``).

        Args:
            device: where it computes.
            ranks: that all call this; a command without a trainer, or one rank of a run for itself, is alone.
        """
        cache = self.settings.base_cache
        return load_frozen(self.folder, self.quantization_config, device, cache, self.memory_budget, ranks)

    def configure_model(self) -> None:
        """Load the base on this rank's device and put the adapter on it."""
        if self.model is not None:
            return
        trainer, device = self.trainer, self.trainer.strategy.root_device
        first = trainer.global_rank - trainer.local_rank
        ranks = Ranks(partial(gathered, trainer), trainer.global_rank, first, trainer.num_devices > 1)
        base = self.load_base(device, ranks)
        self.quantized = loaded_weights(base)
        if reason := reads_base(self.lora_config):
            hold_all(base, f"model.lora_config has {reason}")
        start = str(self.lora_config.init_lora_weights).lower()
        if start.startswith(RESIDUAL_INITS):
            disband(base)
        self.model = add_adapter(base, self.lora_config, self.settings.gradient_checkpointing)
        if self.init_adapter is not None:
            put(self, weights(self.init_adapter))
        if start.startswith(("pissa", "olora")):
            # These change the base; the exported adapter is the difference from where it started.
            self.initial_adapter = tempfile.TemporaryDirectory(prefix="qwen_lit_")
            self.model.save_pretrained(self.initial_adapter.name, save_embedding_layers=False)
        if self.settings.neftune_noise_alpha > 0:
            add_noise(base.get_input_embeddings(), self.settings.neftune_noise_alpha)  # type: ignore[operator]
        then = stored(self.run.checkpoint)
        self.products = ProductsInUse.of(self.settings.products, then.get("products"))
        # Where model.graphs has been changed, what it was before says nothing of how many tokens it is for.
        asked, asks = then.get("config", {}).get("model", {}), self.settings.graphs
        graphs = then.get("graph_tokens") if asked.get("graphs", asks) == asks else None
        before = then.get("micro_batches_at_once"), graphs
        choice = self.choice = choose_engine(self, self.trainer, self.data, *before)
        self.fast, self.plan, self.engine_description = choice.fast, choice.plan, choice.description
        self.products = choice.products or self.products
        self.graphs = graphs_of(choice.fast, choice.plan)
        if choice.refused is not None:
            self.leave_products(choice.refused)
        if self.store is not None and (self.fast is None or self.store.placing is None):
            hold_all(base, f"the engine is {choice.description}, which streams nothing")
        if not start.startswith(RESIDUAL_INITS):
            # Those change the base by a decomposition, of which ranks may round the last bits otherwise.
            reduce_trained_alone(self)

    def use(self, planned: Planned) -> None:
        """Go on with another plan, which computes the same.

        Args:
            planned: of ``Planner.again``.
        """
        self.fast, self.plan, self.engine_description = planned.engine, planned.plan, described(planned)

    def held_weights(self, device: torch.device) -> dict[str, Held]:
        """How the base's quantised weights are held, by name; before it is loaded, how they would be.

        Args:
            device: where it would be loaded.
        """
        if self.quantized is not None:
            return self.quantized
        return planned_weights(self.config, self.quantization_config, device, self.folder)

    def release_memory(self) -> None:
        """Free what only training needs, for what comes after it; the next pass takes it again."""
        if self.graphs is not None:
            self.graphs.release()
        if self.fast is not None:
            self.fast.release()
        if self.store is not None:
            self.store.release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def note_products(self, step: int, cosine: float, error: float) -> None:
        """Keep what the last check of the products has found.

        Args:
            step: optimizer step, counted from 1.
            cosine: of the gradient with that in bf16.
            error: of the gradient, as a share of its norm.
        """
        self.products = replace(self.products, checked=(step, cosine, error))

    def leave_products(self, why: str, since: int | None = None) -> None:
        """Go on with products in bf16; the checkpoint remembers it.

        Args:
            why: what speaks against 8 bits.
            since: the first optimizer step in bf16, counted from 1; None where no step was made in 8 bits.
        """
        self.products = self.products.left(why, since)
        if self.fast is not None:
            self.fast.products = self.products.products

    @property
    def data(self) -> QwenDataModule:
        """The run's DataModule."""
        return data_of(self.trainer)

    @property
    def micro_batches_at_once(self) -> int:
        """Micro-batches of an optimizer step that are computed in one forward and backward pass, as the plan says."""
        return 1 if self.plan is None else self.plan.micro_batches_at_once

    @property
    def graph_tokens(self) -> int:
        """Tokens up to which a forward and backward pass is a CUDA graph, as the plan says; 0 for none."""
        return 0 if self.plan is None else self.plan.graph_tokens

    @property
    def pads(self) -> bool:
        """Whether each document is computed in a padded row of its own: on PEFT's path, where they are not packed."""
        return self.fast is None and not self.data.settings.packing

    def computed_tokens(self, step: Sequence[Batch]) -> int:
        """Tokens that are computed for an optimizer step's micro-batches, with all that pads or fills them up."""
        if self.pads:
            return sum((len(one["cu_seqlens"]) - 1) * one["max_seqlen"] for one in step)
        sizes, at_once = [one["input_ids"].numel() for one in step], self.micro_batches_at_once
        passes = [sum(sizes[at : at + at_once]) for at in range(0, len(sizes), at_once)]
        return sum(passes if self.graphs is None else map(self.graphs.computed, passes))

    @property
    def store(self) -> FrozenStore | None:
        """What holds the base's frozen linears; None where their modules do, or nothing is loaded."""
        return None if self.model is None else store_of(self.model.get_base_model())

    def to(self, *args: Any, **kwargs: Any) -> "AdaptedModel":
        """Move or cast as ``nn.Module.to`` does, but leave what waits on the host there."""
        super().to(*args, **kwargs)
        if self.model is not None:
            for dtype in (one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)):
                cast_ends(self.model.get_base_model(), dtype)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "AdaptedModel":
        """Move or cast all but what the store holds, which is views of memory that stays where it is."""
        with self.left_out():
            return super()._apply(fn, recurse)

    def left_out(self) -> AbstractContextManager[None]:
        """A context in which the modules of the base lack the weights that the store holds."""
        return nullcontext() if self.store is None else self.store.left_out()

    @property
    def state_bytes(self) -> float:
        """Bytes of optimizer state for each trained parameter."""
        return self.optimizer.state_bytes

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of the batch's supervised tokens, a float32 scalar in nats."""
        assert self.model is not None
        if self.fast is not None:
            return self.fast.loss_sum(batch)
        if self.pads:
            batch = padded(batch, self.data.pad_id)
        return reference_loss(self.model.get_base_model(), self.family, batch)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters alone: the frozen base is read again from its own folder."""
        return {name: parameter.detach() for name, parameter in trained_parameters(self).items()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Put trained parameters back, all of them and nothing else.

        Raises:
            UserError: names or shapes differ from the configured adapter's.
        """
        check_same(trained_parameters(self), state_dict)
        put(self, {saved_name(name): tensor for name, tensor in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])
