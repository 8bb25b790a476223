"""A micro-batch of few tokens as one CUDA graph: forward, loss, backward and the sum of gradients, launched at once.

The host takes as long to launch a micro-batch of 100 tokens as one of 2,000. A graph has all its launches recorded,
and reads what changes from memory that stays (``engine/shapes.py``): rows, borders, dropout's seed, the loss' share.

Every micro-batch up to a limit is filled up to its shape, recorded or not, and both run the same kernels on the same
sizes: when a shape is recorded does not change what is computed, so a resumed run may record at another step.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen_lit.data.batches import Batch
from qwen_lit.engine.engine import FastEngine, linears_of
from qwen_lit.engine.shapes import Inputs, Shape, shape_of, tokens_of
from qwen_lit.kernels.dropout import Seed
from qwen_lit.model.precision import full_precision
from qwen_lit.planner.graphs import graph_bytes
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import Plan

log = logging.getLogger(__name__)
SEEN = 2
"""Micro-batches of a shape that are launched kernel by kernel before it is recorded: they compile its kernels, and a
rare shape is not worth a recording."""
MOST = 32
"""Graphs that are kept; each has descriptions of thousands of kernels."""

Run = Callable[[], Tensor]
"""Adds the gradients of what stands in the inputs, and returns its loss in memory that the next one overwrites."""


class CudaRecorder:
    """Records on CUDA. All graphs share memory, as no two run at a time."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.taken = 0
        """Bytes of the shared memory."""

    def record(self, run: Run) -> Run:
        """A function that does what ``run`` does by one launch. Nothing is computed yet.

        Args:
            run: whose kernels are compiled.

        Raises:
            RuntimeError: something in it cannot be recorded, or there is no memory for it.
        """
        torch.cuda.empty_cache()
        before, graph = torch.cuda.memory_reserved(), torch.cuda.CUDAGraph()
        try:
            # Other threads, such as that of pinned memory, do what they do meanwhile.
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                loss = run()
        except Exception:
            _end_broken_recording(self.pool)
            raise
        self.taken += max(0, torch.cuda.memory_reserved() - before)

        def replay() -> Tensor:
            graph.replay()
            return loss

        return replay


def _end_broken_recording(pool: Any) -> None:
    """Where recording broke off, torch leaves its allocator and the device's generator as if it went on.

    Args:
        pool: that was recorded into.
    """
    device = torch.cuda.current_device()
    with suppress(Exception):
        torch._C._cuda_endAllocateToPool(device, pool)
    with suppress(Exception):
        used, other = torch.cuda.default_generators[device], torch.Generator(f"cuda:{device}")
        other.set_state(used.get_state())
        used.graphsafe_set_state(other.graphsafe_get_state())


@dataclass
class Recording:
    """Micro-batches of one shape."""

    inputs: Inputs
    seen: int = 0
    replay: Run | None = None
    keeps: list[Tensor] = field(default_factory=list)
    """Tensors of the engine that the graph reads or writes: their memory is nobody else's while it may run."""


class Graphs:
    """Computes the gradients of micro-batches up to a limit, and records those shapes that come often."""

    def __init__(
        self,
        engine: FastEngine,
        limit: int,
        room: int,
        need: Callable[[int], int],
        recorder: Callable[[], CudaRecorder] = CudaRecorder,
    ) -> None:
        """Records nothing yet.

        Args:
            engine: whose layers all keep what they save, on the device.
            limit: tokens of the largest shape.
            room: bytes that the graphs may take.
            need: bytes that a graph of so many tokens takes.
            recorder: makes what records.
        """
        self.engine, self.limit, self.room, self.need, self.recorder = engine, limit, room, need, recorder
        decoder, layers = engine.decoder, engine.layers
        linears = (one for pair in zip(decoder.layers, layers, strict=True) for one in linears_of(*pair).values())
        self.frozen: list[Any] = [getattr(one, "base_layer", one) for one in linears]
        self.refused = False
        """Whether recording has failed, so that nothing more is recorded."""
        self.release()

    def release(self) -> None:
        """Give up all graphs and their memory; shapes are recorded again when they come again."""
        self.sums: list[Tensor] = []
        """Memory of the gradients, one tensor for each dtype."""
        self.gradients: list[Tensor] = []
        self.known: dict[Shape, Recording] = {}
        self.recording = self.recorder()
        self.state = self._state()
        self.engine.arena.workspace.held = {}

    def take(self, batch: Batch) -> bool:
        """Whether a micro-batch is within the limit."""
        return tokens_of(batch["input_ids"].numel()) <= self.limit

    def computed(self, tokens: int) -> int:
        """Tokens that are computed for a micro-batch of so many: those of its shape, or, beyond the limit, its own."""
        filled = tokens_of(tokens)
        return filled if filled <= self.limit else tokens

    def add_gradients(self, batch: Batch, share: Tensor) -> Tensor:
        """Add the gradients of ``share`` times a micro-batch's summed loss to those of the trained parameters.

        Args:
            batch: that ``take`` takes, on the model's device.
            share: a scalar on the device.

        Returns:
            The summed loss, float32, without a graph of autograd.
        """
        if self._state() != self.state:
            self.release()
        shape = shape_of(batch)
        if shape not in self.known:
            self.known[shape] = Recording(Inputs(shape, share.device))
        one = self.known[shape]
        one.inputs.fill(batch, self.engine.draw(), share)
        self.attach()
        if one.replay is None and one.seen >= SEEN and self._may_record(shape):
            self._record(one)
        one.seen += 1
        return self._run(one.inputs) if one.replay is None else one.replay().clone()

    def _run(self, inputs: Inputs) -> Tensor:
        """Kernel by kernel: the gradients of what stands in the inputs."""
        # Leaves of this pass alone: nothing that another stream has made is reached. In the dtype of the products, in
        # which gradients are made, no gradient is cast before it is added.
        copies = self.engine.compute
        leaves = [copies.get(id(one), one).detach().requires_grad_() for one in self.engine.trained]
        with self.engine.derived_by(leaves):
            loss = self.engine.loss_sum(inputs.batch, Seed(inputs.seed))
        with full_precision(loss.device):
            found = torch.autograd.grad(loss * inputs.share, leaves)
            torch._foreach_add_(self.gradients, found)
        return loss.detach()

    def attach(self) -> None:
        """Have the trained parameters' gradients be those that graphs add to, with what they hold."""
        self.gradients = self.gradients or self._gradients()
        pairs = [
            (one, mine) for one, mine in zip(self.engine.trained, self.gradients, strict=True) if one.grad is not mine
        ]
        if pairs:
            torch._foreach_zero_([mine for _, mine in pairs])
        for one, mine in pairs:
            if one.grad is not None:
                mine.copy_(one.grad)
            one.grad = mine

    def _gradients(self) -> list[Tensor]:
        """Memory for the gradient of each trained parameter; those of one dtype lie in one tensor of ``sums``."""
        trained = self.engine.trained
        kinds = list(dict.fromkeys((one.dtype, one.device) for one in trained))
        sizes = [sum(one.numel() for one in trained if (one.dtype, one.device) == kind) for kind in kinds]
        self.sums = [torch.zeros(size, dtype=kind[0], device=kind[1]) for size, kind in zip(sizes, kinds, strict=True)]
        left = dict(zip(kinds, self.sums, strict=True))
        found = []
        for one in trained:
            kind = one.dtype, one.device
            mine, left[kind] = left[kind][: one.numel()], left[kind][one.numel() :]
            found.append(mine.view(one.shape))
        return found

    def reduce(self) -> None:
        """Give each rank the mean of all ranks' gradients, as DDP does beside a backward that a graph is not."""
        for one in self.sums:
            torch.distributed.all_reduce(one)
            one /= torch.distributed.get_world_size()

    def _may_record(self, shape: Shape) -> bool:
        """Whether there is room for one more graph."""
        recorded = [known.tokens for known, one in self.known.items() if one.replay is not None]
        # The memory of a larger one is used again.
        more = self.need(shape.tokens) - self.need(max(recorded)) if recorded else self.need(shape.tokens)
        fits = self.recording.taken + max(0, more) <= self.room
        return fits and len(recorded) < MOST and not self.refused

    def _record(self, one: Recording) -> None:
        began = time.perf_counter()
        try:
            one.replay = self.recording.record(lambda: self._run(one.inputs))
        # Whatever cannot be recorded can be launched.
        except Exception as error:
            self.refused = True
            reason = (str(error).splitlines() or [""])[0]
            log.warning("no more CUDA graphs are recorded (%s: %s); training goes on", type(error).__name__, reason)
            return
        engine, workspace = self.engine, self.engine.arena.workspace
        workspace.held = dict(workspace.buffers)
        one.keeps = [*workspace.buffers.values(), *engine.compute.values(), *engine.resident.values()]
        seconds, tokens, taken = time.perf_counter() - began, one.inputs.shape.tokens, self.recording.taken / 2**30
        log.debug("recorded %d tokens in %.2f s; all graphs take %.2f GiB", tokens, seconds, taken)

    def _state(self) -> object:
        """What all recordings rely on: where the weights stand, and how their products are computed."""
        places = tuple(one.data_ptr() for one in self.engine.trained)
        return places, tuple(one.weight.data_ptr() for one in self.frozen), self.engine.products


def graphs_of(engine: FastEngine | None, plan: Plan | None) -> Graphs | None:
    """The graphs of a plan; None for one without."""
    if engine is None or plan is None or not plan.graph_tokens:
        return None
    memory = ModelMemory.of(engine.model, 0, products=engine.products, kept=plan.policies.kept)
    need = partial(graph_bytes, memory, policies=plan.policies)
    return Graphs(engine, plan.graph_tokens, plan.graph_bytes, need)
