"""The fast engine: the decoder of a PEFT model run by fused functions over transformers' and PEFT's own modules."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qwen_lit.engine.linear import group_linear
from qwen_lit.engine.lora_linear import WORKSPACE, LoraLinear, augmented_weight, lora_columns, parts_of, read_linear
from qwen_lit.engine.mlp import mlp, mlp_in_pieces
from qwen_lit.engine.offload import HostStore, unpin
from qwen_lit.engine.qkv import qkv_rope
from qwen_lit.families.layer import Layer
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.kernels.attention import attention
from qwen_lit.kernels.launch import HAS_TRITON
from qwen_lit.kernels.loss import head_loss
from qwen_lit.kernels.norm import add_norm

PIECE = 8192
"""Tokens of a piece of the MLP: so many that dequantising its weights again costs little."""


def unsupported_reason(model: Any, device: torch.device) -> str | None:
    """Why the fast engine cannot run a model; None when it can.

    Args:
        model: a ``PeftModel`` around a Qwen2 or Qwen3 for causal language modelling.
        device: where it stands.
    """
    if device.type == "cuda" and not HAS_TRITON:
        return "Triton is not installed"
    base = model.base_model.model
    config = base.config
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type} is not {' or '.join(FAMILIES)}"
    family = family_of(config)
    layers = family.layers(config)
    for layer in layers:
        if layer.mixer != "attention" or layer.feed_forward != "mlp":
            return f"the model has {layer.feed_forward if layer.mixer == 'attention' else layer.mixer}"
    if config.hidden_act != "silu":
        return f"hidden_act is {config.hidden_act}"
    size = layers[0].head_size
    if size & (size - 1):
        return f"heads of {size} are not a power of two"
    lora = next(iter(model.peft_config.values()))
    for option in ("use_dora", "modules_to_save", "trainable_token_indices", "layer_replication", "lora_bias"):
        if getattr(lora, option, None):
            return f"lora_config.{option} is set"
    if len(model.active_adapters) != 1:
        return "not exactly one adapter is active"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained too"
    blocks = list(zip(base.get_submodule(family.decoder).layers, layers, strict=True))
    known = {id(one) for block, layer in blocks for one in linears_of(block, layer).values()}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and id(module) not in known:
            return f"{name} has an adapter"
        if getattr(module, "lora_variant", None):
            return f"{name} has a variant of LoRA"
    head = base.get_output_embeddings()
    if type(head) is not nn.Linear:
        return f"{family.head} is a {type(head).__name__}"
    for block, layer in blocks:
        found = linears_of(block, layer)
        for group in layer.groups:
            rates = {m.dropout for m in (read_linear(found[one.name], True) for one in group) if m.a is not None}
            if len(rates) > 1:
                return f"{', '.join(one.name for one in group)} have different dropout rates"
        for name, module in found.items():
            kind = type(getattr(module, "base_layer", module)).__name__
            if kind not in ("Linear", "Linear4bit"):
                return f"{name} is a {kind}"
    return None


def linears_of(block: nn.Module, layer: Layer) -> dict[str, nn.Module]:
    """The linears of a decoder layer by name, with their adapters around them.

    Args:
        block: transformers' module.
        layer: what it is.
    """
    return {linear.name: block.get_submodule(linear.path) for linear in layer.linears}


def spread(layers: int, count: int) -> set[int]:
    """``count`` of so many layers, as far from each other as may be."""
    return {number for number in range(layers) if number * count % layers < count}


class FastEngine:
    """Computes the summed loss of a batch; gradients land in the model's own LoRA parameters."""

    def __init__(
        self,
        model: Any,
        recompute_layers: int = 0,
        loss_chunk: int = 2048,
        offload: bool = False,
        piece: int = 0,
        resident_layers: int = 0,
        offload_layers: int = 0,
    ) -> None:
        """Holds the model; nothing of it is changed.

        Args:
            model: a ``PeftModel`` for which ``unsupported_reason`` is None. Its embedding may stand on the CPU.
            recompute_layers: of so many first layers, beside those of ``offload_layers``, only the input is kept, and
                the rest computed again in backward.
            loss_chunk: rows of logits that exist at a time.
            offload: the kept inputs wait in pinned host memory.
            piece: tokens of which a recomputed layer's MLP holds the activations at a time; 0 for all.
            resident_layers: of so many first layers the 4-bit weights are held dequantised too.
            offload_layers: of so many layers, spread evenly, all that backward needs waits in pinned host memory, but
                for the last of them, with which backward begins.
        """
        self.model = model
        base = model.base_model.model
        family = family_of(base.config)
        self.decoder, self.layers = base.get_submodule(family.decoder), family.layers(base.config)
        layers = len(self.layers)
        self.away = spread(layers, offload_layers)
        self.recomputed = set([number for number in range(layers) if number not in self.away][:recompute_layers])
        self.stored = self.away | (self.recomputed if offload else set())
        self.recompute_layers, self.loss_chunk, self.offload, self.piece = recompute_layers, loss_chunk, offload, piece
        self.trained = [p for name, p in model.named_parameters() if ".lora_" in name]
        self.low: dict[int, Tensor] = {}
        self.resident: dict[int, Tensor] = {}
        self.again = False
        for number, layer in enumerate(self.layers[:resident_layers]):
            linears = self._linears(number, False)
            for group in layer.groups:
                mine = [linears[one.name] for one in group]
                for part in parts_of(mine, group is layer.groups[0]):
                    if part[0].quant_state is not None:
                        dtype = part[0].quant_state.dtype
                        self.resident[id(part[0].weight)] = augmented_weight(
                            part, dtype, lora_columns(mine), held=True
                        )

    def release(self) -> None:
        """Give up the memory of dequantised weights and of the host; a later batch takes what it needs again."""
        self.resident.clear()
        WORKSPACE.buffers.clear()
        unpin()

    def _cast_adapters(self, dtype: torch.dtype) -> None:
        """Make copies of A and B in the dtype of the products, all at once."""
        wanted = [one for one in self.trained if one.dtype != dtype]
        if not wanted:
            self.low = {}
            return
        if any(id(one) not in self.low or self.low[id(one)].dtype != dtype for one in wanted):
            # Training goes on with them where validation came first.
            with torch.inference_mode(False):
                self.low = {id(one): torch.empty_like(one, dtype=dtype, requires_grad=False) for one in wanted}
        with torch.no_grad():
            torch._foreach_copy_([self.low[id(one)] for one in wanted], wanted)

    def _linears(self, number: int, training: bool) -> dict[str, LoraLinear]:
        """The linears of a layer, with what is held for them."""
        modules = linears_of(self.decoder.layers[number], self.layers[number])
        found = {name: read_linear(one, training) for name, one in modules.items()}
        for linear in found.values():
            linear.a_compute, linear.b_compute = self.low.get(id(linear.a)), self.low.get(id(linear.b))
            linear.resident = self.resident.get(id(linear.weight))
        return found

    def loss_sum(self, batch: Any) -> Tensor:
        """Summed negative log-likelihood of the batch's supervised tokens, a float32 scalar in nats.

        Args:
            batch: ``qwen_lit.data.batches.Batch`` on the model's device.
        """
        base, decoder = self.model.base_model.model, self.decoder
        ids = batch["input_ids"]
        residual = decoder.embed_tokens(ids.to(decoder.embed_tokens.weight.device)).flatten(0, 1).to(ids.device)
        positions = batch["position_ids"].flatten()
        cos, sin = decoder.rotary_emb(residual, positions[None])
        half = cos.shape[-1] // 2
        cos, sin = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        training = self.model.training and torch.is_grad_enabled()
        # One draw from the host's generator, which a checkpoint restores; every mask of the batch derives from it.
        seed = int(torch.randint(2**30, (), device="cpu")) if training else 0
        delta: Tensor | None = None
        back = 0
        # Copying a long row's input takes no time beside computing it, but its memory counts.
        store = HostStore(residual.device, [cos, sin], ahead=len(residual) <= PIECE or bool(self.away))
        self._cast_adapters(residual.dtype)
        with torch.autocast(residual.device.type, enabled=False):
            for number, block in enumerate(decoder.layers):
                again = training and number in self.recomputed
                if again and delta is not None:
                    # One tensor instead of two is kept.
                    residual, delta = residual + delta, None
                layer, linears = self.layers[number], self._linears(number, training)
                # Of the last layer, only the rows that predict something are needed after attention.
                rows = batch["target_index"] if block is decoder.layers[-1] else None
                arguments = (residual, delta, block, layer, linears, cos, sin, batch, seed + 4 * number, rows, back)
                back = lora_columns([linears[one.name] for one in layer.groups[-1]])
                stored = training and number in self.stored
                with store.layer(last=number == max(self.stored)) if stored else nullcontext():
                    if again:
                        # Recomputing stops at the last tensor that backward needs, which is before down_proj.
                        residual, delta = checkpoint(
                            self._layer,
                            *arguments,
                            use_reentrant=False,
                            preserve_rng_state=False,
                            context_fn=self._phases,
                        )
                    else:
                        residual, delta = self._layer(*arguments)
            assert delta is not None
            _, normed = add_norm(residual, delta, decoder.norm.weight, decoder.norm.variance_epsilon, 0, back)
            head: Any = base.get_output_embeddings()
            return head_loss(normed, head.weight.to(normed.dtype), batch["targets"], self.loss_chunk)

    def _phases(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self._recomputing()

    @contextmanager
    def _recomputing(self) -> Iterator[None]:
        self.again = True
        try:
            yield
        finally:
            self.again = False

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
        seed: int,
        rows: Tensor | None,
        back: int,
    ) -> tuple[Tensor, Tensor]:
        """The sum and what is to be added to it, of ``rows`` alone where they are given.

        ``back`` is the room of the linear that made ``delta``.
        """
        attn = block.self_attn
        first, second, third, _ = ([linears[one.name] for one in group] for group in layer.groups)
        norm = block.input_layernorm
        residual, x = add_norm(residual, delta, norm.weight, norm.variance_epsilon, lora_columns(first), back)
        norms = [_norm(getattr(attn, name, None)) for name in ("q_norm", "k_norm")]
        q, k, v = qkv_rope(x, first, layer.head_size, cos, sin, norms, seed, padded=True)
        mixed = attention(q, k, v, batch["cu_seqlens"], batch["max_seqlen"]).flatten(1)
        if rows is not None:
            residual, mixed = residual.index_select(0, rows), mixed.index_select(0, rows)
        (out,) = group_linear(mixed, second, seed + 1, grad_padded=True)
        norm = block.post_attention_layernorm
        residual, x = add_norm(
            residual, out, norm.weight, norm.variance_epsilon, lora_columns(third), lora_columns(second)
        )
        # Nothing is kept without gradients, so pieces cost nothing then, and validation rows of any length fit.
        piece = self.piece or (0 if torch.is_grad_enabled() else PIECE)
        if piece and len(x) > piece:
            return residual, mlp_in_pieces(x, linears, seed + 2, piece, True, self.again)
        return residual, mlp(x, linears, seed + 2, padded=True)


def _norm(module: Any) -> tuple[Tensor | None, float]:
    return (None, 0.0) if module is None else (module.weight, module.variance_epsilon)
