"""Learning-rate schedules: transformers' own, by its names."""

from collections.abc import Callable
from typing import Any, Literal

from qwen_lit.errors import UserError

ScheduleName = Literal[
    "cosine",
    "linear",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "polynomial",
    "inverse_sqrt",
    "warmup_stable_decay",
]
"""The schedules of ``transformers.SchedulerType`` whose factor depends on the number of the step alone."""
ENDLESS = ("constant", "constant_with_warmup", "inverse_sqrt")
"""Schedules that need no last step."""
WITHOUT_WARMUP = ("constant",)


def schedule(
    name: ScheduleName,
    warmup_steps: int,
    total_steps: int | None,
    learning_rate: float = 1.0,
    options: dict[str, Any] | None = None,
) -> Callable[[int], float]:
    """The factor on the learning rate at each optimizer step, counted from 0.

    Args:
        name: as ``transformers.get_scheduler`` takes it.
        warmup_steps: steps over which the rate rises from 0.
        total_steps: of the run; None where it has no known end.
        learning_rate: the peak, to which a smallest rate in ``options`` is put in relation.
        options: ``lr_scheduler_kwargs``: arguments of this schedule alone.

    Raises:
        UserError: the schedule does not take these options, or needs a last step and there is none.
    """
    # The names are asked for without a model, where nobody waits for these libraries.
    import torch
    from transformers import get_scheduler

    try:
        # A schedule reads nothing of its optimizer but the peak rate.
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=learning_rate)
        scheduler = get_scheduler(name, optimizer, warmup_steps, total_steps, options)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).replace("get_wsd_schedule()", "warmup_stable_decay").split())
        raise UserError(
            f"model.lr_scheduler {name} with model.lr_scheduler_kwargs {options or {}}: {reason}."
        ) from error
    (factor,) = scheduler.lr_lambdas
    return lambda step: float(factor(step))
