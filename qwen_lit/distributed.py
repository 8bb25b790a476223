"""What several processes of one run have to agree on, and how none outlives the others."""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from qwen_lit.errors import UserError
from qwen_lit.signals import INTERRUPTS

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)
GRACE = 20.0
"""Seconds in which a process may end by itself once another is gone."""
REDUCTION: dict[str, Any] = {"bucket_cap_mb": 8, "gradient_as_bucket_view": True}
"""Options of DDP. A bucket of gradients is reduced beside the backward of the layers below it. Only the last one is
waited for, so buckets are small: three layers of a 7B with r=32. A gradient that was reduced lies in its bucket; until
then, what the earlier micro-batches of a step have added up lies beside it."""


def agree(trainer: L.Trainer, facts: dict[str, Any]) -> None:
    """Refuse to train where a rank would train something else.

    Args:
        trainer: its ranks all call this.
        facts: plain values by the name of the key they come from.

    Raises:
        UserError: a value differs between ranks; on every rank, with both values.
    """
    found = gathered(trainer, facts)
    for rank, theirs in enumerate(found):
        wrong = {key: value for key, value in theirs.items() if value != found[0].get(key)}
        if wrong:
            lines = "".join(f"\n  {key}: {found[0].get(key)} on rank 0, {wrong[key]} on rank {rank}" for key in wrong)
            raise UserError(
                f"the ranks of this run would train different things:{lines}\n"
                "Give all machines the same files, the same model and the same configuration."
            )


def gathered(trainer: L.Trainer, value: Any) -> list[Any]:
    """The ranks' values, in their order; a value can be pickled."""
    found = [value] * trainer.world_size
    if trainer.world_size > 1:
        dist.all_gather_object(found, value)
    return found


def least(trainer: L.Trainer, value: int) -> int:
    """The smallest of the ranks' values, so that all plan the same micro-batches."""
    if trainer.world_size == 1:
        return value
    number = torch.tensor(value, dtype=torch.int64, device=trainer.strategy.root_device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return int(number)


def watch_children(trainer: L.Trainer) -> None:
    """End this process soon after a rank that Lightning has started from it is lost.

    A collective waits for a dead rank up to its timeout of half an hour.
    """
    processes = getattr(trainer.strategy.launcher, "procs", None)
    if processes:
        threading.Thread(target=_watch_children, args=(processes,), name="watch-ranks", daemon=True).start()


def _watch_children(processes: list[Any]) -> None:
    while True:
        time.sleep(1.0)
        for number, process in enumerate(processes, 1):
            if process.poll():
                time.sleep(GRACE)
                asked = INTERRUPTS.received is not None and process.returncode in (130, 143)
                log.error(
                    "local rank %d ended with code %d, and this one cannot go on; what is saved is whole, go on with "
                    "--ckpt_path last",
                    number,
                    process.returncode,
                )
                for other in processes:
                    other.kill()
                os._exit(process.returncode if asked else 1)


def watch_parent() -> None:
    """End this process soon after the one that has started it: torchrun, or the first rank of a machine."""
    if int(os.environ.get("LOCAL_RANK", "0") or 0) > 0 or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch_parent, args=(os.getppid(),), name="watch-parent", daemon=True).start()


def _watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(GRACE)
    os._exit(1)


def reduce_trained_alone(module: torch.nn.Module) -> None:
    """Keep DDP from frozen parameters and buffers, which every rank has read from the same files.

    It would send the first rank's to all others before the first step, and write them into what stands for a layer
    that is away, which has no memory of its own.

    Args:
        module: that DDP will wrap.
    """
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    frozen += [name for name, _ in module.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, frozen)
