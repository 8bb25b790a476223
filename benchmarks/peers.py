"""Training steps of the peers, as ``train.py`` runs them: a process of its own for each case."""

import time
from typing import Any

from cases import QKVO, documents, limit_memory


def sft(model_path: str, case: dict[str, Any], peer: str) -> dict[str, Any]:
    """TRL's SFTTrainer over PEFT's model, or over Unsloth's with its offloaded checkpoints.

    Args:
        model_path: folder of the model.
        case: what is trained.
        peer: trl or unsloth.
    """
    if peer == "unsloth":
        from unsloth import FastLanguageModel
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    limit_memory(case)
    rows, recompute, steps = case.get("rows", 1), case.get("peer_recompute", True), case.get("steps", 6)
    tokens = case.get("peer_tokens", case.get("tokens", 16_384))
    accumulate = tokens // 2048 // rows
    targets, dropout = case.get("targets", QKVO), case.get("dropout", 0.0)
    lora = {"r": 32, "lora_alpha": 64, "lora_dropout": dropout, "target_modules": targets, "bias": "none"}
    config: Any = None
    if peer == "unsloth":
        model, tokenizer = FastLanguageModel.from_pretrained(
            model_path, max_seq_length=2048, dtype=torch.bfloat16, load_in_4bit=True
        )
        checkpointing = "unsloth" if recompute else False
        model = FastLanguageModel.get_peft_model(
            model, use_gradient_checkpointing=checkpointing, random_state=0, **lora
        )
    else:
        from peft import LoraConfig

        tokenizer = AutoTokenizer.from_pretrained(model_path)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_use_double_quant=True,
        )
        model = AutoModelForCausalLM.from_pretrained(
            model_path, quantization_config=quantization, dtype=torch.bfloat16, device_map={"": 0}
        )
        config = LoraConfig(task_type="CAUSAL_LM", **lora)
    docs = documents(case, steps * accumulate * rows, 2048)
    data = Dataset.from_list(
        [
            {
                "input_ids": ids.tolist(),
                "attention_mask": [1] * len(ids),
                "labels": [-100] * int(span[0, 0]) + ids[span[0, 0] :].tolist(),
            }
            for ids, span in docs
        ]
    )
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **options: Any) -> None:
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.started)
            if len(seconds) == 1:
                torch.cuda.reset_peak_memory_stats()

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, Any]:
        width = max(len(one["input_ids"]) for one in batch)
        fill = {"input_ids": tokenizer.eos_token_id, "attention_mask": 0, "labels": -100}
        return {
            key: torch.tensor([one[key] + [value] * (width - len(one[key])) for one in batch])
            for key, value in fill.items()
        }

    settings = SFTConfig(
        output_dir="/tmp/benchmark",
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulate,
        max_steps=steps,
        learning_rate=2e-4,
        bf16=True,
        optim="paged_adamw_8bit",
        gradient_checkpointing=recompute,
        gradient_checkpointing_kwargs={"use_reentrant": False} if recompute else None,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        max_length=2048,
        packing=False,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=config,
        callbacks=[Clock()],
        data_collator=pad,
    )
    trainer.train()
    counts = [
        sum(len(ids) for ids, _ in docs[n : n + accumulate * rows]) for n in range(0, len(docs), accumulate * rows)
    ]
    rates = sorted(n / s for n, s in zip(counts[1:], seconds[1:], strict=False))
    losses = [round(one["loss"], 4) for one in trainer.state.log_history if "loss" in one]
    return {
        "tokens_per_second": round(rates[len(rates) // 2]),
        "first_step_s": round(seconds[0], 1),
        "losses": losses[:3],
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2),
    }
