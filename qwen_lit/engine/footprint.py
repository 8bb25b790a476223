"""A decoder layer of the engine as the list of its operations, with what each one saves and what its backward
takes."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from peft import PeftModel

from qwen_lit.engine.linear import group_linear_op
from qwen_lit.engine.lora_linear import read_linear, size_of
from qwen_lit.engine.mlp import mlp_in_pieces_op, mlp_ops
from qwen_lit.engine.narrow import fitting
from qwen_lit.engine.products import Products
from qwen_lit.engine.qkv import qkv_rope_op
from qwen_lit.engine.supported import linears_of
from qwen_lit.families.table import family_of
from qwen_lit.kernels.attention import attention_op
from qwen_lit.kernels.footprint import LayerSize, Op, Saved, backward_columns_of, rank_of
from qwen_lit.kernels.loss import head_loss_op
from qwen_lit.kernels.norm import add_norm_op


def layer_sizes(
    model: PeftModel, quantized: Callable[[str], bool] | None = None, products: Products | None = None
) -> tuple[LayerSize, ...]:
    """The sizes of every layer of a model.

    Args:
        model: a ``PeftModel`` as ``FastEngine`` takes it, which may be on the meta device.
        quantized: whether the linear of this name in the base will be held in 4 bits, such as
            ``model.layers.0.mlp.up_proj``; as it is, where this is not given.
        products: as of ``FastEngine``.
    """
    base: Any = model.base_model.model
    products = Products() if products is None else products
    family = family_of(base.config)
    sizes = []
    for number, layer in enumerate(family.layers(base.config)):
        prefix, found = f"{family.decoder}.layers.{number}", {}
        for name, module in linears_of(base.get_submodule(prefix), layer).items():
            path = next(one.path for one in layer.linears if one.name == name)
            held = None if quantized is None else quantized(f"{prefix}.{path}")
            found[name] = size_of(read_linear(module, True), held)
        groups = []
        for place, names in enumerate(layer.groups):
            group = [found[one.name] for one in names]
            passes = fitting(products.of(number, place), group)
            groups.append(tuple(replace(one, passes=passes) for one in group))
        sizes.append(LayerSize(tuple(groups), layer.heads, layer.query_key_norm))
    return tuple(sizes)


def layer_ops(
    layer: LayerSize,
    size: int,
    columns_back: int,
    reached: bool = True,
    last: bool = False,
    piece: int = 0,
    packs: bool = False,
) -> tuple[Op, ...]:
    """The operations of ``FastEngine._layer`` in the order of forward.

    Args:
        layer: its sizes.
        size: bytes of a number.
        columns_back: LoRA columns of the linear whose result the layer adds to the residual stream: the last one of
            the layer before.
        reached: the layer's input has a gradient, because a layer before it has an adapter. Otherwise nothing is saved
            until the first adapter of this layer.
        last: it is the last layer, which goes on after attention with the rows that predict something. They are
            counted as all tokens.
        piece: as of ``Policies.mlp_piece``.
        packs: as for ``mlp``.
    """
    qkv, out, gate_up, down = layer.groups
    query, key = (linear.outputs for linear in qkv[:2])
    norm = add_norm_op("input_layernorm", layer.hidden, size, qkv, columns_back)
    second = add_norm_op("post_attention_layernorm", layer.hidden, size, gate_up, backward_columns_of(out))
    one = layer.head_norm and all(linear.quantized for linear in qkv)
    mixing = attention_op(query, key, layer.heads, size, value_counted=one)
    ops = [(norm, 0), (qkv_rope_op(layer, size), rank_of(qkv)), (mixing, 0)]
    # Attention saves its own result, and where rows are chosen, their copy is counted as theirs.
    counted = last or reached or rank_of(qkv) > 0
    if last:
        ops.append((_chosen(query * size, rank_of(out)), 0))
    ops += [(group_linear_op("o_proj", out, size, counted), rank_of(out)), (second, 0)]
    if piece:
        ops.append((mlp_in_pieces_op(layer, size, piece), rank_of(gate_up) + rank_of(down)))
    else:
        ops += zip(mlp_ops(layer, size, packs), (rank_of(gate_up), rank_of(down)), strict=True)
    if reached:
        return tuple(op for op, _ in ops)
    first = next((number for number, (_, rank) in enumerate(ops) if rank), len(ops))
    return tuple(
        replace(op, grad=0)
        if number == first
        else op
        if number > first
        else Op(op.name, joins_residual=op.joins_residual)
        for number, (op, _) in enumerate(ops)
    )


def _chosen(query: int, rank: int) -> Op:
    """The copy of attention's result that has the chosen rows alone."""
    name, saved = "rows that predict", Saved("chosen rows of attention's result", query)
    return Op(name, (saved,), 0, query) if rank else Op(name, (), query, query)


def loss_ops(hidden: int, vocabulary: int, chunk: int, columns_back: int, size: int) -> tuple[Op, ...]:
    """The operations after the last layer: its norm, and the loss.

    Args:
        hidden: width of the residual stream.
        vocabulary: rows of lm_head.
        chunk: as of ``Policies.loss_chunk``.
        columns_back: LoRA columns of the last linear of the last layer.
        size: bytes of a number.
    """
    norm = add_norm_op("norm", hidden, size, (), columns_back)
    return norm, head_loss_op(hidden, vocabulary, chunk, size)
