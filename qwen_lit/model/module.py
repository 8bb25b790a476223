"""The LightningModule: a 4-bit Qwen with LoRA, trained on the summed loss of supervised tokens."""

import logging
import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from qwen_lit.data.batches import Batch, join, padded
from qwen_lit.data.datamodule import QwenDataModule, data_of
from qwen_lit.distributed import agree, gathered, reduce_trained_alone, watch_children
from qwen_lit.engine.ends import cast_ends
from qwen_lit.engine.engine import FastEngine
from qwen_lit.errors import RunError
from qwen_lit.export.adapter import RESIDUAL_INITS, saved_name
from qwen_lit.export.folder import read_json
from qwen_lit.families.table import family_of
from qwen_lit.frozen.cache import ALONE, Ranks
from qwen_lit.frozen.loading import load_frozen
from qwen_lit.frozen.store import FrozenStore, disband, store_of
from qwen_lit.hub import fetch, is_folder
from qwen_lit.model.adapter_state import check_same, put, trained_parameters
from qwen_lit.model.base_files import check_base
from qwen_lit.model.duration import check_limits, check_validation_share, total_steps, warmup_steps
from qwen_lit.model.load import add_adapter, load_config
from qwen_lit.model.loss import reference_loss
from qwen_lit.model.neftune import add_noise
from qwen_lit.model.optim import built, configure_groups, optimizer_of, parameter_groups, repage
from qwen_lit.model.packing_check import check_packing
from qwen_lit.model.precision import full_precision
from qwen_lit.model.products import ProductsInUse
from qwen_lit.model.resume import go_on, settings, shared, stored
from qwen_lit.model.schedules import WITHOUT_WARMUP, schedule
from qwen_lit.model.settings import ModelSettings
from qwen_lit.model.step import StepSums, clip_gradients, first_of
from qwen_lit.model.targets import settle_targets
from qwen_lit.model.trained import find_adapter, log_measured, weights
from qwen_lit.names import expanded
from qwen_lit.planner.choice import choose_engine
from qwen_lit.planner.plan import Plan, parse_bytes
from qwen_lit.planner.settle import hold_all, reads_base
from qwen_lit.quantization import Held, check_trained_whole, loaded_weights, planned_weights, usable
from qwen_lit.run import Run
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)


class QwenModule(L.LightningModule):
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
        self.products = ProductsInUse.of(settings.products, None)
        self.engine_description = ""
        # A batch is an optimizer step: ``training_step`` computes all of it.
        self.automatic_optimization = False
        self.sums: StepSums | None = None
        """What the forward passes of the optimizer step under way have found; None between two steps."""
        self.skipped_steps, self.skipped_in_a_row = 0, 0
        self.total_steps: int | None = 0
        """Optimizer steps of the run; None where it has no known end."""
        self.resumed_total: int | None = 0
        """``total_steps`` of the run when its checkpoint was written: None for no known end, 0 where the file does not
        say."""
        self.validated = torch.zeros(2)

    def setup(self, stage: str) -> None:
        """Make sure that all ranks are about to train the same.

        Raises:
            UserError: they are not, or the limits leave nothing to train.
        """
        data = self.data
        if stage == "fit":
            check_limits(self.trainer, data)
            own = settings(self)
            alike = {**shared(self.run.config), "the files of model.model_name_or_path": own["base"]}
            agree(self.trainer, {**data.state_dict(), **own["frozen"], **alike})
            watch_children(self.trainer)
        if stage == "validate":
            log_measured(self.name, self.run.checkpoint or self.init_adapter, data)
            check_validation_share(self.trainer, data)

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
        ranks = Ranks(partial(gathered, trainer), trainer.global_rank, trainer.global_rank - trainer.local_rank)
        base = self.load_base(device, ranks)
        self.quantized = loaded_weights(base)
        if reason := reads_base(self.lora_config):
            hold_all(base, f"model.lora_config has {reason}")
        if str(self.lora_config.init_lora_weights).lower().startswith(RESIDUAL_INITS):
            disband(base)
        self.model = add_adapter(base, self.lora_config, self.settings.gradient_checkpointing)
        if self.init_adapter is not None:
            put(self, weights(self.init_adapter))
        if str(self.lora_config.init_lora_weights).lower().startswith(("pissa", "olora")):
            # These change the base; the exported adapter is the difference from where it started.
            self.initial_adapter = tempfile.TemporaryDirectory(prefix="qwen_lit_")
            self.model.save_pretrained(self.initial_adapter.name, save_embedding_layers=False)
        if self.settings.neftune_noise_alpha > 0:
            add_noise(base.get_input_embeddings(), self.settings.neftune_noise_alpha)  # type: ignore[operator]
        then = stored(self.run.checkpoint)
        self.products = ProductsInUse.of(self.settings.products, then.get("products"))
        choice = choose_engine(self, self.trainer, self.data, then.get("micro_batches_at_once"))
        self.fast, self.plan, self.engine_description = choice.fast, choice.plan, choice.description
        if choice.refused is not None:
            self.leave_products(choice.refused)
        if self.store is not None and (self.fast is None or self.store.placing is None):
            hold_all(base, f"the engine is {choice.description}, which streams nothing")
        if self.store is not None:
            reduce_trained_alone(self)

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
    def pads(self) -> bool:
        """Whether each document is computed in a padded row of its own: on PEFT's path, where they are not packed."""
        return self.fast is None and not self.data.settings.packing

    def computed_tokens(self, batch: Batch) -> int:
        """Tokens that are computed for a micro-batch, those of its padding included."""
        return (len(batch["cu_seqlens"]) - 1) * batch["max_seqlen"] if self.pads else batch["input_ids"].numel()

    @property
    def store(self) -> FrozenStore | None:
        """What holds the base's frozen linears; None where their modules do, or nothing is loaded."""
        return None if self.model is None else store_of(self.model.get_base_model())

    def to(self, *args: Any, **kwargs: Any) -> "QwenModule":
        """Move or cast as ``nn.Module.to`` does, but leave what waits on the host there."""
        super().to(*args, **kwargs)
        if self.model is not None:
            for dtype in (one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)):
                cast_ends(self.model.get_base_model(), dtype)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "QwenModule":
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

    def on_fit_start(self) -> None:
        """Look whether documents that are computed end to end keep apart.

        Raises:
            UserError: they do not.
        """
        if not self.pads:
            check_packing(self)

    def on_train_start(self) -> None:
        """Give a resumed optimizer its paged memory and the settings of this configuration, which may differ.

        Lightning has put its states on the device by now, and its learning rates back to those of the checkpoint.
        """
        if self.trainer.world_size > 1 and not self.trainer.global_step:
            # Ranks train other rows, and so drop out other numbers.
            torch.manual_seed(torch.initial_seed() + self.trainer.global_rank)
        factor = self._schedule()
        if self.resumed_total not in (0, self.total_steps):
            log.warning(
                "the run had %s optimizer steps until here, and has %s from here on; the learning rate follows",
                self.resumed_total or "any number of",
                self.total_steps or "any number of",
            )
        for optimizer, config in zip(self.trainer.optimizers, self.trainer.lr_scheduler_configs, strict=True):
            repage(optimizer)
            configure_groups(optimizer, cast(LambdaLR, config.scheduler), factor, self.group_settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the settings and the step counts, which a resumed run is compared with, the products in use and the
        prompts' form."""
        counts = {"skipped_steps": self.skipped_steps, "total_steps": self.total_steps}
        form, products = self.data.form(), self.products.plain()
        told = {"prompt_form": asdict(form) if form else None, "products": products}
        checkpoint["settings"] = settings(self) | counts | told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the configuration of the checkpoint with this one.

        Raises:
            UserError: the adapter or the optimizer is another, or the checkpoint is of weights alone.
        """
        if self.trainer.state.fn == "fit":
            self.skipped_steps, self.resumed_total = go_on(self, self.trainer, checkpoint)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of the batch's supervised tokens, a float32 scalar in nats."""
        assert self.model is not None
        if self.fast is not None:
            return self.fast.loss_sum(batch)
        if self.pads:
            batch = padded(batch, self.data.pad_id)
        return reference_loss(self.model.get_base_model(), self.family, batch)

    def training_step(self, step: list[Batch], number: int) -> Tensor:
        """One optimizer step on its micro-batches; returns its mean loss over the supervised tokens of all ranks.

        The step's tokens are counted before anything is computed, so that each loss is divided where it is made:
        micro-batches, ranks and a last step that is not full weigh their tokens alike. Lightning's autocast and
        default dtype hold for the forward pass alone, as they do where Lightning optimizes by itself.
        """
        optimizer, scheduler = cast(Any, self.optimizers()), cast(Any, self.lr_schedulers())
        ranks, at_once, losses = self.trainer.world_size, self.micro_batches_at_once, []
        counted = sum(batch["targets"].numel() for batch in step)
        tokens = torch.tensor(counted, dtype=torch.float32, device=self.device)
        if ranks > 1:
            torch.distributed.all_reduce(tokens)
        # DDP takes the mean of the ranks' gradients, where their sum is wanted.
        share = ranks / tokens.clamp(min=1)
        for at in range(0, len(step), at_once):
            last = at + at_once >= len(step)
            strategy = cast(Any, self.trainer.strategy)
            with nullcontext() if last or ranks == 1 else strategy.block_backward_sync():
                loss = self.loss_sum(join(step[at : at + at_once]))
                with full_precision(self.device):
                    self.manual_backward(loss * share)
            losses.append(loss.detach())
        self.sums = StepSums(number, losses, at_once, tokens)
        with full_precision(self.device):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return torch.stack(losses).sum() / tokens.clamp(min=1)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Look whether the step may be made, log it and clip its gradient, which is not scaled any more.

        A step whose loss or gradient is not finite changes nothing: parameters without a gradient are left alone by
        every optimizer.
        """
        assert self.sums is not None
        sums, self.sums = self.sums, None
        total = torch.stack(sums.losses).sum()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(total)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        # The one wait for the device in a step: whether it may be made is known only now.
        loss, tokens, length = torch.stack([total, sums.tokens, norm.float()]).tolist()
        if math.isfinite(loss) and math.isfinite(length):
            self.skipped_in_a_row = 0
            self.log("train/loss", loss / max(tokens, 1), prog_bar=True)
            self.log("train/grad_norm", length)
            # Later the schedule has moved on to the next step's.
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            self.log("train/supervised_tokens", tokens)
            options = options_of(self.trainer)
            clip_gradients(parameters, norm, options.clip_value, options.gradient_clip_algorithm)
        else:
            self._skip_step(optimizer, loss, sums)
        self.log("train/skipped_steps", float(self.skipped_steps))

    def _skip_step(self, optimizer: torch.optim.Optimizer, loss: float, sums: StepSums) -> None:
        """Leave the parameters as they are, and say which rows were to blame.

        Args:
            optimizer: of the step.
            loss: summed over all ranks.
            sums: of this rank.

        Raises:
            RunError: ``max_skipped_steps`` in a row.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        places = self.data.places(self.trainer.current_epoch, sums.number)
        alone = self.trainer.world_size == 1 or math.isfinite(loss)
        shown, what = first_of(sums.blamed(places, alone)), "gradient" if math.isfinite(loss) else "loss"
        log.warning("step %d: the %s is not finite; the step is skipped (%s)", self.trainer.global_step, what, shown)
        if self.skipped_in_a_row >= self.settings.max_skipped_steps:
            raise RunError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite, the "
                f"last with {shown}; look at these rows, or lower model.learning_rate {self.settings.learning_rate}. "
                "The checkpoints hold the last good state."
            )

    def on_validation_epoch_start(self) -> None:
        """Reset the summed validation loss and the counted tokens."""
        self.validated = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, step: list[Batch], number: int) -> None:
        """Add up loss and tokens, so that neither the batch size nor the number of ranks changes the mean."""
        for at in range(0, len(step), self.micro_batches_at_once):
            batch = join(step[at : at + self.micro_batches_at_once])
            counted = torch.tensor(batch["targets"].numel(), device=self.device)
            self.validated += torch.stack([self.loss_sum(batch), counted])

    def on_validation_epoch_end(self) -> None:
        """Mean loss over all supervised tokens of all ranks, and its perplexity."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.validated)
        loss = (self.validated[0] / self.validated[1].clamp(min=1)).float()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", loss.exp())

    def configure_optimizers(self) -> Any:
        """The named optimizer over the adapter's parameters, and its schedule, which ``training_step`` steps."""
        groups = parameter_groups(
            self, self.settings.learning_rate, self.settings.weight_decay, self.settings.lora_plus_ratio
        )
        optimizer = built(self.optimizer_name, self.optimizer, groups, self.settings.betas)
        self.group_settings = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in groups]
        scheduler = LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def _schedule(self) -> Callable[[int], float]:
        """The factor on the learning rate at each step, over the steps that the limits of this configuration allow."""
        self.total_steps = total_steps(self.trainer, self.data)
        warmup, given = warmup_steps(self.warmup_ratio, self.trainer, self.data), self.settings
        options = given.lr_scheduler_kwargs
        return schedule(given.lr_scheduler, warmup, self.total_steps, given.learning_rate, options)

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
