"""Tiny mixtures of experts, named as released files are: each expert by itself, or all in one tensor."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.families.table import family_of

LINEAR = {
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "layer_types": ["linear_attention", "full_attention"],
}
ROPE = {"rope_type": "default", "rope_theta": 1e6}
PARTIAL = {"partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
SHARED = {"shared_expert_intermediate_size": 64}
OPTIONS = {
    "qwen3_moe": {},
    "qwen3_next": LINEAR | SHARED,
    "qwen3_5_moe_text": LINEAR
    | SHARED
    | {
        "rope_parameters": ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    },
}
EXPERTS, INNER, HIDDEN = 4, 64, 128


def mixture(folder: Path, kind: str, fused: bool, words: int = 96, wrapped: bool = False) -> Path:
    """A random model of two layers, in bf16.

    Args:
        folder: to be made.
        kind: of text model.
        fused: whether the files hold the experts of a layer in one tensor.
        words: of its vocabulary.
        wrapped: whether the files are those of a model with a vision tower.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        kind,
        **{
            "vocab_size": words,
            "hidden_size": HIDDEN,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "moe_intermediate_size": INNER,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "initializer_range": 0.08,
            "tie_word_embeddings": False,
            "rope_parameters": ROPE,
            **OPTIONS[kind],
        },
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    family = family_of(config)
    parts = family.weights(config)
    for own, files in family.weights(config, set(parts)).items():
        if files != parts[own] and fused == (files[0] not in tensors):
            tensors = _whole(tensors, own, parts[own]) if fused else _apart(tensors, own, parts[own])
    if wrapped:
        tensors = {name.replace("model.", "model.language_model.", 1): one for name, one in tensors.items()}
        tensors["model.visual.patch_embed.proj.weight"] = torch.randn(8, 3, dtype=torch.bfloat16)
        whole = {"model_type": kind.removesuffix("_text"), "text_config": config.to_dict(), "dtype": "bfloat16"}
        (folder / "config.json").write_text(json.dumps(whole))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _whole(tensors, own, files):
    stacked = torch.cat([tensors.pop(name) for name in files])
    return tensors | {own: stacked.view(EXPERTS, -1, stacked.shape[1])}


def _apart(tensors, own, files):
    pieces = tensors.pop(own).flatten(0, 1).chunk(len(files))
    return tensors | {name: piece.clone() for name, piece in zip(files, pieces, strict=True)}
