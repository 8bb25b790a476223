"""The summed loss and its normalisation."""

import torch
from torch.nn.functional import cross_entropy

from qwen_lit.model.loss import summed_loss
from qwen_lit.model.optim import parameter_groups


def test_chunks_give_the_loss_and_gradient_of_the_whole():
    torch.manual_seed(0)
    head = torch.nn.Linear(7, 31, bias=False)
    hidden = torch.randn(13, 7, requires_grad=True)
    targets = torch.randint(0, 31, (13,))
    whole = cross_entropy(head(hidden), targets, reduction="sum")
    expected = torch.autograd.grad(whole, hidden)[0]
    chunked = summed_loss(head, hidden, targets, chunk=5)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(torch.autograd.grad(chunked, hidden)[0], expected)


def test_no_supervised_row_gives_zero_with_a_graph():
    hidden = torch.zeros(0, 7, requires_grad=True)
    loss = summed_loss(torch.nn.Linear(7, 31), hidden, torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0.0


def test_biases_are_not_decayed_and_lora_plus_raises_b_alone():
    model = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(4, 2), "lora_B": torch.nn.Linear(2, 4, bias=False)})
    found = {(g["lr"], g["weight_decay"]): len(g["params"]) for g in parameter_groups(model, 1e-3, 0.1, 16.0)}
    assert found == {(1e-3, 0.1): 1, (1e-3, 0.0): 1, (1.6e-2, 0.1): 1}
