"""Tiny random models of every family, in the layout of the releases: vision tower, mtp, float32 tensors and all."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ROPE = {"rope_type": "default", "rope_theta": 1e6}
HYBRID_ROPE = {
    "rope_type": "default",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
DELTA_NET = {
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_conv_kernel_dim": 4,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 32}
VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
PLACES = {"num_position_embeddings": 16}
SEEN = {"image_token_id": 5, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.08,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MLP = {"intermediate_size": 128}
HEAD = {"head_dim": 16}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {**MLP, "rope_parameters": ROPE},
    "qwen3": {**MLP, **HEAD, "rope_parameters": ROPE},
    "qwen3_moe": {**MLP, **HEAD, **EXPERTS, "norm_topk_prob": True, "rope_parameters": ROPE},
    "qwen3_next": {
        **MLP,
        **HEAD,
        **DELTA_NET,
        **SHARED,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.25},
    },
    "qwen3_5_text": {**MLP, **HEAD, **DELTA_NET, "rope_parameters": HYBRID_ROPE},
    "qwen3_5_moe_text": {**HEAD, **DELTA_NET, **SHARED, "rope_parameters": HYBRID_ROPE},
    "qwen3_vl": {**MLP, **HEAD, "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2], "mrope_interleaved": True}},
    "qwen2_5_vl": {**MLP, "rope_parameters": {**ROPE, "mrope_section": [3, 3, 2]}},
}
"""The language model's part of each config; ``qwen3_5`` and ``qwen3_5_moe`` have that of their text."""
WRAPPERS = {
    "qwen3_5": ("qwen3_5_text", {**VISION, **PLACES}),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**VISION, **PLACES}),
    "qwen3_vl": ("qwen3_vl_text", {**VISION, **PLACES, "deepstack_visual_indexes": [0]}),
    "qwen2_5_vl": ("qwen2_5_vl_text", {**VISION, "window_size": 16, "fullatt_block_indexes": [0]}),
}
FAMILIES = tuple(dict.fromkeys((*KINDS, *WRAPPERS)))


def config_of(kind: str, vocabulary: int, **options: Any) -> Any:
    """transformers' config of a tiny model; ``options`` are its language model's, such as ``tie_word_embeddings``."""
    from transformers import AutoConfig

    text, vision = WRAPPERS.get(kind, (kind, None))
    said = {"vocab_size": vocabulary, "tie_word_embeddings": False, **SIZES, **KINDS.get(kind, KINDS.get(text, {}))}
    said |= options
    if vision is None:
        return AutoConfig.for_model(kind, **said)
    tied = {"tie_word_embeddings": said["tie_word_embeddings"]}
    return AutoConfig.for_model(kind, text_config={**said, "model_type": text}, vision_config=vision, **SEEN, **tied)


def make_model(kind: str, folder: Path, tokenizer: Any, **options: Any) -> Path:
    """Write a tiny model of a family as its release would be, with its tokenizer."""
    import transformers

    config = config_of(kind, len(tokenizer), **options)
    torch.manual_seed(0)
    name = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    if kind in WRAPPERS:
        name = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind]
    getattr(transformers, name)(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {name: one.float() if _whole(name) else one for name, one in load_file(file).items()}
    # A new model has ones or zeros in its norms and biases, which would hide a wrong order or a wrong place.
    vectors = {name: one for name, one in tensors.items() if one.ndim == 1 and "visual" not in name}
    tensors |= {name: one + 0.1 * torch.randn_like(one) for name, one in vectors.items()}
    if kind.startswith(("qwen3_5", "qwen3_next")):
        tensors |= _ahead(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def _whole(name: str) -> bool:
    """Whether the releases hold a tensor in float32."""
    return name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))


def _ahead(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The layer that predicts the token after the next one, which every class leaves out: like the last layer."""
    first = "input_layernorm.weight"
    start = next(name for name in tensors if name.endswith(f"layers.1.{first}")).removesuffix(first)
    last = {name.removeprefix(start): one.shape for name, one in tensors.items() if name.startswith(start)}
    made = {f"layers.0.{name}": shape for name, shape in last.items()}
    made |= {f"{name}.weight": [64] for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
    made["fc.weight"] = [64, 128]
    return {f"mtp.{name}": (0.08 * torch.randn(shape)).bfloat16() for name, shape in made.items()}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model's folder, by name."""
    return {name: one for file in sorted(folder.glob("*.safetensors")) for name, one in load_file(file).items()}


def config_file(folder: Path) -> dict[str, Any]:
    """What a folder's config.json holds."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
