"""Optimizers: a table of those with a name, and any other by its class."""

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter, signature
from typing import Any, Literal, cast

import bitsandbytes.optim
import torch
from bitsandbytes.functional import get_paged
from torch import Tensor, nn

from qwen_lit.errors import UserError

OptimizerName = Literal["paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw"]
Groups = list[dict[str, Any]]
"""Parameter groups with ``params``, ``lr`` and ``weight_decay``."""
OptimizerClass = Callable[[Iterable[Any]], torch.optim.Optimizer]
"""An optimizer's class with its arguments, as LightningCLI makes it of ``{class_path, init_args}``."""
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


@dataclass(frozen=True)
class Optimizer:
    """An optimizer that has a name."""

    build: Callable[[Groups, tuple[float, float]], torch.optim.Optimizer]
    """Makes it, of the parameter groups and Adam's two betas."""
    state_bytes: float
    """Bytes of its states for each trained number."""


def built(name: str, optimizer: Optimizer, groups: Groups, betas: tuple[float, float]) -> torch.optim.Optimizer:
    """An optimizer over the adapter's parameters.

    Args:
        name: as of ``optimizer_of``.
        optimizer: as of ``optimizer_of``.
        groups: with their settings.
        betas: Adam's.

    Raises:
        UserError: it cannot be built over these.
    """
    try:
        return optimizer.build(groups, betas)
    except (TypeError, ValueError) as error:
        raise UserError(f"model.optimizer: {name} cannot train this adapter ({error}); give another.") from error


OPTIMIZERS: dict[str, Optimizer] = {
    "paged_adamw_8bit": Optimizer(lambda groups, betas: PagedAdamW8bit(groups, betas=betas), 2),
    "paged_adamw_32bit": Optimizer(lambda groups, betas: PagedAdamW32bit(groups, betas=betas), 8),
    "adamw_8bit": Optimizer(lambda groups, betas: bitsandbytes.optim.AdamW8bit(groups, betas=betas), 2),
    "adamw": Optimizer(lambda groups, betas: torch.optim.AdamW(groups, betas=betas), 8),
}
"""By the value of ``model.optimizer``; paged states can move to host memory when the GPU is full."""
TRIAL = 128
"""Rows and columns of the matrix on which the states of an unknown optimizer are counted."""


def optimizer_of(chosen: str | OptimizerClass, learning_rate: float, weight_decay: float) -> tuple[str, Optimizer]:
    """The name of an optimizer for logs and checkpoints, and how it is built.

    Args:
        chosen: ``model.optimizer``: a name of ``OPTIMIZERS``, or a class with its arguments.
        learning_rate: ``model.learning_rate``, which the parameter groups have.
        weight_decay: ``model.weight_decay``, which the parameter groups have too.

    Raises:
        UserError: a class is given arguments that the groups override, or cannot take a step.
    """
    if isinstance(chosen, str):
        return chosen, OPTIMIZERS[chosen]
    # LightningCLI gives a partial of a function of its own, which takes the class first.
    parts = (chosen.func, *chosen.args) if isinstance(chosen, partial) else (chosen,)
    kind = next((one for one in parts if isinstance(one, type)), parts[0])
    given_options = chosen.keywords if isinstance(chosen, partial) else {}
    name = public_name(kind)
    trial = nn.Parameter(torch.zeros(TRIAL, TRIAL))
    try:
        usual = type_defaults(kind)
        for key, ours, value in (("lr", "learning_rate", learning_rate), ("weight_decay",) * 2 + (weight_decay,)):
            given = given_options.get(key)
            if given is not None and given not in (usual.get(key), value):
                raise UserError(
                    f"model.optimizer: init_args.{key} is {given}, but every parameter group takes model.{ours} "
                    f"{value}; set that instead."
                )
        optimizer = chosen([trial])
        trial.grad = torch.ones_like(trial)
        optimizer.step()
    except (AssertionError, AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if name.startswith("bitsandbytes."):
            # Its kernels may be there for GPUs alone; two float32 states are the most that they keep.
            return name, Optimizer(lambda groups, betas: chosen(groups), 8)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.optimizer: {name} cannot train a matrix ({reason}); give another class, or one of "
            f"{', '.join(OPTIMIZERS)}."
        ) from error
    held = sum(one.nbytes for one in optimizer.state[trial].values() if isinstance(one, Tensor) and one.numel() > 1)
    return name, Optimizer(lambda groups, betas: chosen(groups), held / trial.numel())


def public_name(kind: Any) -> str:
    """The shortest path by which a class can be imported, such as ``torch.optim.Muon``."""
    module, name = kind.__module__, kind.__qualname__
    while "." in module and getattr(sys.modules.get(module.rpartition(".")[0]), name, None) is kind:
        module = module.rpartition(".")[0]
    return f"{module}.{name}"


def type_defaults(function: Callable[..., Any]) -> dict[str, Any]:
    """The default values of a callable's parameters by name."""
    parameters = signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not Parameter.empty}


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
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    factor: Callable[[int], float],
    settings: list[dict[str, Any]],
) -> None:
    """Give a resumed optimizer the peak learning rates and decays of the configuration.

    Args:
        optimizer: its groups hold what the checkpoint held.
        scheduler: over it, at the step it was resumed at.
        factor: on the learning rate at each step, by the limits of the configuration.
        settings: ``lr`` and ``weight_decay`` of each group.
    """
    scheduler.lr_lambdas = [factor] * len(settings)
    scheduler.base_lrs = [one["lr"] for one in settings]
    for group, one in zip(optimizer.param_groups, settings, strict=True):
        group["initial_lr"], group["weight_decay"] = one["lr"], one["weight_decay"]
        group["lr"] = one["lr"] * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


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
