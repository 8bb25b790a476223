"""Optimizers and learning-rate schedules by name."""

import math
from collections.abc import Callable
from typing import Any, Literal, cast

import bitsandbytes.optim
import torch
from bitsandbytes.functional import get_paged
from torch import Tensor, nn

OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw"]
ScheduleName = Literal["cosine", "linear", "constant"]
PAGED_NUMEL = 100_000
"""bitsandbytes pages states from this size on."""
SPARE = 2**29
"""Bytes free on a device from which nothing was moved to the host."""


class _OneWait:
    """bitsandbytes waits for the device after every parameter; its kernels run in order, so once a step is enough."""

    settled = False
    """A step has put all states on the device."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; returns the closure's result."""
        optimizer = cast(Any, self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not optimizer.initialized:
            optimizer.check_overrides()
            optimizer.to_gpu()
            optimizer.initialized = True
        device = None
        prefetch = self._may_have_moved()
        with torch.no_grad():
            for group_index, group in enumerate(optimizer.param_groups):
                for index, parameter in enumerate(group["params"]):
                    if parameter.grad is None:
                        continue
                    if not optimizer.state[parameter]:
                        optimizer.init_state(group, parameter, group_index, index)
                    if prefetch:
                        optimizer.prefetch_state(parameter)
                    optimizer.update_step(group, parameter, group_index, index)
                    device = parameter.device
        if device is not None and device.type == "cuda":
            # Paged states may still be on their way.
            torch.cuda.synchronize(device)
            self.settled = True
        return loss

    def _may_have_moved(self) -> bool:
        """Whether states may stand in host memory: asking for each of them costs more than the step itself.

        The driver moves them there when the device is full; torch keeps what it has once held, so what is free now
        is what was free at the peak.
        """
        if not (self.settled and torch.cuda.is_available()):
            return True
        return torch.cuda.mem_get_info()[0] < SPARE


class PagedAdamW8bit(_OneWait, bitsandbytes.optim.PagedAdamW8bit):  # type: ignore[misc]
    """bitsandbytes' paged AdamW with 8-bit states."""


class PagedAdamW32bit(_OneWait, bitsandbytes.optim.PagedAdamW32bit):  # type: ignore[misc]
    """bitsandbytes' paged AdamW with 32-bit states."""


def parameter_groups(
    model: nn.Module, learning_rate: float, weight_decay: float, lora_plus_ratio: float
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay.

    Biases, norms and other vectors are not decayed. LoRA+ (arXiv 2402.12354) gives every B ``lora_plus_ratio`` times
    the learning rate of A.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = learning_rate * (lora_plus_ratio if "lora_B" in name else 1.0)
            decay = weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": group, "lr": rate, "weight_decay": decay} for (rate, decay), group in groups.items()]


def build_optimizer(
    name: OptimizerName, groups: list[dict[str, Any]], betas: tuple[float, float]
) -> torch.optim.Optimizer:
    """AdamW over ``groups``: 8-bit or 32-bit states that can move to host memory, or torch's own."""
    if name == "paged_adamw_8bit":
        return PagedAdamW8bit(groups, betas=betas)
    if name == "paged_adamw_32bit":
        return PagedAdamW32bit(groups, betas=betas)
    return torch.optim.AdamW(groups, betas=betas)


def repage(optimizer: torch.optim.Optimizer) -> int:
    """Put the states of a paged bitsandbytes optimizer back into paged memory, where loading them has taken them from.

    Returns:
        How many tensors were moved; 0 for other optimizers and on the CPU.
    """
    if not getattr(optimizer, "is_paged", False):
        return 0
    moved = 0
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            value = state.get(name)
            if value is None or not parameter.is_cuda or value.numel() < PAGED_NUMEL or hasattr(value, "is_paged"):
                continue
            paged = get_paged(*value.shape, dtype=value.dtype, device=parameter.device)
            paged.copy_(value)
            optimizer.page_mng.paged_tensors.append(paged)  # type: ignore[attr-defined]
            state[name] = paged
            moved += 1
    if moved:
        optimizer.settled = False  # type: ignore[attr-defined]
    return moved


def configure_groups(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LambdaLR, settings: list[dict[str, Any]]
) -> None:
    """Give a resumed optimizer the peak learning rates and decays of the configuration.

    Args:
        optimizer: its groups hold what the checkpoint held.
        scheduler: over it, at the step it was resumed at.
        settings: ``lr`` and ``weight_decay`` of each group.
    """
    scheduler.base_lrs = [one["lr"] for one in settings]
    for group, one, factor in zip(optimizer.param_groups, settings, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["weight_decay"] = one["lr"], one["weight_decay"]
        group["lr"] = one["lr"] * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def schedule(name: ScheduleName, warmup_steps: int, total_steps: int | None) -> Callable[[int], float]:
    """The factor on the learning rate at a step: a linear warmup, then ``name`` down to zero at ``total_steps``.

    Without them, the rate stays up: nobody knows where the run ends.
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if name == "constant" or total_steps is None:
            return 1.0
        done = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1.0 - done if name == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))

    return factor


class _Managed:
    """Memory that host and device share, as the device sees it."""

    def __init__(self, tensor: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "data": (tensor.data_ptr(), False),
            "shape": (tensor.nbytes,),
            "typestr": "|u1",
            "version": 3,
        }


def as_device_sees(tensor: Tensor) -> Tensor:
    """One of bitsandbytes' paged tensors as a tensor of its device, which shares its memory.

    Copied from there it comes at once; read on the host, every page comes by itself.
    """
    device = torch.device("cuda", cast(Any, tensor).page_deviceid)
    return torch.as_tensor(_Managed(tensor), device=device).view(tensor.dtype).view(tensor.shape)
