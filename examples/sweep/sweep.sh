#!/usr/bin/env bash
# Learning rates and ranks, one run after the other: bash examples/sweep/sweep.sh --config configs/qwen0_5b.yaml
set -euo pipefail
for lr in 1e-4 2e-4; do
  for r in 8 16; do
    out="output/sweep/lr$lr-r$r"
    if [ -e "$out/summary.json" ]; then continue; fi
    python -m qwen_lit fit "$@" \
      --data.dataset_path examples/sweep/rows.jsonl --data.val_size 2 --trainer.max_epochs 2 \
      --model.learning_rate "$lr" --model.lora_config.r "$r" --model.lora_config.lora_alpha $((2 * r)) \
      --export.merge false --output_dir "$out" --ckpt_path last
  done
done
