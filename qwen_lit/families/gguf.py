"""How a family stands in a GGUF file, as llama.cpp reads it: names, orders and values, as plain data."""

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from qwen_lit.families.layer import Layer

Runs = tuple[range, ...]
"""Rows or columns, a run after the other."""
Field = int | float | str | list[int] | list[bool]


@dataclass(frozen=True)
class Stored:
    """What a tensor of a GGUF file takes from a parameter."""

    name: str
    """In its block, with its ending: ``attn_q.weight``."""
    rows: Runs = ()
    """Of each matrix of the parameter, in the file's order; empty for all of them, as they are."""
    columns: Runs = ()
    """In the file's order; empty for all of them, as they are."""
    value: Literal["same", "plus one", "minus exp"] = "same"
    """Qwen's hybrids multiply by a norm's weight plus one, and decay by minus the exponential of ``A_log``; llama.cpp
    takes a weight to multiply by and the decay."""
    exact: bool = False
    """Whether it is float32 in every file, though it is a matrix. Vectors always are."""


def as_is(name: str) -> tuple[Stored, ...]:
    """A parameter that is one tensor, by its module's name in a block."""
    return (Stored(f"{name}.weight"),)


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file, and where it comes from."""

    name: str
    """In the file: ``blk.0.attn_q.weight``."""
    sources: tuple[str, ...]
    """Names in the model's files; together they are the parameter, by their first dimension."""
    stored: Stored
    count: int = 1
    """Matrices of the parameter, such as its experts."""


@dataclass(frozen=True)
class Gguf:
    """How llama.cpp knows a family."""

    arch: str
    """A value of ``gguf.MODEL_ARCH_NAMES``."""
    fields: Callable[[Any], dict[str, Field]]
    """The model's shape by GGUF's keys, without the architecture before them."""
    norm: Stored = Stored("output_norm.weight")
    """The final norm."""
    ahead: Callable[[Any], "Layer"] | None = None
    """The layer that predicts one more token, of which the files may hold some beside the decoder's, in ``mtp``."""
    left_out: tuple[str, ...] = ()
    """How names in the model's files begin that are no part of the language model."""
    cannot: Callable[[Any], str] = lambda config: ""
    """Why llama.cpp would compute something else for a config; empty where it computes the same."""


AHEAD = {
    "mtp.fc.weight": Stored("nextn.eh_proj.weight"),
    "mtp.pre_fc_norm_embedding.weight": Stored("nextn.enorm.weight", value="plus one"),
    "mtp.pre_fc_norm_hidden.weight": Stored("nextn.hnorm.weight", value="plus one"),
    "mtp.norm.weight": Stored("nextn.shared_head_norm.weight", value="plus one"),
}
"""What stands around the layers that predict further tokens, in the first of their blocks."""
VISION = ("model.visual.", "visual.")


def in_wrapper(form: Gguf | None, text: Callable[[Any], Any]) -> Gguf | None:
    """The form of a language model whose files hold a vision tower too: without the tower.

    Args:
        form: the language model's own.
        text: the language model's part of a config.
    """
    if form is None:
        return None
    fields, cannot, ahead = form.fields, form.cannot, form.ahead
    return replace(
        form,
        fields=lambda config: fields(text(config)),
        cannot=lambda config: cannot(text(config)),
        ahead=ahead and (lambda config: ahead(text(config))),
        left_out=VISION,
    )


def count_ahead(there: Container[str]) -> int:
    """Layers among a model's files that predict further tokens; none where what stands around them is not whole."""
    count = 0
    while f"mtp.layers.{count}.input_layernorm.weight" in there:
        count += 1
    return count if all(name in there for name in AHEAD) else 0


def with_ahead(fields: dict[str, Field], count: int) -> dict[str, Field]:
    """The fields of a model with ``count`` layers that predict further tokens, which are blocks for llama.cpp."""
    if not count:
        return fields
    blocks, recurrent = fields["block_count"], fields["attention.recurrent_layers"]
    assert isinstance(blocks, int) and isinstance(recurrent, list)
    return fields | {
        "block_count": blocks + count,
        "attention.recurrent_layers": [bool(one) for one in recurrent] + [False] * count,
        "nextn_predict_layers": count,
    }


def rope_fields(rope: Mapping[str, Any]) -> dict[str, Field]:
    """Rotary positions by GGUF's keys.

    Args:
        rope: ``rope_parameters`` of transformers' config, or ``rope_scaling`` of older ones.
    """
    fields: dict[str, Field] = {}
    sections = rope.get("mrope_section")
    if sections:
        # llama.cpp has four kinds of positions; text and images take the first three.
        fields["rope.dimension_sections"] = [*sections, 0, 0, 0, 0][:4]
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("linear", "yarn"):
        fields |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        fields["rope.scaling.original_context_length"] = int(rope["original_max_position_embeddings"])
        for theirs, ours in YARN.items():
            if rope.get(theirs) is not None:
                fields[f"rope.scaling.yarn_{ours}"] = float(rope[theirs])
    return fields


YARN = {
    "extrapolation_factor": "ext_factor",
    "attention_factor": "attn_factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
}
