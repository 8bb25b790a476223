"""Schedules of the learning rate by transformers' names, each beside its own formula."""

import math
from typing import get_args

import pytest
from transformers import SchedulerType

from qwen_lit.errors import UserError
from qwen_lit.model.schedules import ENDLESS, ScheduleName, schedule

WARMUP, TOTAL = 10, 100
OPTIONS = {
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine_with_min_lr": {"min_lr": 2e-5},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "polynomial": {"lr_end": 2e-5, "power": 2.0},
    "warmup_stable_decay": {"num_decay_steps": 40, "min_lr_ratio": 0.1},
}


def done(step):
    return (step - WARMUP) / (TOTAL - WARMUP)


def wave(share):
    return 0.5 * (1 + math.cos(math.pi * share))


FORMULAS = {
    "cosine": lambda step: wave(done(step)),
    "linear": lambda step: 1 - done(step),
    "constant": lambda step: 1.0,
    "constant_with_warmup": lambda step: 1.0,
    "cosine_with_restarts": lambda step: wave((2 * done(step)) % 1.0) if done(step) < 1 else 0.0,
    "cosine_with_min_lr": lambda step: 0.1 + 0.9 * wave(done(step)),
    "cosine_warmup_with_min_lr": lambda step: 0.1 + 0.9 * wave(done(step + 1)),
    "polynomial": lambda step: 0.1 + 0.9 * (1 - done(step)) ** 2,
    "inverse_sqrt": lambda step: math.sqrt(WARMUP / step),
    "warmup_stable_decay": lambda step: 1.0 if step < 60 else 0.1 + 0.9 * wave((step - 60) / 40),
}

RISING = {
    "constant": lambda step: 1.0,
    "cosine_warmup_with_min_lr": lambda step: (step + 1) / WARMUP,
    "warmup_stable_decay": lambda step: 0.1 + 0.9 * step / WARMUP,
}
"""Where the way to the peak is another than a straight line from 0."""


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_a_schedule_warms_up_and_follows_its_formula(name):
    factor = schedule(name, WARMUP, TOTAL, 2e-4, OPTIONS.get(name))
    rising = [factor(step) for step in range(WARMUP)]
    wanted = RISING.get(name, lambda step: step / WARMUP)
    assert rising == pytest.approx([wanted(step) for step in range(WARMUP)])
    assert [factor(step) for step in range(WARMUP, TOTAL)] == pytest.approx(
        [FORMULAS[name](step) for step in range(WARMUP, TOTAL)], abs=1e-9
    )


def test_every_schedule_of_transformers_is_here_that_follows_the_step_alone():
    assert {one.value for one in SchedulerType} - set(get_args(ScheduleName)) <= {"reduce_lr_on_plateau", "greedy"}


@pytest.mark.parametrize("name", get_args(ScheduleName))
def test_without_a_last_step_only_some_schedules_can_run(name):
    if name in ENDLESS:
        factor = schedule(name, WARMUP, None)
        assert [factor(step) for step in (WARMUP, 1000, 10**6)] == pytest.approx(
            [FORMULAS[name](step) for step in (WARMUP, 1000, 10**6)], rel=1e-6
        )
    else:
        with pytest.raises(UserError, match=f"model.lr_scheduler {name}"):
            schedule(name, WARMUP, None, options=OPTIONS.get(name, {}))


@pytest.mark.parametrize(
    ("name", "options"),
    [("cosine", {"min_lr": 1e-5}), ("warmup_stable_decay", None), ("cosine_with_min_lr", None)],
)
def test_options_that_a_schedule_does_not_take_or_misses_are_named(name, options):
    with pytest.raises(UserError, match=f"model.lr_scheduler {name} with model.lr_scheduler_kwargs"):
        schedule(name, WARMUP, TOTAL, 2e-4, options)
