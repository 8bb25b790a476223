"""Gradients are reduced beside the backward of the layers below theirs."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qwen_lit.distributed import REDUCTION, reduce_trained_alone
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies, Policy
from tests.engine.test_engine import ALL, adapted, batch

LAYERS = 3


class Wrapped(nn.Module):
    """What DDP wraps."""

    def __init__(self, engine):
        super().__init__()
        self.engine, self.model = engine, engine.model

    def forward(self, one):
        return self.engine.loss_sum(one)


@pytest.fixture
def alone(tmp_path):
    """A group of one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("policy", [Policy.KEEP, Policy.RECOMPUTE, Policy.OFFLOAD])
def test_a_bucket_is_reduced_before_the_layers_below_it_have_gradients(alone, policy, monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 0)
    wrapped, seen = Wrapped(FastEngine(adapted("qwen2", target_modules=ALL), Policies((policy,) * LAYERS))), []
    reduce_trained_alone(wrapped)

    def reduced(state, bucket):
        seen.append("reduced")
        done = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    # A bucket is as large as a layer's gradients; torch begins with one of its own size.
    size = sum(p.numel() for p in wrapped.parameters() if p.requires_grad) * 4 // LAYERS
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", size)
    ddp = DistributedDataParallel(wrapped, **{**REDUCTION, "bucket_cap_mb": size / 2**20})
    ddp.register_comm_hook(None, reduced)
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            number = int(name.split("layers.")[1].split(".")[0])
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: seen.append(number))
    # In the first backward DDP learns in which order gradients come.
    for _ in range(2):
        seen.clear()
        ddp(batch(True)).backward()
    layers = [one for one in seen if one != "reduced"]
    assert layers == sorted(layers, reverse=True)
    # Those of the last layer are on their way when the first one's come.
    assert seen.count("reduced") >= LAYERS and seen.index("reduced") < seen.index(0) and seen[-1] == "reduced"
