"""Unsloth's runs for ``curves.py``, in a process of their own, as it changes transformers for good.

    python benchmarks/unsloth_curve.py WORK SEED...

WORK has ``base``, a checkpoint in 4 bits, and for each seed a file with the adapter that training begins from, the
micro-batches of its steps and their learning rates. After each seed its losses, seconds and adapter are written beside
them.
"""

import sys
import time
from pathlib import Path
from typing import Any

# Before everything that it changes.
# isort: off
from unsloth import FastLanguageModel

# isort: on
import torch
from cases import ALL


def curve(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Train one seed as ``choices.train`` does: AdamW in float32, gradients clipped to 1, bf16 by autocast.

    Args:
        model: with an adapter, which becomes that of the job.
        job: of one seed.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    with torch.no_grad():
        for name, value in job["adapter"].items():
            trained[name].copy_(value)
    optimizer = torch.optim.AdamW(list(trained.values()), lr=0.0, weight_decay=0.0, fused=True)
    losses, began = [], time.perf_counter()
    for batch, rate in zip(job["batches"], job["rates"], strict=True):
        optimizer.param_groups[0]["lr"] = rate
        ids = batch["input_ids"].cuda()
        # A target is named by the place before it.
        labels = torch.full((ids.numel(),), -100)
        labels[batch["target_index"] + 1] = batch["targets"]
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=labels.view_as(ids).cuda()).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(trained.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    told = torch.stack(losses).tolist()
    adapter = {name: trained[name].detach().float().cpu() for name in job["adapter"]}
    return {"losses": told, "seconds": time.perf_counter() - began, "adapter": adapter}


def main() -> int:
    """Train every seed on one model."""
    work, seeds = Path(sys.argv[1]), sys.argv[2:]
    first = torch.load(work / f"{seeds[0]}.pt")
    rank = next(value.shape[0] for name, value in first["adapter"].items() if ".lora_A." in name)
    longest = max(batch["input_ids"].shape[1] for batch in first["batches"])
    model, _ = FastLanguageModel.from_pretrained(
        str(work / "base"), max_seq_length=max(512, longest), dtype=torch.bfloat16, load_in_4bit=True
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=ALL,
        bias="none",
        use_gradient_checkpointing=False,
        random_state=0,
    )
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    for seed in seeds:
        torch.save(curve(model, torch.load(work / f"{seed}.pt")), work / f"{seed}-done.pt")
        print(f"TRAINED {seed}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
