"""The LightningModule: a 4-bit Qwen with LoRA, trained on the summed loss of supervised tokens."""

import logging
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from qwen_lit.checks import check_ranges
from qwen_lit.config import LoraSection, QuantizationSection
from qwen_lit.data.batches import Batch
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.distributed import agree, watch_children
from qwen_lit.engine.engine import FastEngine
from qwen_lit.errors import RunError, UserError
from qwen_lit.export.adapter import saved_name
from qwen_lit.hub import fetch, is_folder
from qwen_lit.hub_libraries import Hub
from qwen_lit.model.duration import check_limits, total_steps, warmup_steps
from qwen_lit.model.load import add_adapter, check_targets, load_base, load_config, shard_layers
from qwen_lit.model.loss import summed_loss
from qwen_lit.model.neftune import add_noise
from qwen_lit.model.optim import (
    OptimizerName,
    ScheduleName,
    build_optimizer,
    configure_groups,
    parameter_groups,
    repage,
    schedule,
)
from qwen_lit.model.resume import go_on, settings, shared
from qwen_lit.model.trained import find_adapter, tell_measured, weights
from qwen_lit.planner.choice import choose_engine
from qwen_lit.planner.plan import Plan, parse_bytes
from qwen_lit.quantization import Held, check_trained_whole, loaded_weights, planned_weights, usable

log = logging.getLogger(__name__)


class QwenModule(L.LightningModule):
    """A frozen Qwen base with a trained LoRA adapter."""

    def __init__(
        self,
        model_name_or_path: str,
        lora_config: LoraSection,
        quantization_config: QuantizationSection | None = None,
        learning_rate: float = 2e-4,
        optimizer: OptimizerName = "paged_adamw_8bit",
        lr_scheduler: ScheduleName = "cosine",
        warmup_ratio: float = 0.03,
        weight_decay: float = 0.0,
        adam_beta1: float = 0.9,
        adam_beta2: float = 0.999,
        lora_plus_ratio: float = 1.0,
        neftune_noise_alpha: float = 0.0,
        gradient_checkpointing: bool = True,
        engine: Literal["auto", "fast", "reference"] = "auto",
        memory_budget: str | None = None,
        max_skipped_steps: int = 10,
        shard_base: bool = False,
        init_adapter: str | None = None,
        hub: Hub = "huggingface",
    ) -> None:
        """Checks the settings; weights are read in ``configure_model``.

        Args:
            model_name_or_path: a local folder with the model's files, or a hub name.
            lora_config: PEFT's LoraConfig.
            quantization_config: transformers' BitsAndBytesConfig; null, or one with neither load_in_4bit nor
                load_in_8bit, trains LoRA on a bf16 base.
            learning_rate: peak learning rate.
            optimizer: paged_adamw_8bit, paged_adamw_32bit or adamw.
            lr_scheduler: cosine, linear or constant, after the warmup.
            warmup_ratio: share of all optimizer steps over which the learning rate rises.
            weight_decay: decoupled decay of matrices; never of biases and norms.
            adam_beta1: decay of the first moment.
            adam_beta2: decay of the second moment.
            lora_plus_ratio: learning rate of LoRA's B over that of A; 1 is plain LoRA.
            neftune_noise_alpha: NEFTune noise on the embeddings while training; 0 is off.
            gradient_checkpointing: recompute activations in backward: less memory, about a third slower. The fast
                engine does so only for as many layers as the memory asks for.
            engine: fast runs fused kernels and plans memory; reference runs PEFT's own path; auto is fast on CUDA
                where the model allows it.
            memory_budget: GPU memory the fast engine may use, as 8GiB; null is all that is free.
            max_skipped_steps: optimizer steps in a row whose loss or gradient is not finite, each skipped and its
                rows named, after which the run stops.
            shard_base: shard the frozen layers over the ranks, for a base that does not fit one card; needs
                trainer.strategy ddp and bnb_4bit_quant_storage bfloat16.
            init_adapter: an adapter folder or a checkpoint whose weights the new run starts from, with a fresh
                optimizer and schedule; its LoRA settings are taken over.
            hub: where a model that is not on this machine is fetched from: huggingface, or modelscope, which needs
                the extra of that name. A mirror is the environment's HF_ENDPOINT or MODELSCOPE_ENDPOINT.

        Raises:
            UserError: the model or a setting cannot work.
        """
        check_ranges("model", locals())
        super().__init__()
        check_ranges("model.lora_config", vars(lora_config))
        if shard_base and quantization_config and quantization_config.bnb_4bit_quant_storage != torch.bfloat16:
            raise UserError(
                "model.shard_base needs weights that shard; set "
                "model.quantization_config.bnb_4bit_quant_storage to bfloat16."
            )
        self.shard_base = shard_base
        self.name = str(Path(model_name_or_path).expanduser()) if is_folder(model_name_or_path) else model_name_or_path
        self.hub = hub
        self.lora_config = lora_config
        self.learning_rate = learning_rate
        self.optimizer_name: OptimizerName = optimizer
        self.schedule_name: ScheduleName = lr_scheduler
        self.warmup_ratio = warmup_ratio
        self.weight_decay = weight_decay
        self.betas = (adam_beta1, adam_beta2)
        self.lora_plus_ratio = lora_plus_ratio
        self.neftune_noise_alpha = neftune_noise_alpha
        self.gradient_checkpointing = gradient_checkpointing
        self.engine_name, self.fast, self.engine_description = engine, cast("FastEngine | None", None), ""
        self.plan: Plan | None = None
        self.memory_budget = parse_bytes(memory_budget) if memory_budget else None
        self.model: PeftModel | None = None
        # A run that goes on needs it no more.
        there = init_adapter and Path(init_adapter).expanduser().exists()
        self.init_adapter = find_adapter(init_adapter) if init_adapter and there else None
        self.run_config: dict[str, Any] = {}
        """The whole configuration of the run, as plain values."""
        self.initial_adapter: tempfile.TemporaryDirectory[str] | None = None
        self.folder = fetch(self.name, hub)
        """That holds the base's files: its config and tokenizer, and its weights once they are needed."""
        self.config = load_config(self.folder, self.name)
        self.quantization_config = usable(quantization_config, self.config)
        self.quantized: dict[str, Held] | None = None
        check_targets(self.config, lora_config)
        if lora_config.modules_to_save:
            check_trained_whole(self.held_weights(torch.device("cpu")), lora_config.modules_to_save)
        self.max_skipped_steps, self.skipped_steps, self.skipped_in_a_row = max_skipped_steps, 0, 0
        # Losses since the last optimizer step, kept on the device so that no micro-batch waits for the host.
        self.window: list[Tensor] = []
        self.window_tokens = 0
        self.last_batch = 0
        self.total_steps: int | None = 0
        """Optimizer steps of the run; None where it has no known end."""
        self.resumed_total: int | None = 0
        """As many as it had when the checkpoint was written; 0 where it does not say."""
        self.validated = torch.zeros(2)

    def setup(self, stage: str) -> None:
        """Make sure that all ranks are about to train the same.

        Raises:
            UserError: they are not, or the limits leave nothing to train.
        """
        data = cast(QwenDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        if stage == "fit":
            check_limits(self.trainer, data)
            told = settings(self)
            alike = {**shared(self.run_config), "the files of model.model_name_or_path": told["base"]}
            agree(self.trainer, {**data.state_dict(), **told["frozen"], **alike})
            watch_children(self.trainer)
        if stage == "validate":
            tell_measured(self, self.trainer, data)

    def configure_model(self) -> None:
        """Load the base on this rank's device and put the adapter on it."""
        if self.model is not None:
            return
        device = self.trainer.strategy.root_device
        sharded = self.shard_base and self.trainer.world_size > 1
        # Shards are moved to the device one layer at a time.
        base = load_base(self.folder, self.quantization_config, device, torch.device("cpu") if sharded else device)
        self.quantized = loaded_weights(base)
        self.model = add_adapter(base, self.lora_config, self.gradient_checkpointing)
        if self.init_adapter is not None:
            self._put(weights(self.init_adapter))
        if sharded:
            shard_layers(self.model, device)
        if str(self.lora_config.init_lora_weights).lower().startswith(("pissa", "olora")):
            # These change the base; the exported adapter is the difference from where it started.
            self.initial_adapter = tempfile.TemporaryDirectory(prefix="qwen_lit_")
            self.model.save_pretrained(self.initial_adapter.name, save_embedding_layers=False)
        if self.neftune_noise_alpha > 0:
            add_noise(base.get_input_embeddings(), self.neftune_noise_alpha)  # type: ignore[operator]
        data = cast(QwenDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        choice = choose_engine(self, self.trainer, data)
        self.fast, self.plan, self.engine_description = choice.fast, choice.plan, choice.told
        if sharded or self.host_embedding:
            # DDP reduces the adapter alone: shards differ from rank to rank, and an embedding on the CPU is no part.
            frozen = [name for name, p in self.named_parameters() if not p.requires_grad]
            frozen += [name for name, _ in self.named_buffers()]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def held_weights(self, device: torch.device) -> dict[str, Held]:
        """How the base's quantised weights are held, by name; before it is loaded, how they would be.

        Args:
            device: where it would be loaded.
        """
        if self.quantized is not None:
            return self.quantized
        return planned_weights(self.config, self.quantization_config, device)

    def plan_for(self, budget: int) -> None:
        """Plan the memory for another budget than that of the configuration; before ``configure_model``.

        Args:
            budget: bytes that the fast engine may use.
        """
        self.memory_budget = budget

    @property
    def host_embedding(self) -> bool:
        """Whether the plan has put the embedding on the CPU."""
        return self.plan is not None and self.plan.policies.offload_embedding

    def to(self, *args: Any, **kwargs: Any) -> "QwenModule":
        """As of any module, but an embedding that the plan has put on the CPU stays there."""
        if not self.host_embedding:
            return super().to(*args, **kwargs)
        embedding = cast(Any, self.model).base_model.model.get_input_embeddings()
        weight, embedding.weight = embedding.weight, None
        try:
            super().to(*args, **kwargs)
        finally:
            embedding.weight = weight
        for dtype in (one for one in (*args, *kwargs.values()) if isinstance(one, torch.dtype)):
            embedding.to(dtype)
        return self

    @property
    def state_bytes(self) -> int:
        """Of optimizer state for a trained number."""
        return 2 if self.optimizer_name == "paged_adamw_8bit" else 8

    def on_train_start(self) -> None:
        """What a resumed optimizer needs: paged memory, and the settings of this configuration, which may differ.

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
            scheduler = cast(Any, config.scheduler)
            scheduler.lr_lambdas = [factor] * len(optimizer.param_groups)
            configure_groups(optimizer, scheduler, self.group_settings)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the configuration."""
        counts = {"skipped_steps": self.skipped_steps, "total_steps": self.total_steps}
        checkpoint["settings"] = settings(self) | counts

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the configuration of the checkpoint with this one.

        Raises:
            UserError: the adapter or the optimizer is another, or the checkpoint is of weights alone.
        """
        if self.trainer.state.fn == "fit":
            data = cast(QwenDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
            self.skipped_steps, self.resumed_total = go_on(self, self.trainer, data, checkpoint)

    def loss_sum(self, batch: Batch) -> Tensor:
        """Summed negative log-likelihood of the batch's supervised tokens, a float32 scalar in nats."""
        assert self.model is not None
        if self.fast is not None:
            return self.fast.loss_sum(batch)
        causal = cast(Any, self.model.base_model).model
        hidden = causal.model(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
        ).last_hidden_state
        rows = hidden.flatten(0, 1).index_select(0, batch["target_index"])
        return summed_loss(causal.lm_head, rows, batch["targets"])

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """The summed loss of one micro-batch; its gradient is divided once the whole step's tokens are known."""
        loss = self.loss_sum(batch)
        self.window.append(loss.detach())
        self.window_tokens += batch["targets"].numel()
        self.last_batch = batch_index
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn the summed gradient into the mean over the step's supervised tokens, over all ranks.

        Lightning has divided each loss by ``accumulate_grad_batches`` and each gradient by the number of ranks; both
        are undone here, so that a last window that is not full weighs its tokens like any other. A step whose loss
        or gradient is not finite changes nothing: parameters without a gradient are left alone by every optimizer.
        """
        sums = torch.stack([torch.stack(self.window).sum(), self.window[0].new_tensor(self.window_tokens)])
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)
        factor = self.trainer.accumulate_grad_batches * self.trainer.world_size / sums[1].clamp(min=1)
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = [cast(Tensor, p.grad) for p in parameters]
        torch._foreach_mul_(gradients, factor)
        # The one wait for the device in a step: whether it may be taken is known only now.
        loss, tokens, norm = torch.stack([*sums, torch.nn.utils.get_total_norm(gradients)]).tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            self.log("train/loss", loss / max(tokens, 1), prog_bar=True)
            self.log("train/grad_norm", norm)
            # Later the schedule has moved on to the next step's.
            self.log("train/lr", optimizer.param_groups[0]["lr"])
            self.log("train/supervised_tokens", tokens)
        else:
            self._skip_step(optimizer, loss)
        self.log("train/skipped_steps", float(self.skipped_steps))
        self.window, self.window_tokens = [], 0

    def _skip_step(self, optimizer: torch.optim.Optimizer, loss: float) -> None:
        """Leave the parameters as they are, and say which rows were to blame.

        Raises:
            RunError: ``max_skipped_steps`` in a row.
        """
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        self.skipped_steps += 1
        self.skipped_in_a_row += 1
        data = cast(QwenDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        places = data.places(self.trainer.current_epoch, self.last_batch + 1 - len(self.window), self.last_batch)
        finite = torch.stack(self.window).isfinite().tolist()
        # A rank whose own losses are good has nothing to blame.
        every = all(finite) and (self.trainer.world_size == 1 or math.isfinite(loss))
        blamed = [row for rows, good in zip(places, finite, strict=False) if not good or every for row in rows]
        shown = ", ".join(blamed[:8]) + (f" and {len(blamed) - 8} more" if len(blamed) > 8 else "")
        what = "gradient" if math.isfinite(loss) else "loss"
        log.warning("step %d: the %s is not finite; the step is skipped (%s)", self.trainer.global_step, what, shown)
        if self.skipped_in_a_row >= self.max_skipped_steps:
            raise RunError(
                f"{self.skipped_in_a_row} optimizer steps in a row had a loss or gradient that is not finite, the "
                f"last with {shown}; look at these rows, or lower model.learning_rate {self.learning_rate}. The "
                "checkpoints hold the last good state."
            )

    def on_validation_epoch_start(self) -> None:
        """Start the sums over."""
        self.validated = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_index: int) -> None:
        """Add up loss and tokens, so that neither the batch size nor the number of ranks changes the mean."""
        self.validated += torch.stack([self.loss_sum(batch), torch.tensor(batch["targets"].numel()).to(self.device)])

    def on_validation_epoch_end(self) -> None:
        """Mean loss over all supervised tokens of all ranks, and its perplexity."""
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(self.validated)
        loss = (self.validated[0] / self.validated[1].clamp(min=1)).float()
        self.log("val/loss", loss, prog_bar=True)
        self.log("val/perplexity", loss.exp())

    def configure_optimizers(self) -> Any:
        """The named optimizer over the adapter's parameters, and its schedule, stepped at each optimizer step."""
        groups = parameter_groups(self, self.learning_rate, self.weight_decay, self.lora_plus_ratio)
        optimizer = build_optimizer(self.optimizer_name, groups, self.betas)
        self.group_settings = [{"lr": group["lr"], "weight_decay": group["weight_decay"]} for group in groups]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._schedule())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}

    def _schedule(self) -> Callable[[int], float]:
        """Over the steps that the run has by the limits of now."""
        data = cast(QwenDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]
        self.total_steps = total_steps(self.trainer, data)
        return schedule(self.schedule_name, warmup_steps(self.warmup_ratio, self.trainer, data), self.total_steps)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trained parameters alone: the frozen base is read again from its own folder."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Put trained parameters back, all of them and nothing else.

        Raises:
            UserError: names or shapes differ from the configured adapter's.
        """
        mine = {name: p for name, p in self.named_parameters() if p.requires_grad}
        wrong = sorted(set(mine) ^ set(state_dict))
        wrong += sorted(n for n in set(mine) & set(state_dict) if mine[n].shape != state_dict[n].shape)
        if wrong:
            raise UserError(
                f"the checkpoint's adapter differs from the configured one at {wrong[0]} and {len(wrong) - 1} more; "
                "resume with the lora_config it was trained with, or give another output_dir."
            )
        self._put({saved_name(name): tensor for name, tensor in state_dict.items()})
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Copy weights into the trained parameters.

        Args:
            tensors: by the names of an adapter's file.
        """
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(tensors[saved_name(name)])
