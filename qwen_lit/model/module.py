"""The LightningModule: how a 4-bit Qwen with LoRA learns, on the summed loss of supervised tokens."""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from qwen_lit.data.batches import Batch, join
from qwen_lit.distributed import agree, watch_children
from qwen_lit.errors import RunError
from qwen_lit.model.adapted import AdaptedModel
from qwen_lit.model.duration import check_limits, check_validation_share, total_steps, warmup_steps
from qwen_lit.model.optim import built, configure_groups, parameter_groups, repage
from qwen_lit.model.packing_check import check_packing
from qwen_lit.model.precision import full_precision
from qwen_lit.model.resume import go_on, settings, shared
from qwen_lit.model.schedules import schedule
from qwen_lit.model.settings import ModelSettings
from qwen_lit.model.step import StepSums, clip_gradients, first_of
from qwen_lit.model.trained import log_measured
from qwen_lit.run import Run
from qwen_lit.seams import options_of

log = logging.getLogger(__name__)


class QwenModule(AdaptedModel):
    """An ``AdaptedModel`` that is trained and validated."""

    def __init__(self, settings: ModelSettings, run: Run | None = None) -> None:
        """As of ``AdaptedModel``.

        Args:
            settings: the section ``model``.
            run: whose configuration is kept in checkpoints; None where no command is run.
        """
        super().__init__(settings, run)
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
        # The first backward is the first to need the sum, so a rank computes while the others come to this step.
        counting = torch.distributed.all_reduce(tokens, async_op=True) if ranks > 1 else None

        def share() -> Tensor:
            if counting is not None:
                counting.wait()
            # DDP takes the mean of the ranks' gradients, where their sum is wanted.
            return ranks / tokens.clamp(min=1)

        for at in range(0, len(step), at_once):
            losses.append(self._add_gradients(join(step[at : at + at_once]), share, at + at_once >= len(step)))
        self.sums = StepSums(number, losses, at_once, tokens)
        with full_precision(self.device):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        return torch.stack(losses).sum() / tokens.clamp(min=1)

    def _add_gradients(self, batch: Batch, share: Callable[[], Tensor], last: bool) -> Tensor:
        """Add the gradient of one forward pass to that of the step; returns its summed loss.

        Args:
            batch: of the pass.
            share: gives what the loss is multiplied by, a scalar; it may wait for other ranks.
            last: no other pass of the step follows, so that ranks add their gradients up.
        """
        graphs, several = self.graphs, self.trainer.world_size > 1
        if graphs is None:
            return self._add_by_autograd(batch, share, several and not last)
        graphs.attach()
        taken = graphs.take(batch)
        loss = graphs.add_gradients(batch, share()) if taken else self._add_by_autograd(batch, share, several)
        if several and last:
            graphs.reduce()
        return loss

    def _add_by_autograd(self, batch: Batch, share: Callable[[], Tensor], alone: bool) -> Tensor:
        """``_add_gradients`` of a pass that is launched kernel by kernel.

        Args:
            batch: as of ``_add_gradients``.
            share: as of ``_add_gradients``.
            alone: DDP leaves this rank's gradients as they are.
        """
        with cast(Any, self.trainer.strategy).block_backward_sync() if alone else nullcontext():
            loss = self.loss_sum(batch)
            with full_precision(self.device):
                self.manual_backward(loss * share())
        return loss.detach()

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
