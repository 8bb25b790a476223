"""Configurations of other trainers, short, with the keys of their public examples."""

from pathlib import Path

import yaml

from qwen_lit.convert import converted

LLAMA_FACTORY = """\
### model
model_name_or_path: Qwen/Qwen2.5-7B-Instruct
quantization_bit: 4
quantization_method: bnb
trust_remote_code: true

### method
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 16
lora_target: all

### dataset
dataset: identity,alpaca_zh_demo
dataset_dir: data
template: qwen
cutoff_len: 4096
max_samples: 1000
preprocessing_num_workers: 16

### output
output_dir: saves/qwen/lora/sft
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
report_to: wandb
run_name: first

### train
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
resume_from_checkpoint: null
flash_attn: fa2
deepspeed: examples/deepspeed/ds_z3_config.json

### eval
val_size: 0.1
eval_strategy: steps
eval_steps: 50
load_best_model_at_end: true
early_stopping_steps: 3
"""
REGISTER = """\
{"identity": {"file_name": "identity.json"}, "alpaca_zh_demo": {"file_name": "alpaca_zh_demo.json"},
 "qa": {"file_name": "qa.json", "columns": {"prompt": "question", "query": "input", "response": "answer"}},
 "chat": {"file_name": "chat.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"},
          "tags": {"role_tag": "speaker", "content_tag": "text", "user_tag": "me", "assistant_tag": "gpt"}},
 "hub": {"hf_hub_url": "llamafactory/alpaca_en", "subset": "small", "num_samples": 7},
 "dpo": {"file_name": "dpo.json", "ranking": true}}
"""
AXOLOTL = """\
base_model: Qwen/Qwen2.5-7B-Instruct
load_in_8bit: false
load_in_4bit: true
strict: false
datasets:
  - path: data/alpaca.jsonl
    type: alpaca
  - path: data/chat.jsonl
    type: chat_template
    field_messages: conversations
    message_property_mappings: {role: from, content: value}
dataset_prepared_path: last_run_prepared
val_set_size: 0.05
output_dir: ./outputs/out
sequence_len: 2048
sample_packing: true
pad_to_sequence_len: true
adapter: qlora
lora_model_dir:
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
lora_modules_to_save: [embed_tokens]
wandb_project: mine
wandb_entity:
wandb_name: first
wandb_mode: offline
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
group_by_length: false
bf16: auto
tf32: false
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
early_stopping_patience: 3
weight_decay: 0.01
fsdp:
special_tokens:
  pad_token: "<|endoftext|>"
"""
SWIFT = r"""#!/bin/bash
# 2 x 24GiB
MODEL=Qwen/Qwen2.5-7B-Instruct
NPROC_PER_NODE=2 \
CUDA_VISIBLE_DEVICES=0,1 \
swift sft \
    --model $MODEL \
    --use_hf true \
    --train_type lora \
    --dataset 'one.jsonl#500' 'two.jsonl' \
    --split_dataset_ratio 0.01 \
    --torch_dtype bfloat16 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 1 \
    --learning_rate 2e-4 \
    --lora_rank 8 \
    --lora_alpha 32 \
    --target_modules all-linear \
    --gradient_accumulation_steps 16 \
    --eval_steps 50 \
    --save_steps 50 \
    --save_total_limit 2 \
    --logging_steps 5 \
    --max_length 2048 \
    --output_dir output \
    --system 'You are a helpful assistant.' \
    --warmup_ratio 0.05 \
    --quant_bits 4 \
    --quant_method bnb \
    --attn_impl flash_attn \
    --dataloader_num_workers 4 | tee log.txt
"""
SWIFT_ARGS = """\
{"model": "Qwen/Qwen3-8B", "use_hf": true, "tuner_type": "lora", "dataset": ["rows.jsonl"],
 "val_dataset": ["held.jsonl"],
 "lora_rank": 16, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"], "max_length": 4096, "packing": true,
 "truncation_strategy": "left", "loss_scale": "last_round", "learning_rate": 0.0001, "weight_decay": 0.1,
 "adam_beta2": 0.95, "gradient_accumulation_steps": 2, "save_strategy": "epoch", "report_to": ["tensorboard"],
 "lorap_lr_ratio": 16, "use_dora": false, "init_weights": "true", "fp16": null, "bf16": true, "seed": 7}
"""
TRL = """\
model_name_or_path: Qwen/Qwen2.5-0.5B
dataset_name: rows.jsonl
learning_rate: 2.0e-4
max_steps: 1000
packing: true
max_length: 1024
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
gradient_checkpointing: true
eos_token: '<|im_end|>'
assistant_only_loss: true
eval_strategy: "no"
use_peft: true
lora_r: 32
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
load_in_4bit: true
use_bnb_nested_quant: true
output_dir: Qwen2.5-0.5B-SFT
warmup_steps: 50
save_steps: 0.1
report_to: none
push_to_hub: true
"""
TRL_SCRIPT = r"""
accelerate launch --num_processes 4 --config_file x.yaml trl/scripts/sft.py \
    --model_name_or_path Qwen/Qwen2-0.5B --dataset_name rows.jsonl --learning_rate=1e-4 \
    --use_peft --lora-r 8 --lora_target_modules q_proj k_proj --bf16 --num_train_epochs 0.5
"""
SECTIONS = """\
model_args:
  model_name_or_path: Qwen/Qwen2.5-7B-Instruct
  trust_remote_code: true
quantization_config:
  load_in_4bit: true
  bnb_4bit_quant_type: nf4
  bnb_4bit_compute_dtype: bfloat16
  bnb_4bit_use_double_quant: true
lora_config:
  r: 32
  lora_alpha: 64
  lora_dropout: 0.1
  target_modules: [q_proj, k_proj, v_proj, o_proj]
  bias: none
  task_type: CAUSAL_LM
data_args:
  dataset_path: dataset/novel_finetuning_dataset.jsonl
  max_length: 2048
training_args:
  output_dir: output/qwen_qlora_model
  num_train_epochs: 3
  per_device_train_batch_size: 1
  gradient_accumulation_steps: 8
  learning_rate: 2e-4
  warmup_ratio: 0.03
  lr_scheduler_type: cosine
  logging_steps: 10
  save_steps: 100
  save_total_limit: 2
  max_grad_norm: 1.0
  bf16: true
  gradient_checkpointing: true
  optim: paged_adamw_8bit
  report_to: none
"""
FLAT = """\
model_name_or_path: Qwen/Qwen3-4B
dataset_path: rows.jsonl
max_length: 1024
lora_config: {r: 8, lora_alpha: 16, target_modules: all-linear}
output_dir: out
num_train_epochs: 2
per_device_train_batch_size: 4
learning_rate: "5e-5"
fp16: "true"
optim: adamw_torch
warmup_steps: 0
"""
EVERY = {
    "llama_factory.yaml": (LLAMA_FACTORY, "LLaMA-Factory"),
    "axolotl.yml": (AXOLOTL, "Axolotl"),
    "swift.sh": (SWIFT, "ms-swift"),
    "args.json": (SWIFT_ARGS, "ms-swift"),
    "trl.yaml": (TRL, "TRL"),
    "trl.sh": (TRL_SCRIPT, "TRL"),
    "sections.yaml": (SECTIONS, "transformers TrainingArguments"),
    "flat.yaml": (FLAT, "transformers TrainingArguments"),
}
"""File name to its text and whose it is."""


def of(text, suffix=".yaml", name="given"):
    """Our configuration and what is told, of a text."""
    path = Path(name + suffix)
    path.write_text(text, encoding="utf-8")
    made, told = converted(path)
    return yaml.safe_load(made), told


def changed(text, **keys):
    """The same example with other values; None takes a key out."""
    given = yaml.safe_load(text) | keys
    return of(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
