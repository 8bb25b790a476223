"""The plain weights at the two ends of a model, its embedding and lm_head, where they wait on the host.

A weight that waits is a plain attribute of its module and no parameter: what moves, casts, counts or shares a model's
parameters leaves it alone, and transformers takes the device of the model from what is on the device.
"""

import mmap
import weakref
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen_lit.engine.offload import beside, side_stream
from qwen_lit.families.table import family_of
from qwen_lit.frozen.link import CudaLink
from qwen_lit.kernels.rows import can_read_host, host_rows, host_rows_reference


def place_ends(base: Any, embedding_waits: bool, head_waits: bool) -> None:
    """Have the embedding and lm_head wait on the host, or be parameters on the device of the rest.

    They wait in pinned memory where the system allows it. A tied head is the embedding, which it is never moved
    from; then neither waits.

    Args:
        base: transformers' model.
        embedding_waits: whether the embedding waits. It takes ids on any device, and answers there.
        head_waits: whether lm_head waits. It computes where its input is.
    """
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head.weight is embedding.weight:
        return
    device = base.get_submodule(family_of(base.config).norm).weight.device
    moved = [waits(embedding) != embedding_waits, waits(head) != head_waits]
    if moved[0]:
        _move(embedding, device, _look_up if embedding_waits else None)
    if moved[1]:
        _move(head, device, _multiply if head_waits else None)
    if any(moved) and device.type == "cuda":
        torch.cuda.empty_cache()


def cast_ends(base: Any, dtype: torch.dtype) -> None:
    """Cast the weights that wait on the host, which the model's own ``to`` leaves alone.

    Args:
        base: transformers' model.
        dtype: that they get.
    """
    for module in (base.get_input_embeddings(), base.get_output_embeddings()):
        if waits(module) and module.weight.dtype != dtype:
            module.weight = module.weight.to(dtype)


def waits(module: nn.Module) -> bool:
    """Whether the weight of the embedding or of the head waits on the host."""
    return "weight" not in module._parameters


def _move(module: Any, device: torch.device, on_host: Any) -> None:
    """Move a module's weight to the host or from there.

    Args:
        module: whose weight is moved.
        device: where the model computes.
        on_host: what computes with a weight on the host, of the module and its input; None brings it to the device.
    """
    weight: Tensor = module.weight.detach()
    # Made before the one that is there is given up: a device without room for it leaves the module as it was.
    if on_host is None:
        there: Tensor = nn.Parameter(weight.to(device), requires_grad=False)
        del module.forward
    else:
        there = weight.to("cpu") if device.type == "cpu" else pinned(weight, device)
        module.forward = partial(on_host, module)
    del module.weight
    module.weight = there


def _look_up(embedding: Any, ids: Tensor) -> Tensor:
    """The rows of an embedding on the host, where the ids are."""
    rows = host_rows if ids.is_cuda and can_read_host(embedding.weight) else host_rows_reference
    return rows(embedding.weight, ids.flatten()).view(*ids.shape, -1)


def _multiply(head: Any, x: Tensor) -> Tensor:
    """The logits by a head on the host, whose weight comes for this product alone."""
    return F.linear(x, head.weight.to(x.device, non_blocking=True))


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the host in memory that a device reads by itself; where the system refuses that, just a copy.

    torch's own pinned memory takes the next power of two: 2 GiB for the head of a 7B.

    Args:
        tensor: that is copied.
        device: that reads it.
    """
    memory = torch.frombuffer(mmap.mmap(-1, tensor.nbytes), dtype=torch.uint8)
    copy = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
    link = CudaLink(device)
    if link.register(copy.data_ptr(), copy.nbytes, mapped=False) is None:
        # What is registered is given up before its memory is.
        weakref.finalize(copy, link.unregister, copy.data_ptr())
    return copy


class HeadAtHand:
    """The weight of lm_head on the device for one loss, where it waits on the host.

    It is a context: where a pass breaks off, the memory of a copy that is under way is not given to anything before
    the copy has ended.
    """

    def __init__(self, head: Any, device: torch.device) -> None:
        """Copies nothing.

        Args:
            head: transformers' lm_head.
            device: where the loss is computed.
        """
        self.head, self.device = head, device
        self.copy: Tensor | None = None

    def __enter__(self) -> "HeadAtHand":
        return self

    def __exit__(self, *error: object) -> None:
        self._end()
        self.copy = None

    def begin(self) -> None:
        """Begin to copy a weight that waits, beside what the device is given from now on."""
        if not waits(self.head):
            return
        # Made on the current stream, so that it is given up in the order of that stream.
        self.copy = torch.empty_like(self.head.weight, device=self.device)
        with beside(self.device):
            self.copy.copy_(self.head.weight, non_blocking=True)

    def take(self, dtype: torch.dtype) -> Tensor:
        """The weight ``[vocabulary, hidden]`` in ``dtype``; the copy that ``begin`` has made goes with it.

        Args:
            dtype: of the products.
        """
        if self.copy is None:
            return self.head.weight.to(dtype)  # type: ignore[no-any-return]
        self._end()
        copy, self.copy = self.copy, None
        return copy.to(dtype)

    def _end(self) -> None:
        """Let what the device is given from now on come after a copy that is under way."""
        if self.copy is not None and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).wait_stream(side_stream(self.device))
