"""What a run is, as plain values: what its start says, what ``summary.json`` holds and what trackers compare."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Timer

from qwen_lit.data.datamodule import data_of
from qwen_lit.hardware import product_dtype
from qwen_lit.lightning_internals import seconds_of
from qwen_lit.model.duration import epoch_share, epoch_steps, total_steps, warmup_steps
from qwen_lit.model.facts import module_facts
from qwen_lit.model.module import QwenModule
from qwen_lit.seams import options_of

COMPARED = {
    "model": "model.model_name_or_path",
    "learning_rate": "model.learning_rate",
    "lr_scheduler": "model.lr_scheduler",
    "warmup_ratio": "model.warmup_ratio",
    "optimizer": "model.optimizer",
    "weight_decay": "model.weight_decay",
    "r": "model.lora_config.r",
    "lora_alpha": "model.lora_config.lora_alpha",
    "lora_dropout": "model.lora_config.lora_dropout",
    "target_modules": "model.lora_config.target_modules",
    "use_rslora": "model.lora_config.use_rslora",
    "use_dora": "model.lora_config.use_dora",
    "lora_plus_ratio": "model.lora_plus_ratio",
    "neftune_noise_alpha": "model.neftune_noise_alpha",
    "load_in_4bit": "model.quantization_config.load_in_4bit",
    "products": "model.products",
    "batch_size": "data.batch_size",
    "accumulate_grad_batches": "trainer.accumulate_grad_batches",
    "max_epochs": "trainer.max_epochs",
    "max_length": "data.max_length",
    "packing": "data.packing",
    "seed": "seed_everything",
    "rows": "run.rows",
    "steps": "run.steps",
    "tokens_per_step": "run.tokens_per_step",
}
"""What a table of runs shows of each, by the name of its column."""


def run_facts(trainer: L.Trainer, module: QwenModule) -> dict[str, Any]:
    """What is trained, on what, and for how long. None is what is not known or not set.

    Args:
        trainer: in ``fit``, its data set up.
        module: with its model.
    """
    data, device = data_of(trainer), trainer.strategy.root_device
    options, rows = options_of(trainer), data.train_rows
    assert rows is not None and data.val_rows is not None
    tokens, supervised = int(rows.column("length").sum()), int(rows.column("supervised").sum())
    of_epoch = epoch_steps(trainer, data)
    steps, epochs = total_steps(trainer, data), trainer.max_epochs
    cut = steps is not None and ((epochs or -1) < 0 or steps == trainer.max_steps)
    return {
        **module_facts(module),
        "rows": len(rows),
        "tokens": tokens,
        "supervised_tokens": supervised,
        "held_out_rows": len(data.val_rows),
        "batch_size": data.settings.batch_size,
        "max_length": data.settings.max_length,
        "packing": data.settings.packing,
        "micro_batches_per_step": min(options.micro_batches_per_step, data.micro_batches(trainer.world_size))
        * trainer.world_size,
        "tokens_per_step": round(tokens * epoch_share(trainer, data) / max(1, of_epoch)),
        "steps": steps,
        "steps_per_epoch": of_epoch,
        "epochs": None if steps is None else round(steps / of_epoch, 4) if cut else epochs,
        "max_seconds": next((seconds_of(one) for one in options.callbacks if isinstance(one, Timer)), None),
        "warmup_steps": warmup_steps(module.warmup_ratio, trainer, data),
        "seed": data.settings.seed,
        "device": device.type,
        "devices": trainer.world_size,
        "precision": trainer.precision,
        "product_dtype": str(product_dtype(device)).removeprefix("torch."),
        "begins_at": trainer.global_step,
    }


def flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Nested dicts as one, their keys joined by dots; numbers, words and what is on or off as they are, lists as words
    between commas, and without what is not set."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{before}{key}"
        if isinstance(value, dict):
            found |= flat(value, name + ".")
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(map(str, value))
        elif value is not None:
            found[name] = value if isinstance(value, bool | int | float) else str(value)
    return found
