"""Bases as people download them that are quantised already, made of tiny models, and a fit of one."""

import json
import shutil
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen3Config,
)

from qwen_lit.prequantized import stored_in

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DYNAMIC = ["lm_head", "model.language_model.layers.0.mlp", "model.language_model.layers.1.self_attn.q_proj", "visual"]
SKIPPED = [one.replace("language_model.", "") for one in DYNAMIC]


def make_original(kind: str, tokenizer, path: Path, seed: int = 0) -> Path:
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.08)
    torch.manual_seed(seed)
    if kind == "qwen2":
        config = Qwen2Config(tie_word_embeddings=False, **sizes)
    else:
        config = Qwen3Config(tie_word_embeddings=True, head_dim=16, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data.normal_(float("norm" in name), 0.1)
        # fp16 has no numbers as small as bf16 has.
        value.data[value.abs() < 2.0**-12] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def quantize(original: Path, path: Path, options: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As those are made that people download: transformers' own quantised model, saved."""
    model = AutoModelForCausalLM.from_pretrained(
        original, dtype=dtype, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(original / file, path)
    return path


def rename_skipped(folder: Path, names: list[str]) -> None:
    """Name the modules that are left out as in a wrapper with a vision tower."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = names
    (folder / "config.json").write_text(json.dumps(config))


def fit(out: Path, base: Path, dataset: Path, *options: str) -> list[str]:
    given = {
        "config": "configs/qwen7b.yaml",
        "output_dir": out,
        "model.model_name_or_path": base,
        "model.lora_config.r": 4,
        "model.lora_config.target_modules": "[q_proj,v_proj,up_proj,down_proj]",
        "data.dataset_path": dataset,
        "data.val_size": 5,
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1,
        "model.learning_rate": 0.01,
        "checkpoint.every_n_train_steps": 2,
        "export.smoke_rows": 0,
        "samples.rows": 0,
    }
    traced = ["--trainer.callbacks+=qwen_lit.callbacks.trace.Trace", f"--trainer.callbacks.path={out / 'trace.jsonl'}"]
    return ["fit", *(text for key, value in given.items() for text in (f"--{key}", str(value))), *traced, *options]


def on_load(options: dict) -> list[str]:
    plain = {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False} | options
    return [f"--model.quantization_config.{key}={value}" for key, value in plain.items()]


def stored_kinds(base: Path) -> set[str]:
    return {one.kind for one in stored_in(base).values()}
