"""The memory of a plan: sums over the layers of a model, and the largest moment of a walk through them.

The peak of a step is the largest ``Moment`` on the way forward to the loss and back through the layers, each of which
has a policy of its own.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

from peft import PeftModel

from qwen_lit.engine.engine import fetches_ahead
from qwen_lit.engine.footprint import layer_sizes, loss_ops
from qwen_lit.engine.policy import KeptName, Policies, Policy
from qwen_lit.engine.products import Products
from qwen_lit.frozen.quantize import layouts_of
from qwen_lit.frozen.store import store_of
from qwen_lit.kernels.footprint import LayerSize, backward_columns_of, rank_of
from qwen_lit.planner.layer_memory import Ends, LayerMemory, Moment, augmented_bytes, layer_memory, narrow_bytes
from qwen_lit.planner.streaming import Streaming
from qwen_lit.quantization import Held


@dataclass(frozen=True)
class MemoryConstants:
    """Bytes and shares that no table of tensors gives. They are set so that each row of benchmarks/README.md that has
    a limit (H100 80 GB, shape of Qwen2.5-7B) stays within it."""

    libraries: int = 2**28
    """Bytes left free of a budget for what libraries take beside torch's allocator: the row "limited to 8 GiB"."""
    margin: float = 0.04
    """Share of a budget that is left free for the rounding of the allocator's blocks: the rows "limited to" 40 GiB and
    less."""
    measured_margin: float = 0.03
    """Share of a budget that is left free beside a measured peak, which has no estimate's error in it."""
    cublas: int = 2**26
    """Bytes of cuBLAS's workspaces: on Hopper torch gives 32 MiB to each of the threads of forward and backward."""
    graphs: int = 2**28
    """Bytes that CUDA graphs take beside activations: descriptions of their kernels, and cuBLAS's workspaces."""
    fragments: float = 0.06
    """Share of the activations that lies unused between them and is lost to weights held dequantised: the rows
    "limited to 40 GiB" and "limited to 24 GiB", which hold some."""
    long_fragments: float = 0.35
    """Share that lies unused where large blocks of long rows fit ill into the gaps that earlier ones leave: the rows
    "one row of" 32,000, 120,000 and 343,000 tokens."""


MEMORY = MemoryConstants()


@dataclass(frozen=True, eq=False)
class ModelMemory:
    """The memory that a model takes while it trains, beside its weights."""

    layers: tuple[LayerSize, ...]
    vocabulary: int
    """Rows of lm_head."""
    trained: int
    """Trained parameters: those of the adapter."""
    state_bytes: float
    """Bytes of optimizer state for each trained parameter."""
    size: int = 2
    """Bytes of a number in activations and products."""
    embedding: int = 0
    """Bytes that moving the embedding to the CPU frees; 0 when lm_head shares it."""
    head_size: int = 0
    """Width of a head; cos and sin take as much for each token."""
    head: int = 0
    """Bytes of lm_head, which are freed where it waits on the host; 0 where the embedding shares it."""
    blocks: tuple[int, ...] = ()
    """Bytes of each layer's block, as of ``Streaming``; empty where no layer can be streamed."""
    kept: KeptName = "bf16"
    """As of ``Policies``, in all policies that this is asked about."""

    @staticmethod
    def of(
        model: PeftModel,
        state_bytes: float,
        held: Mapping[str, Held] | None = None,
        products: Products | None = None,
        kept: KeptName = "bf16",
    ) -> "ModelMemory":
        """Read from a PEFT model.

        Args:
            model: as for ``FastEngine``.
            state_bytes: bytes of optimizer state for each trained parameter.
            held: how the base's weights will be held, and by a store, where the model is on the meta device; as they
                are, where this is not given.
            products: as of ``FastEngine``.
            kept: as of ``Policies``.
        """
        base: Any = model.base_model.model
        config, size, store = base.config, base.get_input_embeddings().weight.element_size(), store_of(base)
        own = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * size
        blocks = () if store is None else store.sizes
        if held is not None:
            blocks = tuple(layout.size for layout in layouts_of(config, held) or ())
        return ModelMemory(
            layers=layer_sizes(model, None if held is None else lambda name: f"{name}.weight" in held, products),
            vocabulary=config.vocab_size,
            trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
            state_bytes=state_bytes,
            size=size,
            embedding=own,
            head_size=base.model.layers[0].self_attn.head_dim,
            head=own,
            blocks=blocks,
            kept=kept,
        )

    @cached_property
    def streaming(self) -> Streaming:
        """The layers that may be streamed."""
        return Streaming(self.blocks)

    def layer(self, number: int, piece: int = 0) -> LayerMemory:
        """The memory of one layer."""
        return self.table(piece)[number]

    @lru_cache(8)  # noqa: B019
    def table(self, piece: int = 0) -> tuple[LayerMemory, ...]:
        """The memory of every layer.

        Args:
            piece: as of ``Policies.mlp_piece``.
        """
        found, columns_back, reached = [], 0, False
        for number, layer in enumerate(self.layers):
            last = number == len(self.layers) - 1
            found.append(layer_memory(layer, self.size, columns_back, reached, last, piece, self.kept == "int8"))
            columns_back = backward_columns_of(layer.groups[3])
            reached = reached or any(rank_of(group) for group in layer.groups)
        return tuple(found)

    @cached_property
    def saved(self) -> int:
        """Bytes a token that a layer saves, on average."""
        return sum(self.layer(number).saved for number in range(len(self.layers))) // len(self.layers)

    @cached_property
    def products(self) -> int:
        """Multiplications a token of a layer's forward, on average."""
        every = (linear for layer in self.layers for group in layer.groups for linear in group)
        return sum(linear.inputs * linear.outputs for linear in every) // len(self.layers)

    @cached_property
    def resident(self) -> tuple[int, ...]:
        """Bytes of each layer's weights when they are held dequantised; 0 where not all of them are in 4 bits, or some
        are multiplied in 8 bits, which are made of the 4."""
        return tuple(
            sum(augmented_bytes(layer, self.size))
            * all(linear.quantized and not linear.passes.narrow for group in layer.groups for linear in group)
            for layer in self.layers
        )

    @cached_property
    def constants(self) -> dict[str, int]:
        """Bytes that a step takes however many tokens it has, by name."""
        augmented, narrow = (
            max((one for layer in self.layers for one in sizes(layer)), default=0)
            for sizes in (partial(augmented_bytes, size=self.size), narrow_bytes)
        )
        parts = {
            "gradients of the adapter, float32": 4 * self.trained,
            "adapter in the dtype of the products": self.size * self.trained,
            "optimizer states": int(self.state_bytes * self.trained),
            "buffer for a dequantised weight": augmented,
            "buffer for weights in 8 bits": narrow,
            "workspaces of cuBLAS": MEMORY.cublas,
        }
        return {name: size for name, size in parts.items() if size}

    def peak(self, static: int, tokens: int, policies: Policies) -> int:
        """Bytes at the peak of a step.

        Args:
            static: bytes allocated before the first step, where all layers, embedding and lm_head are on the device.
            tokens: of a micro-batch.
            policies: of the engine.
        """
        piece = policies.mlp_piece if policies.mlp_piece < tokens else 0
        ends, others = self.heights(policies.layers, fetches_ahead(tokens, policies.layers), piece)
        moments = max(self.end(tokens, ends, policies), *(moment.bytes(tokens) for moment in others))
        return self.beside(static, policies) + moments

    def end(self, tokens: int, ends: Ends, policies: Policies) -> int:
        """Bytes at the end of forward: logits, and lm_head where it comes from the host, beside the last layer.

        Args:
            tokens: of a micro-batch.
            ends: of ``heights``.
            policies: of the engine.
        """
        at_loss = tokens * ends.loss + self.logits(tokens, policies)
        if not policies.offload_head:
            return at_loss
        return self.head + max(at_loss, tokens * ends.last)

    def logits(self, tokens: int, policies: Policies) -> int:
        """Bytes of the logits that exist at a time."""
        return min(policies.loss_chunk, tokens) * self.vocabulary * self.size

    def beside(self, static: int, policies: Policies) -> int:
        """The part of ``peak`` that does not depend on the tokens."""
        return self.weights(static, policies) + sum(self.constants.values())

    def weights(self, static: int, policies: Policies) -> int:
        """Bytes of all weights that stay on the device, slots of streamed layers and dequantised ones included.

        Args:
            static: as of ``peak``.
            policies: of the engine.
        """
        away = self.embedding * policies.offload_embedding + self.head * policies.offload_head
        held = sum(self.resident[number] for number in policies.resident)
        return static - away - self.streaming.freed(policies.streamed) + held

    def waiting(self, policies: Policies) -> int:
        """Bytes a token that wait on the host between forward and backward."""
        layers = self.table()
        return sum(
            layers[number].input if policies.layers[number].recomputes else layers[number].saved
            for number in policies.on_host
        )

    def on_host(self, tokens: int, policies: Policies, processes: int) -> dict[str, int]:
        """Bytes of the machine's memory that its processes take for a plan, by name; what does not wait there is left
        out.

        Args:
            tokens: of a micro-batch.
            policies: of the engine.
            processes: on the machine. They share the blocks of streamed layers.
        """
        parts = {
            "blocks of streamed layers": self.streaming.held(policies.streamed),
            "embedding": processes * self.embedding * policies.offload_embedding,
            "lm_head": processes * self.head * policies.offload_head,
            "kept by layers": processes * tokens * self.waiting(policies),
        }
        return {name: size for name, size in parts.items() if size}

    def moments(self, tokens: int, policies: Policies) -> list[Moment]:
        """The moments of a step that may be its peak: at the loss, and within the backward of each layer."""
        piece = policies.mlp_piece if policies.mlp_piece < tokens else 0
        head, found = self.head * policies.offload_head, []
        for number, kept, moments in self._walk(policies.layers, fetches_ahead(tokens, policies.layers), piece):
            if number is None:
                loss, last = moments
                found.append(Moment(loss.name, kept + loss.per_token, self.logits(tokens, policies) + head, kept))
                if head or not policies.layers[-1].recomputes:
                    found.append(Moment(last.name, kept + last.per_token, head, kept))
                continue
            found += [Moment(f"layer {number}: {one.name}", kept + one.per_token, one.fixed, kept) for one in moments]
        return found

    @lru_cache(2**14)  # noqa: B019
    def heights(self, policies: tuple[Policy, ...], ahead: bool, piece: int = 0) -> tuple[Ends, tuple[Moment, ...]]:
        """Bytes a token at the end of forward; and of all other moments those that may be the largest.

        Args:
            policies: one for each layer.
            ahead: as of ``fetches_ahead``.
            piece: as of ``Policies.mlp_piece``.
        """
        (_, kept, (loss, last)), *layers = self._walk(policies, ahead, piece)
        # A recomputed layer takes more in its backward than in its first forward.
        ends, most = Ends(kept + loss.per_token, kept + last.per_token), {0: 0}
        if not policies[-1].recomputes:
            most[0] = ends.last
        for (_, kept, _), number in zip(layers, reversed(range(len(policies))), strict=True):
            table = self.layer(number, piece)
            for one in table.highest_recompute if policies[number].recomputes else table.highest_backward:
                most[one.fixed] = max(most.get(one.fixed, 0), kept + one.per_token)
        return ends, tuple(Moment("backward", per_token, fixed) for fixed, per_token in most.items())

    def _walk(
        self, policies: tuple[Policy, ...], ahead: bool, piece: int
    ) -> Iterator[tuple[int | None, int, tuple[Moment, ...]]]:
        """The loss, then each layer's backward from the last to the first: its number (None for the loss), bytes a
        token that the layers keep beside it, and its own moments.

        What a layer keeps on the device is there from its forward until its backward. What it keeps on the host is on
        the device from the time at which the backward of the next such layer begins (or its own, without ``ahead``);
        that of the last such layer always.
        """
        layers = self.table(piece)
        held = [one.input if policy.recomputes else one.saved for one, policy in zip(layers, policies, strict=True)]
        on_host = [number for number, policy in enumerate(policies) if policy.uses_host]
        live = self.head_size * self.size + sum(held) - sum(held[number] for number in on_host[:-1])
        hidden = self.layers[0].hidden
        norm, loss = loss_ops(hidden, self.vocabulary, 0, 0, self.size)
        # The last layer's input and result are alive in the frame of the engine's forward, though nothing saves them.
        two = 2 * hidden * self.size
        # Logits and lm_head are added elsewhere, as they do not grow with the tokens.
        loss_moment = Moment("loss", norm.saved_bytes + norm.output + loss.saved_bytes + two)
        forward = layers[-1].forward_alone if policies[-1].recomputes else layers[-1].forward - held[-1] + two // 2
        last = Moment("forward of the last layer", forward)
        yield None, live, (loss_moment, last)
        for number in reversed(range(len(policies))):
            if policies[number].uses_host:
                place = on_host.index(number)
                if ahead and place:
                    live += held[on_host[place - 1]]
                elif not ahead and number != on_host[-1]:
                    live += held[number]
            live -= held[number]
            if policies[number].recomputes:
                yield number, live + held[number], layers[number].recompute
            else:
                yield number, live, layers[number].backward
