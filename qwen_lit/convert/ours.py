"""Common words to our keys: those that stand for each other in a table, the others by a function each."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from qwen_lit.convert.draft import Draft
from qwen_lit.convert.tracking import trackers
from qwen_lit.convert.validation import validation
from qwen_lit.convert.values import is_nothing, is_off, listed, number, spelled, text, truth, whole
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.schedules import ScheduleName

Reader = Callable[[str, Any], Any]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Of a Qwen's decoder layer."""
ALL_LINEARS = ("all", "all-linear", "all_linear")
PLAIN: dict[str, tuple[str, Reader]] = {
    "seed": ("seed_everything", whole),
    "output_dir": ("output_dir", text),
    "gradient_accumulation_steps": ("trainer.accumulate_grad_batches", whole),
    "learning_rate": ("model.learning_rate", number),
    "weight_decay": ("model.weight_decay", number),
    "adam_beta1": ("model.adam_beta1", number),
    "adam_beta2": ("model.adam_beta2", number),
    "lora_plus_ratio": ("model.lora_plus_ratio", number),
    "neftune_noise_alpha": ("model.neftune_noise_alpha", number),
    "gradient_checkpointing": ("model.gradient_checkpointing", truth),
    "init_adapter": ("model.init_adapter", text),
    "per_device_train_batch_size": ("data.batch_size", whole),
    "max_length": ("data.max_length", whole),
    "packing": ("data.packing", truth),
    "overlong": ("data.overlong", text),
    "train_on": ("data.train_on", text),
    "dataset_num_proc": ("data.num_proc", whole),
    "dataloader_num_workers": ("data.num_workers", whole),
}
"""Common word to our key."""
OPTIMIZERS = {
    "paged_adamw_8bit": ("paged_adamw_8bit",),
    "adamw_8bit": ("adamw_8bit", "adamw_bnb_8bit"),
    "paged_adamw_32bit": ("paged_adamw_32bit", "paged_adamw"),
    "adamw": (
        "adamw",
        "adamw_hf",
        "adamw_torch",
        "adamw_torch_fused",
        "adamw_torch_xla",
        "adamw_torch_npu_fused",
        "adamw_apex_fused",
    ),
}
LORA = {
    "r": whole,
    "lora_alpha": whole,
    "lora_dropout": number,
    "target_modules": None,
    "modules_to_save": listed,
    "use_rslora": truth,
    "use_dora": truth,
}
"""PEFT's words in the order in which they are written; others follow."""
PEFT_OWN = (
    "task_type",
    "peft_type",
    "inference_mode",
    "base_model_name_or_path",
    "auto_mapping",
    "revision",
    "peft_version",
    "corda_config",
    "eva_config",
    "megatron_config",
    "megatron_core",
)
OURS = re.compile(r"qwen-?(1\.5|2|2\.5|3|3\.[568])(?![.\d])|qwq|distill-qwen|qwen(?![\d.-]*\d)", re.IGNORECASE)
"""In the name of a model that is trained here."""
OTHER_KINDS = re.compile(
    r"qwen(1\.5|2)-.*A\d|qwen2-VL|VL-\d+B-A|flash-next|omni|audio|embedding|reranker|reward|-PRM", re.IGNORECASE
)
HELD = re.compile(r"(awq|gptq|-int[48]|-fp8|-mlx|gguf)", re.IGNORECASE)


def to_ours(draft: Draft) -> None:
    """Convert every common word.

    Raises:
        UserError: a value is of another kind than its key takes.
    """
    for word, (key, read) in PLAIN.items():
        value = draft.use(word)
        if value is not None:
            draft.write(key, read(draft.name(word), value), draft.origin(word))
    for convert in (
        model,
        lora,
        quantization,
        duration,
        optimizer,
        schedule,
        precision,
        saving,
        sources,
        validation,
        trackers,
        resuming,
    ):
        convert(draft)


def model(draft: Draft) -> None:
    """The base, and a warning where it is none of those that are trained here."""
    value = draft.use("model_name_or_path")
    if value is None:
        draft.refuse("names no model")
        return
    name = text(draft.name("model_name_or_path"), value)
    draft.write("model.model_name_or_path", name, draft.origin("model_name_or_path"))
    last = Path(name).name
    if not OURS.search(last if re.search("qwen|qwq", last, re.IGNORECASE) else name) or OTHER_KINDS.search(last):
        known = dict.fromkeys(release for family in FAMILIES.values() for release in family.releases)
        draft.note(f"{name}: none of {', '.join(known)}, which are trained here; others are refused")
    if found := HELD.search(name):
        draft.note(f"{name}: holds weights that are quantized already ({found[1]}); give the checkpoint in bfloat16")


def lora(draft: Draft) -> None:
    """PEFT's words, which are ours."""
    given = {word: draft.use(word) for word in list(draft.common) if word.startswith("lora_config.")}
    names = [*LORA, *sorted(name for word in given if (name := word.partition(".")[2]) not in (*LORA, *PEFT_OWN))]
    for name in names:
        word, value = f"lora_config.{name}", given.get(f"lora_config.{name}")
        if value is None:
            continue
        read = LORA.get(name)
        if name == "target_modules":
            value = targets(value)
        elif read is not None:
            value = read(draft.name(word), value)
        if not (is_nothing(value) or (value is False and name.startswith("use_"))):
            draft.write(f"model.{word}", value, draft.origin(word))
    if not draft.ours.keys() & {"model.lora_config.target_modules", "model.lora_config.target_parameters"}:
        draft.write("model.lora_config.target_modules", ["q_proj", "v_proj"], "PEFT's default for Qwen")


def targets(value: Any) -> Any:
    """Names of linears; a regular expression stays one."""
    if isinstance(value, str) and set(value) & set("^$*+?()|\\"):
        return value
    names = listed("target_modules", value)
    return LINEARS if any(name in ALL_LINEARS for name in names) else names


def quantization(draft: Draft) -> None:
    """BitsAndBytesConfig's words, or null for a base in bfloat16."""
    prefix = "quantization_config."
    given = {
        word: value
        for word in list(draft.common)
        if word.startswith(prefix) and (value := draft.use(word)) is not None
    }
    held = [bits for bits in (4, 8) if not is_off(given.get(f"{prefix}load_in_{bits}bit"))]
    if not held:
        draft.write("model.quantization_config", None, "LoRA on the base in bfloat16")
        return
    if held == [4]:
        given = {
            f"{prefix}load_in_4bit": True,
            f"{prefix}bnb_4bit_quant_type": "nf4",
            f"{prefix}bnb_4bit_compute_dtype": "bfloat16",
        } | given
    for word, value in given.items():
        name = word.removeprefix(prefix)
        if name.startswith("load_in") and is_off(value) or (name.startswith("bnb_4bit") and held != [4]):
            continue
        if name in ("quant_method", "_load_in_4bit", "_load_in_8bit"):
            continue
        if name.startswith("load_in") or name == "bnb_4bit_use_double_quant":
            value = truth(draft.name(word), value)
        if isinstance(value, str):
            value = value.removeprefix("torch.")
        draft.write(f"model.{word}", value, draft.origin(word))


def duration(draft: Draft) -> None:
    """Epochs or steps: where both are given, the peers' steps hold."""
    steps, epochs = draft.use("max_steps"), draft.use("num_train_epochs")
    steps = whole(draft.name("max_steps"), steps) if steps is not None else -1
    if steps > 0:
        draft.write("trainer.max_steps", steps)
        return
    if epochs is None:
        return
    name, origin = draft.name("num_train_epochs"), draft.origin("num_train_epochs")
    epochs = number(name, epochs)
    if 0 < epochs < 1:
        draft.write("trainer.max_epochs", 1, origin)
        draft.write("trainer.limit_train_batches", float(epochs), origin)
        return
    draft.write("trainer.max_epochs", round(epochs), origin)
    if epochs != round(epochs):
        draft.note(f"{origin}: epochs are whole; it is trained for {round(epochs)}, or set trainer.max_steps")


def optimizer(draft: Draft) -> None:
    """The optimizer of the same name and the clipping."""
    if (norm := draft.use("max_grad_norm")) is not None:
        value = number(draft.name("max_grad_norm"), norm)
        draft.write("trainer.gradient_clip_val", float(value) if value > 0 else None, draft.origin("max_grad_norm"))
    given = draft.use("optim")
    if given is None:
        return
    name, origin = str(given).rpartition(".")[2].lower(), draft.origin("optim")
    found = next((ours for ours, theirs in OPTIMIZERS.items() if name in theirs), None)
    if found is None:
        draft.note(
            f"{origin}: AdamW is the optimizer here (paged_adamw_8bit is written); choose a learning rate for it"
        )
    draft.write("model.optimizer", found or "paged_adamw_8bit", origin)


def schedule(draft: Draft) -> None:
    """The learning rate's course and its warmup, which is a share of the run here."""
    given, origin = draft.use("lr_scheduler_type"), draft.origin("lr_scheduler_type")
    if given is not None:
        name = str(given).rpartition(".")[2].lower()
        if name not in get_args(ScheduleName):
            draft.note(f"{origin}: cosine comes nearest to it here")
        draft.write("model.lr_scheduler", name if name in get_args(ScheduleName) else "cosine", origin)
    extra, origin = draft.use("lr_scheduler_kwargs"), draft.origin("lr_scheduler_kwargs")
    if isinstance(extra, str) and extra.startswith("{"):
        extra = json.loads(extra)
    if isinstance(extra, dict) and extra:
        draft.write("model.lr_scheduler_kwargs", extra, origin)
    elif extra:
        draft.note(f"no counterpart: {origin}; give the schedule's arguments as model.lr_scheduler_kwargs")
    steps, ratio = draft.use("warmup_steps"), draft.use("warmup_ratio")
    steps = number(draft.name("warmup_steps"), steps) if steps is not None else None
    ratio = number(draft.name("warmup_ratio"), ratio) if ratio is not None else None
    if str(given).lower() == "constant":
        draft.write("model.warmup_ratio", 0.0, "constant has no warmup")
    elif steps is not None and (0 < steps < 1 or (steps == 0 and ratio is None)):
        draft.write("model.warmup_ratio", float(steps), draft.origin("warmup_steps"))
    elif steps:
        total, origin = draft.ours.get("trainer.max_steps"), draft.origin("warmup_steps")
        if total:
            draft.write("model.warmup_ratio", round(min(steps / total, 0.99), 4), f"{origin} of {total}")
        else:
            draft.write("model.warmup_ratio", 0.03, origin)
            draft.note(
                f"{origin}: the warmup is a share of all steps here; `qwen-lit plan` shows their number, and "
                f"model.warmup_ratio is {spelled(steps)} divided by it (0.03 is written)"
            )
    elif ratio is not None:
        draft.write("model.warmup_ratio", float(ratio), draft.origin("warmup_ratio"))


def precision(draft: Draft) -> None:
    """In what the products are computed; a GPU without bfloat16 takes float16."""
    bf16, fp16, pure = draft.use("bf16"), draft.use("fp16"), draft.use("pure_bf16")
    if not is_off(pure):
        draft.write("trainer.precision", "bf16-true", draft.origin("pure_bf16"))
    elif not is_off(fp16) and (is_off(bf16) or str(bf16).lower() == "auto"):
        draft.write("trainer.precision", "16-mixed", draft.origin("fp16"))
    else:
        draft.write("trainer.precision", "bf16-mixed", "" if is_off(bf16) else draft.origin("bf16"))
    if not is_off(draft.use("use_cpu", False)):
        draft.write("trainer.accelerator", "cpu", draft.origin("use_cpu"))


def saving(draft: Draft) -> None:
    """How often the run is logged and saved."""
    if (every := draft.use("logging_steps")) is not None:
        steps, origin = number(draft.name("logging_steps"), every), draft.origin("logging_steps")
        if steps >= 1:
            draft.write("trainer.log_every_n_steps", int(steps), origin)
        else:
            draft.note(f"no counterpart: {origin} is a share of the run; trainer.log_every_n_steps counts steps")
    strategy, every, keep = draft.use("save_strategy"), draft.use("save_steps"), draft.use("save_total_limit")
    origin = draft.origin("save_steps")
    if strategy is not None and str(strategy).lower() != "steps":
        known = "a run always saves what it goes on from" if is_off(strategy) else "each validation saves as well"
        draft.note(
            f"{draft.origin('save_strategy')}: checkpoint.every_n_train_steps counts steps, and stays at 100; {known}"
        )
    elif every is not None:
        steps, total = number(draft.name("save_steps"), every), draft.ours.get("trainer.max_steps", 0)
        count = int(steps if steps >= 1 else steps * total)
        if count:
            draft.write("checkpoint.every_n_train_steps", count, origin)
        else:
            draft.note(
                f"{origin}: is a share of the run; checkpoint.every_n_train_steps counts steps, and stays at 100"
            )
    if keep is not None and (count := whole(draft.name("save_total_limit"), keep)) > 0:
        draft.write("checkpoint.keep", max(count, 2), draft.origin("save_total_limit"))


def sources(draft: Draft) -> None:
    """The rows: a path, or a list of them and of sections with a path; columns that all share are ``data.fields``."""
    most = draft.use("max_samples")
    given = {word: [dict(one) for one in draft.use(word, [])] for word in ("dataset", "eval_dataset")}
    every = [one for items in given.values() for one in items]
    if every and every[0].get("columns") and all(one.get("columns") == every[0]["columns"] for one in every):
        draft.write("data.fields", every[0]["columns"], "our names with the file's")
        for one in every:
            del one["columns"]
    for word, key in (("dataset", "data.dataset_path"), ("eval_dataset", "data.val_dataset_path")):
        items = given[word]
        if most is not None:
            limit = whole(draft.name("max_samples"), most)
            items = [{**one, "max_rows": min(limit, one.get("max_rows", limit))} for one in items]
        plain = [one["path"] if set(one) == {"path"} else {"path": one["path"], **one} for one in items]
        if plain:
            draft.write(key, plain[0] if len(plain) == 1 and isinstance(plain[0], str) else plain, draft.origin(word))
    if not given["dataset"]:
        draft.refuse("names no rows to train on; a configuration of export, chat or evaluation is not converted")


def resuming(draft: Draft) -> None:
    """Going on from the run's own checkpoints; those of another trainer are of another kind."""
    given = draft.use("resume_from_checkpoint")
    if given is None or is_off(given):
        return
    if str(given).lower() in ("true", "last", "latest", "auto"):
        draft.write("ckpt_path", "last", draft.origin("resume_from_checkpoint"))
    else:
        draft.note(
            f"{draft.origin('resume_from_checkpoint')}: another trainer's run cannot be gone on with; "
            "model.init_adapter takes its adapter's weights into a new one"
        )
