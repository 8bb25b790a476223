"""Whether the link to the host keeps up with the plan: looked at every so many steps of a run that copies over it."""

import logging
import time
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from qwen_lit.data.batches import Batch
from qwen_lit.distributed import least
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.planner import Planned

log = logging.getLogger(__name__)
STEPS = 10
"""Optimizer steps over which waiting is added up; twice as many after each measurement that has changed nothing."""
SHARE = 0.05
"""Share of a step's time, beyond what the plan expects, for which the device may wait for copies."""
PARTS = 10**6
"""A share is told to other ranks as so many parts of a whole."""


class LinkGuard(Callback):
    """Adds up for how long the device waits for copies to and from the host. Where that is more than the plan expects,
    all ranks measure the link at once, between two steps, and go on with a plan for the link as it is. What is
    computed stays the same, bit for bit."""

    def __init__(self) -> None:
        self.every, self.steps = STEPS, 0
        self.began, self.seconds = 0.0, 0.0
        """When the step under way began, and the time of those that are added up, in seconds."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: list[Batch], batch_idx: int
    ) -> None:
        """Start the clock of the step."""
        self.began = time.perf_counter()
        self._watch(cast(QwenModule, pl_module), True)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: list[Batch], batch_idx: int
    ) -> None:
        """Look at the steps that are added up, when they are enough. All ranks do at the same steps."""
        module = cast(QwenModule, pl_module)
        self._watch(module, False)
        self.seconds, self.steps = self.seconds + time.perf_counter() - self.began, self.steps + 1
        if self.steps >= self.every and copies(module):
            assert module.fast is not None
            mine = module.fast.waits.take() / max(self.seconds, 1e-9)
            self._judge(trainer, module, -least(trainer, -int(mine * PARTS)) / PARTS)
            self.steps, self.seconds = 0, 0.0

    def _watch(self, module: QwenModule, on: bool) -> None:
        """Note waits, or not: those of a validation are nothing that a plan is made for."""
        if module.fast is not None:
            module.fast.waits.on = on and copies(module)

    def _judge(self, trainer: L.Trainer, module: QwenModule, waited: float) -> None:
        """Plan anew where the device has waited too long.

        Args:
            trainer: of the run.
            module: with its plan.
            waited: share of the time, of the rank that has waited longest.
        """
        choice, plan, fast = module.choice, module.plan, module.fast
        assert choice is not None and choice.planner is not None and choice.work is not None
        assert plan is not None and fast is not None
        planner = choice.planner
        expected = planner.waiting(choice.work, plan)
        if waited <= expected + SHARE:
            return
        before = planner.host.rate
        found = planner.again(choice.work, Planned(fast, plan))
        changed = found.plan is not plan
        self.every = STEPS if changed else 2 * self.every
        module.use(found)
        if trainer.is_global_zero:
            then = f"from step {trainer.global_step + 1} on: {module.engine_description}"
            log.info(
                "copies to and from the host held up %.0f %% of the time (%.0f %% planned), with the link at %.0f %% "
                "of the rate that was planned for; %s",
                *(100 * waited, 100 * expected, 100 * planner.host.rate / max(1, before)),
                then if changed else "the plan stays",
            )


def copies(module: QwenModule) -> bool:
    """Whether the plan in use copies over the link in each step."""
    plan = module.plan
    return plan is not None and bool(plan.policies.on_host or plan.policies.streamed)
