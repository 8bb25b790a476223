"""Scripts of one's own: sections such as ``training_args``, or a flat file, in transformers' and PEFT's words."""

from typing import Any

from qwen_lit.convert import hugging_face
from qwen_lit.convert.draft import Draft, Peer, grouped
from qwen_lit.convert.values import is_nothing, is_off, listed, spelled

SECTIONS = frozenset(
    f"{kind}_{name}"
    for kind in ("model", "data", "dataset", "training", "train", "sft", "trainer")
    for name in ("args", "arguments", "config")
) | {"training", "dataset"}
"""Sections that no file of ours has."""
BESIDE = ("model", "data", "tokenizer", "logging", "evaluation", "optimizer", "saving")
"""Sections that stand beside them."""
INNER = {
    "lora_config": "lora_config",
    "lora_args": "lora_config",
    "lora": "lora_config",
    "peft_config": "lora_config",
    "peft": "lora_config",
    "lora_arguments": "lora_config",
    "quantization_config": "quantization_config",
    "quantization_args": "quantization_config",
    "bnb_config": "quantization_config",
    "quantization": "quantization_config",
    "bitsandbytes": "quantization_config",
}
"""Sections whose keys are PEFT's or BitsAndBytesConfig's."""
LORA_WORDS = {
    "lora_r": "r",
    "rank": "r",
    "lora_rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
}
PATHS = {
    "dataset": "dataset_path dataset data_path train_file train_path train_dataset dataset_name train_data path",
    "eval_dataset": "val_dataset_path eval_dataset_path validation_file eval_file val_file val_path eval_path "
    "eval_dataset eval_data",
}


def flattened(given: dict[str, Any]) -> dict[str, Any]:
    """The keys of the sections at the top, and those of LoRA and quantization with their section before them."""
    flat: dict[str, Any] = {}
    for key, value in given.items():
        if isinstance(value, dict) and key in INNER:
            flat |= {f"{INNER[key]}.{LORA_WORDS.get(name, name)}": one for name, one in value.items()}
        elif isinstance(value, dict) and (key in SECTIONS or key in BESIDE):
            flat |= flattened(value)
        else:
            flat[key] = value
    return flat


def read(draft: Draft) -> None:
    """What takes more than one key."""
    for theirs, ours in LORA_WORDS.items():
        draft.move(theirs, f"lora_config.{ours}")
    for key in [one for one in draft.given if one.startswith(("lora_config.", "quantization_config."))]:
        draft.move(key, key)
    if not any(word.startswith("lora_config.") for word in draft.common):
        draft.refuse(
            "has no lora_config, which is full fine-tuning, and an adapter is trained here; to do that, "
            "write lora_config: {r: 32, lora_alpha: 64, target_modules: all-linear}"
        )
    for bits in (4, 8):
        draft.move(f"load_in_{bits}bit", f"quantization_config.load_in_{bits}bit")
    for key in [one for one in draft.given if one.startswith("bnb_4bit_")]:
        draft.move(key, f"quantization_config.{key}")
    for word, keys in PATHS.items():
        values = [(key, draft.take(key)) for key in keys.split()]
        found = [(key, value) for key, value in values if not is_nothing(value)]
        if found:
            key, value = found[0]
            items = [{"path": str(one)} for one in listed(key, value)]
            draft.put(word, items, f"{key}: {spelled(value)}")
    if not is_off(draft.take("train_on_inputs")):
        draft.refuse("train_on_inputs: true is not done here: the answers alone are trained; take it out to do that")


PEER = Peer(
    name="transformers TrainingArguments",
    marks=frozenset(),
    words={
        "model_name_or_path": "model_name_or_path",
        "model_name": "model_name_or_path",
        "model_path": "model_name_or_path",
        "base_model": "model_name_or_path",
        "model_id": "model_name_or_path",
        "max_length": "max_length",
        "max_seq_length": "max_length",
        "max_seq_len": "max_length",
        "cutoff_len": "max_length",
        "model_max_length": "max_length",
        "packing": "packing",
        "val_size": "val_size",
        "validation_split": "val_size",
        "validation_split_percentage": "val_percent",
        "val_split": "val_size",
        "test_size": "val_size",
        "num_proc": "dataset_num_proc",
        "preprocessing_num_workers": "dataset_num_proc",
        "early_stopping_patience": "early_stopping_patience",
        "no_cuda": "use_cpu",
        "batch_size": "per_device_train_batch_size",
        "num_epochs": "num_train_epochs",
        "target_modules": "lora_config.target_modules",
    },
    defaults=hugging_face.DEFAULTS,
    unneeded=grouped(
        {
            hugging_face.CHOSEN: "use_flash_attention flash_attention use_flash_attn",
            "the tokenizer is the model's": "tokenizer_name_or_path tokenizer_name tokenizer_path use_fast "
            "use_fast_tokenizer padding_side padding truncation",
            hugging_face.INTERNAL: "cache_dir text_column dataset_text_field",
        }
    ),
    without=grouped({"the base's own": "model_revision revision"}),
    read=read,
)
