"""The fast engine: the decoder of a PEFT model run by fused functions over transformers' and PEFT's own modules."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qwen_lit.engine.ends import HeadAtHand
from qwen_lit.engine.linear import group_linear
from qwen_lit.engine.lora_linear import (
    LoraLinear,
    Workspace,
    augmented_weight,
    backward_columns,
    forward_columns,
    lora_columns,
    parts_of,
    read_linear,
    size_of,
)
from qwen_lit.engine.mlp import mlp, mlp_in_pieces
from qwen_lit.engine.narrow import ScaleStore, fitting
from qwen_lit.engine.offload import HostBlocks, HostStore
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.engine.products import Passes, Products
from qwen_lit.engine.qkv import qkv_rope
from qwen_lit.engine.supported import linears_of
from qwen_lit.engine.waits import Waits
from qwen_lit.families.layer import Layer
from qwen_lit.families.table import family_of
from qwen_lit.frozen.store import store_of
from qwen_lit.kernels.attention import attention
from qwen_lit.kernels.dropout import Seed
from qwen_lit.kernels.eight import Narrow
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.loss import head_loss
from qwen_lit.kernels.norm import add_norm

PIECE = 8192
"""Tokens of a piece of the MLP: enough that dequantising its weights again costs little."""


@dataclass
class Arena:
    """Memory that an engine keeps between batches and lends to its operations."""

    workspace: Workspace = field(default_factory=Workspace)
    """For the weight that is dequantised for a product."""
    host: HostBlocks = field(default_factory=HostBlocks)
    """Pinned blocks for what waits on the host."""

    def clear(self) -> None:
        """Give all of it up; it is taken again when it is needed."""
        self.workspace.clear()
        self.host.clear()


class FastEngine:
    """Computes the summed loss of a batch; gradients land in the model's own LoRA parameters."""

    def __init__(self, model: PeftModel, policies: Policies | None = None, products: Products | None = None) -> None:
        """Holds the model; nothing of it is changed.

        Args:
            model: a ``PeftModel`` for which ``unsupported_reason`` is None.
            policies: how memory is saved, with one policy for each layer; without them every layer keeps all that its
                backward needs. What waits on the host is placed by ``place_ends`` and ``FrozenStore.place``.
            products: how the products of frozen weights are computed; in bf16 where it is not given. Another may be
                set between batches.
        """
        self.model = model
        base: Any = model.base_model.model
        family = family_of(base.config)
        self.decoder, self.layers = base.get_submodule(family.decoder), family.layers(base.config)
        self.modules = [linears_of(*pair) for pair in zip(self.decoder.layers, self.layers, strict=True)]
        self.policies = Policies.keep_all(len(self.layers)) if policies is None else policies
        self.products = Products() if products is None else products
        self.scales = ScaleStore()
        self.fitted: dict[tuple[int, int, Passes], Passes] = {}
        self.arena = Arena()
        self.store = store_of(base)
        self.waits = Waits(base.get_submodule(family.norm).weight.device)
        """How long the device waits for what is on the host; the one of the streamed layers too."""
        if self.store is not None:
            self.store.waits = self.waits
        self.trained: list[Tensor] = [p for name, p in model.named_parameters() if ".lora_" in name]
        self.compute: dict[int, Tensor] = {}
        self.resident: dict[int, Tensor] = {}
        self.leaves: dict[int, Tensor] = {}
        self.recomputing = False
        for number in sorted(self.policies.resident):
            self.resident |= self._dequantized(number)

    @property
    def recompute_layers(self) -> int:
        """Layers whose forward runs again in backward."""
        return self.policies.recomputed

    def release(self) -> None:
        """Give up the memory of dequantised weights and of the host; a later batch takes what it needs again."""
        self.resident.clear()
        self.arena.clear()

    def _dequantized(self, number: int) -> dict[int, Tensor]:
        """The augmented weights of a layer's 4-bit linears, by the ``id`` of the first weight in each."""
        found, linears, groups = {}, self._linears(number, False), self.layers[number].groups
        for group in groups:
            mine = [linears[one.name] for one in group]
            for part in parts_of(mine, group is groups[0]):
                if part[0].quantized:
                    dtype = part[0].quant_state.dtype
                    found[id(part[0].weight)] = augmented_weight(part, dtype, lora_columns(mine), held=True)
        return found

    def _cast_adapters(self, dtype: torch.dtype) -> None:
        """Make copies of A and B in the dtype of the products, all at once."""
        wanted = [parameter for parameter in self.trained if parameter.dtype != dtype]
        if not wanted:
            self.compute = {}
            return
        if any(id(one) not in self.compute or self.compute[id(one)].dtype != dtype for one in wanted):
            # Copies made in validation's inference mode could not be used in training.
            with torch.inference_mode(False):
                self.compute = {id(one): torch.empty_like(one, dtype=dtype, requires_grad=False) for one in wanted}
                self._stack(dtype)
        with torch.no_grad():
            torch._foreach_copy_([self.compute[id(one)] for one in wanted], wanted)

    def _stack(self, dtype: torch.dtype) -> None:
        """Let the copies of a group's A lie one below the other, so that a product reads them as one matrix."""
        for modules, layer in zip(self.modules, self.layers, strict=True):
            for group in layer.groups:
                every = [read_linear(modules[one.name], False).a for one in group]
                mine = [a for a in every if a is not None and id(a) in self.compute]
                if len(mine) > 1:
                    whole = torch.empty(
                        sum(len(a) for a in mine), mine[0].shape[1], dtype=dtype, device=mine[0].device
                    )
                    parts = whole.split([len(a) for a in mine])
                    self.compute |= {id(a): part for a, part in zip(mine, parts, strict=True)}

    def _linears(self, number: int, training: bool) -> dict[str, LoraLinear]:
        """The linears of a layer, with the copies that the engine keeps for them."""
        arrive, layer = None if self.store is None else self.store.arrival(number), self.layers[number]
        found = {
            name: read_linear(module, training, self.compute, self.resident, self.arena.workspace, arrive)
            for name, module in self.modules[number].items()
        }
        for linear in found.values() if self.leaves else ():
            if linear.a is not None and linear.b is not None:
                linear.a, linear.b = self.leaves[id(linear.a)], self.leaves[id(linear.b)]
        # What is not trained is computed as it will be served: in the dtype of the model.
        for place, group in enumerate(layer.groups if training else ()):
            mine = [found[one.name] for one in group]
            passes = self._passes(number, place, mine)
            for linear in mine:
                linear.passes, linear.scales = passes, self.scales
        return found

    def _passes(self, number: int, place: int, group: list[LoraLinear]) -> Passes:
        """The kinds of a group's products; whether its sizes allow them is asked once."""
        asked = self.products.of(number, place)
        if not asked.narrow:
            return asked
        key = number, place, asked
        if key not in self.fitted:
            self.fitted[key] = fitting(asked, [size_of(linear) for linear in group])
        return self.fitted[key]

    def _embedded(self, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The residual stream before the first layer, and cos and sin of each token's position."""
        residual = self.decoder.embed_tokens(batch["input_ids"]).flatten(0, 1)
        cos, sin = self.decoder.rotary_emb(residual, batch["position_ids"].flatten()[None])
        half = cos.shape[-1] // 2
        return residual, cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()

    @contextmanager
    def derived_by(self, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Have gradients flow to other tensors than the model's parameters, which share their memory.

        Args:
            leaves: one for each of ``trained``.
        """
        self.leaves = {id(one): leaf for one, leaf in zip(self.trained, leaves, strict=True)}
        try:
            yield
        finally:
            self.leaves = {}

    @staticmethod
    def draw() -> int:
        """A seed of a micro-batch's dropout, below 2**30, by the host's generator, which a checkpoint restores; every
        mask of the micro-batch derives from it."""
        return int(torch.randint(2**30, (), device="cpu"))

    def loss_sum(self, batch: Any, seed: Seed | None = None) -> Tensor:
        """Summed negative log-likelihood of the batch's supervised tokens, a float32 scalar in nats.

        Args:
            batch: ``qwen_lit.data.batches.Batch`` on the model's device.
            seed: of its dropout; drawn where it is not given.
        """
        base: Any = self.model.base_model.model
        decoder = self.decoder
        residual, cos, sin = self._embedded(batch)
        training = self.model.training and torch.is_grad_enabled()
        first: int | Seed = (self.draw() if training else 0) if seed is None else seed
        delta: Tensor | None = None
        columns_back = 0
        policies = self.policies.layers
        on_host = self.policies.on_host if training else ()
        ahead = fetches_ahead(len(residual), policies)
        # With leaves of its own a pass may be recorded, and a recorded pass waits for nothing outside of it.
        beside = (residual.device, [cos, sin], ahead, self.arena.host, self.waits)
        store = None if self.leaves else HostStore(*beside)
        self._cast_adapters(residual.dtype)
        if self.store is not None:
            self.store.begin(turns=training)
        at_hand = HeadAtHand(base.get_output_embeddings(), residual.device)
        with torch.autocast(residual.device.type, enabled=False), at_hand as head:
            for number, block in enumerate(decoder.layers):
                recompute = training and policies[number].recomputes
                if recompute and delta is not None:
                    # One tensor instead of two is saved.
                    residual, delta = residual + delta, None
                layer, linears = self.layers[number], self._linears(number, training)
                # Of the last layer, only the rows that predict something are needed after attention.
                rows = batch["target_index"] if block is decoder.layers[-1] else None
                if rows is not None:
                    head.begin()
                seeds = first + 4 * number
                packs = training and self.policies.packs(number)
                arguments = (residual, delta, block, layer, linears, cos, sin, batch, seeds, rows, columns_back, packs)
                columns_back = backward_columns([linears[one.name] for one in layer.groups[-1]])
                with store.layer(number == on_host[-1]) if store and number in on_host else nullcontext():
                    if recompute:
                        # Recomputation stops at the last tensor that is saved: before down_proj where that has no
                        # adapter.
                        residual, delta = checkpoint(
                            self._layer,
                            *arguments,
                            use_reentrant=False,
                            preserve_rng_state=False,
                            context_fn=self._checkpoint_contexts,
                        )
                    else:
                        residual, delta = self._layer(*arguments)
            assert delta is not None
            _, normed, _ = add_norm(
                residual, delta, decoder.norm.weight, decoder.norm.variance_epsilon, 0, columns_back
            )
            loss = head_loss(normed, head.take(normed.dtype), batch["targets"], self.policies.loss_chunk)
        if self.products.narrow and not training:
            # Training does without the buffer of a dequantised weight.
            self.arena.workspace.clear()
        return loss

    def _checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a recomputed layer's first and second forward."""
        return nullcontext(), self._in_recompute()

    @contextmanager
    def _in_recompute(self) -> Iterator[None]:
        self.recomputing = True
        try:
            yield
        finally:
            self.recomputing = False

    def _layer(
        self,
        residual: Tensor,
        delta: Tensor | None,
        block: Any,
        layer: Layer,
        linears: dict[str, LoraLinear],
        cos: Tensor,
        sin: Tensor,
        batch: Any,
        seed: int | Seed,
        rows: Tensor | None,
        columns_back: int,
        packs: bool,
    ) -> tuple[Tensor, Tensor]:
        """One decoder layer: attention, then the MLP.

        Args:
            residual: ``[tokens, hidden]``, the residual stream.
            delta: the same shape, what the layer before adds to it; None for nothing.
            block: the layer of transformers.
            layer: what it is.
            linears: of the layer, by name.
            cos: of each token's position, as for ``qkv_rope``.
            sin: of each token's position, as for ``qkv_rope``.
            batch: as for ``loss_sum``.
            seed: of the dropout masks; the layer draws from ``seed`` to ``seed + 3``.
            rows: int64 ``[n]``, the tokens with which the layer goes on after attention; None for all.
            columns_back: LoRA columns of the linear that made ``delta``.
            packs: as for ``mlp``; pieces of it keep nothing from forward to backward.

        Returns:
            The residual stream and what this layer adds to it, ``[tokens or n, hidden]`` each.
        """
        attn = block.self_attn
        first, second, third, _ = ([linears[one.name] for one in group] for group in layer.groups)
        norm = block.input_layernorm
        residual, x, in_eight = _normed(norm, residual, delta, first, columns_back)
        norms = [_norm(getattr(attn, name, None)) for name in ("q_norm", "k_norm")]
        q, k, v = qkv_rope(x, first, attn.head_dim, cos, sin, norms, seed, True, in_eight)
        mixed = attention(q, k, v, batch["cu_seqlens"], batch["max_seqlen"]).flatten(1)
        if rows is not None:
            residual, mixed = residual.index_select(0, rows), mixed.index_select(0, rows)
        (out,) = group_linear(mixed, second, seed + 1, grad_padded=True)
        norm = block.post_attention_layernorm
        # Nothing is saved without gradients, so pieces cost nothing then, and validation rows of any length fit.
        piece = self.policies.mlp_piece or (0 if torch.is_grad_enabled() else PIECE)
        in_pieces = 0 < piece < len(out)
        residual, x, in_eight = _normed(norm, residual, out, third, backward_columns(second), in_pieces)
        if in_pieces:
            assert not isinstance(seed, Seed)
            return residual, mlp_in_pieces(x, linears, seed + 2, piece, True, self.recomputing)
        return residual, mlp(x, linears, seed + 2, padded=True, narrow=in_eight, packs=packs)


def _normed(
    norm: Any, residual: Tensor, delta: Tensor | None, linears: list[LoraLinear], columns_back: int, wide: bool = False
) -> tuple[Tensor, Tensor, Narrow | None]:
    """``add_norm`` for the linears that read it.

    Args:
        norm: transformers' module.
        residual: as of ``add_norm``.
        delta: as of ``add_norm``.
        linears: a group.
        columns_back: as of ``add_norm``.
        wide: the linears make 8 bits of it by themselves, where they compute in them.
    """
    kind = Kind.WIDE if wide else linears[0].passes.forward
    # An adapter reads it in the dtype of the model.
    wide = not kind.narrow or any(linear.rank for linear in linears)
    columns = forward_columns(linears)
    return add_norm(residual, delta, norm.weight, norm.variance_epsilon, columns, columns_back, kind, wide)


def fetches_ahead(tokens: int, layers: tuple[Policy, ...]) -> bool:
    """Whether tensors come back from the host while the layer above theirs computes, and not only when needed.

    Copying the input of a long row takes no time beside computing it, but its memory counts.
    """
    return tokens <= PIECE or Policy.OFFLOAD in layers


def _norm(module: Any) -> tuple[Tensor | None, float]:
    return (None, 0.0) if module is None else (module.weight, module.variance_epsilon)
