"""What computes linear attention: flash-linear-attention's kernels where they are right, PyTorch everywhere else.

transformers takes the kernels wherever the package is installed. Here they are not taken on a CPU, nor with a Triton
that compiles them wrongly, and only if a layer's outputs and gradients are those of PyTorch.
"""

import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from qwen_lit.errors import shortened
from qwen_lit.hardware import product_dtype
from qwen_lit.model.documents import linear_mixers

RULE, CONVOLUTION = "torch_chunk_gated_delta_rule", "causal_conv1d_fn"
FUNCTIONS = (RULE, "torch_recurrent_gated_delta_rule", CONVOLUTION, "causal_conv1d_update")
"""Of transformers' modelling files: each calls a kernel where its package is installed."""
PACKAGE, KERNELS = "flash-linear-attention", "fla.ops.gated_delta_rule"
WRONG = ((3, 4, 0), (3, 7, 1))
"""Versions of Triton, from and to before, whose code on Hopper computes wrong gradients of the gated delta rule
(flash-linear-attention, issue 640)."""
HOPPER = 9
TOKENS = 150
"""Of the trial: two chunks of the delta rule and a part of one."""
TOLERANCE = 0.05
"""Norm of a difference as a share of the norm, which bf16 stays far below."""

_theirs: dict[tuple[str, str], Callable[..., Any]] = {}
"""transformers' own choice, by the name of the modelling file and of the function."""


@dataclass(frozen=True)
class Sizes:
    """The mixers of a model."""

    file: str
    """The module with transformers' functions."""
    key_heads: int
    heads: int
    key_size: int
    value_size: int
    kernel: int
    """Tokens that the convolution sees."""

    @classmethod
    def of(cls, mixer: Any) -> "Sizes":
        """Of a mixer, as transformers builds it."""
        sizes = (mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, mixer.conv_kernel_size)
        return cls(type(mixer).__module__, *sizes)


def choose_delta_rule(model: nn.Module, device: torch.device) -> str:
    """Let the linear attention of a model be computed by what is fast and right on a device.

    The choice is one of the process: it holds for all models of the family, until it is made again.

    Args:
        model: for causal language modelling, as transformers builds it.
        device: where it computes.

    Returns:
        What computes it, in words; empty where the model has no linear attention.
    """
    mixers = linear_mixers(model)
    if not mixers:
        return ""
    sizes = Sizes.of(mixers[0])
    reason = reason_against(sizes, device)
    for name in FUNCTIONS:
        chosen = theirs(sizes.file, name)
        setattr(sys.modules[sizes.file], name, plain(chosen) if reason else chosen)
    by = f"PyTorch ({reason})" if reason else f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"
    return f"linear attention is computed by {by}"


@functools.cache
def reason_against(sizes: Sizes, device: torch.device) -> str | None:
    """Why the kernels are not taken; None where they are.

    Args:
        sizes: of the mixers.
        device: where they compute.
    """
    try:
        importlib.import_module(KERNELS)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "fla":
            return f"{PACKAGE} is not installed"
        return f"{PACKAGE} needs {error.name}"
    except Exception as error:
        return f"{PACKAGE} cannot be imported: {_reason(error)}"
    if device.type != "cuda":
        return f"{PACKAGE} needs a CUDA device"
    version = triton_version()
    if torch.cuda.get_device_capability(device)[0] == HOPPER and WRONG[0] <= _numbers(version) < WRONG[1]:
        return f"Triton {version} computes wrong gradients for {PACKAGE} on this GPU, 3.7.1 does not"
    try:
        found = differences(sizes, device, product_dtype(device))
    except Exception as error:
        return f"{PACKAGE} fails: {_reason(error)}"
    name, most = max(found.items(), key=lambda item: item[1])
    # A difference that is no number is one.
    if not all(one <= TOLERANCE for one in found.values()):
        return f"{PACKAGE} differs from it by {most:.0%} in {name}"
    return None


def differences(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """How far the kernels are from PyTorch on random tokens: the norm of each difference, as a share.

    Args:
        sizes: of the mixers.
        device: of the tokens.
        dtype: of queries, keys and values.
    """
    draw = torch.Generator("cpu").manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(2, TOKENS, *shape, generator=draw, device="cpu").to(device)

    channels = 2 * sizes.key_heads * sizes.key_size + sizes.heads * sizes.value_size
    given = {
        "query": drawn(sizes.key_heads, sizes.key_size).to(dtype),
        "key": drawn(sizes.key_heads, sizes.key_size).to(dtype),
        "value": drawn(sizes.heads, sizes.value_size).to(dtype),
        # A state that fades over some ten tokens.
        "decay": -0.1 * softplus(drawn(sizes.heads)),
        "beta": drawn(sizes.heads).sigmoid().to(dtype),
        "channels": drawn(channels).to(dtype),
        "filter": torch.randn(channels, sizes.kernel, generator=draw, device="cpu").to(device, dtype),
    }
    functions = [theirs(sizes.file, name) for name in (RULE, CONVOLUTION)]
    results = [_outputs_and_gradients(rule, other, given) for rule, other in (functions, map(plain, functions))]
    names = ("the output", "the convolution", *(f"the gradient of {name}" for name in given))
    pairs = zip(names, *results, strict=True)
    return {name: ((fast - exact).norm() / exact.norm()).item() for name, fast, exact in pairs}


def _outputs_and_gradients(
    rule: Callable[..., Any], convolution: Callable[..., Any], given: dict[str, Tensor]
) -> list[Tensor]:
    """The two outputs and the gradient of each of the given tensors, in float32."""
    with torch.inference_mode(False), torch.enable_grad():
        query, key, value, decay, beta, channels, weights = leaves = [
            one.detach().clone().requires_grad_() for one in given.values()
        ]
        mixed, _ = rule(query, key, value, g=decay, beta=beta, use_qk_l2norm_in_kernel=True)
        convolved = convolution(channels.transpose(1, 2), weights, None, activation="silu")
        outputs = [mixed, convolved]
        gradients = torch.autograd.grad(outputs, leaves, [_direction(one) for one in outputs])
    return [one.detach().float() for one in (*outputs, *gradients)]


def theirs(file: str, name: str) -> Callable[..., Any]:
    """A function as transformers has chosen it, whatever stands in its place by now."""
    return _theirs.setdefault((file, name), getattr(sys.modules[file], name))


def _direction(output: Tensor) -> Tensor:
    """The gradient that backward begins with: random, and the same at every call."""
    drawn = torch.randn(output.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu")
    return drawn.to(output.device, output.dtype)


def plain(function: Any) -> Callable[..., Any]:
    """The PyTorch function inside transformers' wrapper, which would call a kernel."""
    while True:
        if isinstance(function, nn.Module):
            # The package ``kernels`` makes a module of a function.
            function = inspect.getclosurevars(type(function).forward).nonlocals["func"]
        elif hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function  # type: ignore[no-any-return]


def triton_version() -> str:
    """As Triton says it; empty where it is not installed."""
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return ""


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(one) for one in re.findall(r"\d+", version)[:3])


def _reason(error: Exception) -> str:
    return shortened(" ".join((str(error) or type(error).__name__).split()))
