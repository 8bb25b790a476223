"""Optimizers by name and by class: what they are, what their states take, and what cannot train."""

from functools import partial
from typing import get_args

import bitsandbytes.optim
import pytest
import torch

from qwen_lit.errors import UserError
from qwen_lit.model.optim import OPTIMIZERS, OptimizerName, optimizer_of


def matrix():
    parameter = torch.nn.Parameter(torch.zeros(256, 256))
    parameter.grad = torch.randn_like(parameter)
    return parameter


def groups_of(parameter):
    return [{"params": [parameter], "lr": 1e-3, "weight_decay": 0.5}]


def test_every_name_of_the_configuration_is_in_the_table_and_no_other():
    assert set(get_args(OptimizerName)) == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_named_optimizer_is_adamw_with_these_settings_and_as_many_bytes_of_states_as_the_table_says(name):
    parameter = matrix()
    optimizer = OPTIMIZERS[name].build(groups_of(parameter), (0.7, 0.8))
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], tuple(group["betas"])) == (1e-3, 0.5, (0.7, 0.8))
    assert "AdamW" in type(optimizer).__name__
    optimizer.step()
    states = [value for value in optimizer.state[parameter].values() if isinstance(value, torch.Tensor)]
    held = sum(value.nbytes for value in states if value.numel() > 256)
    # Scales of the blocks of 8-bit states come on top.
    assert held / parameter.numel() == pytest.approx(OPTIMIZERS[name].state_bytes, rel=0.05)


@pytest.mark.parametrize(
    ("chosen", "name", "state_bytes"),
    [
        (partial(torch.optim.Muon, momentum=0.9), "torch.optim.Muon", 4),
        (partial(torch.optim.SGD), "torch.optim.SGD", 0),
        (partial(torch.optim.SGD, momentum=0.9), "torch.optim.SGD", 4),
        (partial(torch.optim.Adam), "torch.optim.Adam", 8),
        (partial(torch.optim.Adam, amsgrad=True), "torch.optim.Adam", 12),
    ],
)
def test_the_states_of_any_other_optimizer_are_counted_on_a_trial(chosen, name, state_bytes):
    found, optimizer = optimizer_of(chosen, 1e-3, 0.0)
    assert found == name and optimizer.state_bytes == state_bytes
    parameter = matrix()
    built = optimizer.build(groups_of(parameter), (0.9, 0.999))
    assert type(built) is chosen.func and built.param_groups[0]["lr"] == 1e-3
    assert all(built.param_groups[0][key] == value for key, value in chosen.keywords.items())


def test_an_optimizer_of_bitsandbytes_is_taken_by_its_class():
    name, optimizer = optimizer_of(partial(bitsandbytes.optim.Lion8bit, betas=(0.8, 0.9)), 1e-3, 0.0)
    assert name == "bitsandbytes.optim.Lion8bit"
    assert optimizer.build(groups_of(matrix()), (0, 0)).param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (partial(torch.optim.SGD, lr=0.5), "init_args.lr is 0.5, but every parameter group takes model.learning_rate"),
        (partial(torch.optim.AdamW, weight_decay=0.3), "model.weight_decay 0.0; set that instead"),
        (partial(torch.optim.SparseAdam), "cannot train a matrix"),
        (partial(torch.optim.LBFGS), "cannot train a matrix"),
        (partial(torch.optim.AdamW, betas=(1.5, 0.9)), "cannot train a matrix"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused_before_the_model_is_loaded(chosen, words):
    with pytest.raises(UserError) as caught:
        optimizer_of(chosen, 1e-3, 0.0)
    assert words in " ".join(str(caught.value).split())
