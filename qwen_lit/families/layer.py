"""The words in which a family is described: linears, layers, and where a model has them."""

from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from qwen_lit.families.gguf import AHEAD, Field, Gguf, GgufTensor, Stored, count_ahead, with_ahead

Config = Any
"""transformers' config of a model, or the dict that its config.json holds."""
Mixer = Literal["attention", "sliding-window attention", "gated attention", "linear attention"]
"""How tokens of a layer see each other. ``attention`` is Qwen2's and Qwen3's: all tokens before, their positions by
rotation of whole heads, plain RMSNorms."""
FeedForward = Literal["mlp", "experts"]


def value_of(config: Config, key: str, default: Any = None) -> Any:
    """What a config says of a key; the default where it says nothing, or null."""
    found = config.get(key) if isinstance(config, Mapping) else getattr(config, key, None)
    return default if found is None else found


def rope_of(config: Config) -> dict[str, Any]:
    """Rotary positions, as ``rope_parameters`` or, in older configs, ``rope_scaling`` and ``rope_theta``."""
    rope = dict(value_of(config, "rope_parameters") or value_of(config, "rope_scaling") or {})
    return {"rope_theta": value_of(config, "rope_theta", 10000.0)} | {k: v for k, v in rope.items() if v is not None}


def text_config(config: Config) -> Config:
    """The part of a config that is the language model's; the config itself where it has no such part."""
    return value_of(config, "text_config", config)


def is_tied(config: Config, default: bool = False) -> bool:
    """Whether the head is the embedding: what a config says, or else its language model's part.

    Args:
        config: of the model.
        default: where neither says it.
    """
    return bool(value_of(config, "tie_word_embeddings", value_of(text_config(config), "tie_word_embeddings", default)))


@dataclass(frozen=True)
class Linear:
    """One matrix of a decoder layer, or several of the same size that are one parameter, as experts are."""

    path: str
    """Of the module, or of the parameter where it is no linear, in transformers' layer: ``self_attn.q_proj``."""
    inputs: int
    outputs: int
    bias: bool = False
    count: int = 1
    """Matrices that are one parameter."""
    linear: bool = True
    """Whether it is an ``nn.Linear`` in transformers; bitsandbytes takes nothing else."""
    quantized: bool = True
    """Whether it is held in 4 or 8 bits where the base is quantised; False keeps it as the file has it."""
    tokens: float = 1.0
    """Share of the tokens that pass one of its matrices."""
    parts: tuple[str, ...] = ()
    """Names in the layer under which files may hold it in parts, each of them some of its rows, in order; files that
    hold it whole have the parameter's own name."""
    gguf: tuple[Stored, ...] = ()
    """Its tensors in a GGUF file; a bias has the name of the first one, with its own ending."""

    @property
    def name(self) -> str:
        """As LoRA's targets name it."""
        return self.path.removesuffix(".weight").rsplit(".", 1)[-1]

    @property
    def weight(self) -> str:
        """The parameter's name in the layer."""
        return f"{self.path}.weight" if self.linear else self.path

    @property
    def numbers(self) -> int:
        """In the weights, biases left out."""
        return self.count * self.inputs * self.outputs


@dataclass(frozen=True)
class Vector:
    """A parameter that is no matrix of a product, such as a norm's weight."""

    name: str
    """In transformers' layer: ``input_layernorm.weight``."""
    size: int
    gguf: Stored | None = None
    """Its tensor in a GGUF file."""


@dataclass(frozen=True)
class Layer:
    """A decoder layer."""

    mixer: Mixer
    feed_forward: FeedForward
    groups: tuple[tuple[Linear, ...], ...]
    """Its linears, in the order in which they compute; those of a group have one input."""
    vectors: tuple[Vector, ...] = ()
    heads: int = 0
    """Of attention's queries; 0 without attention."""
    key_heads: int = 0
    head_size: int = 0
    query_key_norm: bool = False
    """Whether queries and keys are normed, each head by itself."""
    state: int = 0
    """Numbers of linear attention's state, of all heads; each token reads it twice and writes it once."""

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """All of them, in order."""
        return tuple(linear for group in self.groups for linear in group)

    @property
    def attends(self) -> bool:
        """Whether each token is compared with all before it."""
        return self.mixer != "linear attention"


@dataclass(frozen=True)
class Family:
    """A kind of model: everything that the rest of the program must know of it."""

    model_type: str
    """In config.json."""
    releases: tuple[str, ...]
    """What people call its models."""
    layers: Callable[[Config], tuple[Layer, ...]]
    """Of a model of this family, the first one first."""
    float16: bool = True
    """Whether its gradients stay finite in float16."""
    experts: bool = False
    """Whether it is a mixture of experts, though some layers may have none."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Linears that LoRA usually adapts."""
    decoder: str = "model"
    """The decoder's place in transformers' model for causal language modelling; its layers are ``layers`` there."""
    decoder_on_disk: str = "model"
    """What the files write in its place."""
    decoder_in_wrapper: str = "model"
    """Its place in transformers' model for all that the files hold, such as one with a vision tower; adapters are
    written for that model."""
    text: str = ""
    """The ``model_type`` of the language model that the files hold beside other parts; empty where it is all of it."""
    head: str = "lm_head"
    gguf: Gguf | None = None
    """None where no GGUF file can be written."""

    @property
    def embedding(self) -> str:
        """The embedding's place in transformers' model."""
        return f"{self.decoder}.embed_tokens"

    @property
    def norm(self) -> str:
        """The final norm's place."""
        return f"{self.decoder}.norm"

    @property
    def embedding_on_disk(self) -> str:
        """The embedding's weight in the files."""
        return self.on_disk(f"{self.embedding}.weight")

    @property
    def head_on_disk(self) -> str:
        """The head's weight in the files, where it is not the embedding's."""
        return self.on_disk(f"{self.head}.weight")

    def block(self, number: int) -> str:
        """A layer's place."""
        return f"{self.decoder}.layers.{number}"

    def on_disk(self, name: str) -> str:
        """The name in the model's files of a module or a parameter of transformers' model."""
        prefix = self.decoder + "."
        return self.decoder_on_disk + name.removeprefix(self.decoder) if name.startswith(prefix) else name

    def in_wrapper(self, name: str) -> str:
        """The name of a module or a parameter in transformers' model for all that the files hold."""
        prefix = self.decoder + "."
        return self.decoder_in_wrapper + name.removeprefix(self.decoder) if name.startswith(prefix) else name

    def weights(self, config: Config, there: Container[str] = ()) -> dict[str, tuple[str, ...]]:
        """Every parameter of a model: its name in transformers, and its names in the model's files.

        Args:
            config: of the model; a head that is tied to the embedding is listed too, and has no tensor of its own.
            there: names in the files, which tell whether they hold in parts what can be held so; without them the
                answer is that of the releases, in parts.
        """
        ends = [f"{place}.weight" for place in (self.embedding, self.norm, self.head)]
        found: dict[str, tuple[str, ...]] = {name: (self.on_disk(name),) for name in ends}
        for number, layer in enumerate(self.layers(config)):
            block = self.block(number) + "."
            for linear in layer.linears:
                whole = self.on_disk(block + linear.weight)
                parts = tuple(self.on_disk(block + name) for name in linear.parts)
                found[block + linear.weight] = parts if parts and whole not in there else (whole,)
                if linear.bias:
                    found[f"{block}{linear.path}.bias"] = (self.on_disk(f"{block}{linear.path}.bias"),)
            for vector in layer.vectors:
                found[block + vector.name] = (self.on_disk(block + vector.name),)
        return found

    def gguf_tensors(self, config: Config, there: Container[str]) -> list[GgufTensor]:
        """Every tensor of a GGUF file of a model, block by block.

        Args:
            config: of the model.
            there: names in the model's files, which tell what they hold in parts, whether the head is the embedding's
                matrix, and whether there are layers that predict further tokens.
        """
        assert self.gguf is not None
        found = [
            GgufTensor("token_embd.weight", (self.embedding_on_disk,), Stored("token_embd.weight")),
            GgufTensor("output_norm.weight", (self.on_disk(f"{self.norm}.weight"),), self.gguf.norm),
        ]
        if self.head_on_disk in there:
            found.append(GgufTensor("output.weight", (self.head_on_disk,), Stored("output.weight")))
        blocks = [(layer, self.on_disk(f"{self.block(n)}.")) for n, layer in enumerate(self.layers(config))]
        ahead = count_ahead(there) if self.gguf.ahead else 0
        if ahead and self.gguf.ahead:
            for name, stored in AHEAD.items():
                found.append(GgufTensor(f"blk.{len(blocks)}.{stored.name}", (name,), stored))
            blocks += [(self.gguf.ahead(config), f"mtp.layers.{number}.") for number in range(ahead)]
        for number, (layer, block) in enumerate(blocks):
            found += layer_tensors(layer, f"blk.{number}.", block, there)
        return found

    def leaves_out_of_gguf(self, name: str, there: Container[str]) -> bool:
        """Whether a GGUF file goes without a tensor of the model's files.

        Args:
            name: of the tensor.
            there: names in the model's files.
        """
        assert self.gguf is not None
        broken = self.gguf.ahead is not None and name.startswith("mtp.") and not count_ahead(there)
        return broken or name.startswith(self.gguf.left_out)

    def gguf_fields(self, config: Config, there: Container[str]) -> dict[str, Field]:
        """The shape of a model by GGUF's keys, with its layers that predict further tokens.

        Args:
            config: of the model.
            there: names in the model's files.
        """
        assert self.gguf is not None
        return with_ahead(self.gguf.fields(config), count_ahead(there) if self.gguf.ahead else 0)


def layer_tensors(layer: Layer, block: str, place: str, there: Container[str]) -> Iterator[GgufTensor]:
    """The tensors of a layer in a GGUF file.

    Args:
        layer: what it is.
        block: how their names begin there.
        place: how its names begin in the model's files.
        there: names in the model's files.
    """
    for linear in layer.linears:
        whole = place + linear.weight
        parts = tuple(place + name for name in linear.parts)
        sources = parts if parts and whole not in there else (whole,)
        for stored in linear.gguf:
            yield GgufTensor(block + stored.name, sources, stored, linear.count)
        if linear.bias and linear.gguf:
            bias = replace(linear.gguf[0], name=linear.gguf[0].name.removesuffix("weight") + "bias", columns=())
            yield GgufTensor(block + bias.name, (f"{place}{linear.path}.bias",), bias)
    for vector in layer.vectors:
        if vector.gguf:
            yield GgufTensor(block + vector.gguf.name, (place + vector.name,), vector.gguf)
