"""TRL: the arguments of ``trl sft``, in a YAML for ``--config`` or in a script."""

from typing import Any

from qwen_lit.convert import hugging_face
from qwen_lit.convert.draft import Draft, Peer, grouped
from qwen_lit.convert.named import named_sources
from qwen_lit.convert.values import is_off, listed, spelled


def read(draft: Draft) -> None:
    """What takes more than one key, and what is refused."""
    given = draft.take("use_peft")
    if is_off(given):
        draft.refuse(
            "use_peft is not set, which is full fine-tuning, and an adapter is trained here; to do that, "
            "write use_peft: true, lora_r: 32"
        )
    if str(draft.take("completion_only_loss", "")).lower() == "false":
        draft.refuse(
            "completion_only_loss: false is not done here: the answers alone are trained; take it out to do that"
        )
    loss = str(draft.take("loss_type", "nll"))
    if loss not in ("nll", "chunked_nll"):
        draft.refuse(f"loss_type: {loss} is another loss than the one of this trainer; take it out")
    if is_off(draft.take("assistant_only_loss")):
        draft.note(
            "assistant_only_loss is not set: of `messages` rows TRL trains the questions too; here the "
            "assistant's words alone are trained"
        )
    four = not is_off(draft.given.get("load_in_4bit"))
    for bits in (4, 8):
        draft.move(f"load_in_{bits}bit", f"quantization_config.load_in_{bits}bit")
    nested = draft.take("use_bnb_nested_quant")
    if four:
        origin = f"use_bnb_nested_quant: {spelled(nested or False)}"
        draft.put("quantization_config.bnb_4bit_use_double_quant", not is_off(nested), origin)
    for key in ("bnb_4bit_quant_type", "bnb_4bit_quant_storage"):
        draft.move(key, f"quantization_config.{key}")
    given = [key for key in ("max_length", "max_seq_length") if key in draft.given]
    for key in given:
        value = draft.take(key)
        draft.put("max_length", 32768 if value is None else value, f"{key}: {spelled(value)}")
    strategy = draft.given.get("packing_strategy")
    if not is_off(draft.given.get("packing")) and strategy in ("wrapped", "bfd_split"):
        draft.note(f"packing_strategy: {strategy}: rows are packed whole here, none is cut in two")
    datasets(draft)


def datasets(draft: Draft) -> None:
    """The one dataset, or the mixture, and what is held out of it."""
    mixture, name = draft.take("datasets"), draft.take("dataset_name")
    subset, split = draft.take("dataset_config"), draft.take("dataset_train_split", "train")
    test = draft.take("dataset_test_split")
    entries: list[Any] = list(mixture or [])
    if name is not None and not entries:
        entries = [{"path": name, "name": subset, "split": split}]
    items: list[dict[str, Any]] = []
    for entry in entries:
        entry = {"path": entry} if isinstance(entry, str) else dict(entry)
        where = f"dataset: {entry.get('path')}"
        share = entry.get("fraction")
        items += [one if share is None else {**one, "weight": share} for one in named_sources(draft, where, entry)]
    if items:
        draft.put("dataset", items, f"dataset_name: {name}" if name is not None else "datasets")
    size = draft.take("test_split_size")
    if size is not None:
        draft.put("val_size", size, f"test_split_size: {size}")
    strategy = draft.given.get("eval_strategy")
    if size is None and name is not None and strategy is not None and not is_off(strategy):
        split = str(test or "test")
        held = named_sources(draft, "dataset_test_split", {"path": name, "name": subset, "split": split})
        if "split" in held[0]:
            draft.put("eval_dataset", held, f"dataset_test_split: {split}")
        else:
            draft.note(f"dataset_test_split: {split}: give its rows as data.val_dataset_path")
    for key in listed("", draft.take("dataset_kwargs")):
        draft.note(f"no counterpart: dataset_kwargs: {spelled(key)}")


PEER = Peer(
    name="TRL",
    marks=frozenset(
        "use_peft dataset_name lora_target_modules dataset_train_split dataset_test_split dataset_text_field "
        "max_seq_length assistant_only_loss completion_only_loss use_bnb_nested_quant packing_strategy eval_packing "
        "lora_modules_to_save lora_r lora_task_type attn_implementation model_init_kwargs chat_template_path "
        "load_in_4bit load_in_8bit dataset_config".split()
    ),
    words={
        "model_name_or_path": "model_name_or_path",
        "lora_r": "lora_config.r",
        "lora_alpha": "lora_config.lora_alpha",
        "lora_dropout": "lora_config.lora_dropout",
        "lora_target_modules": "lora_config.target_modules",
        "lora_target_parameters": "lora_config.target_parameters",
        "lora_modules_to_save": "lora_config.modules_to_save",
        "use_rslora": "lora_config.use_rslora",
        "use_dora": "lora_config.use_dora",
        "packing": "packing",
        "dataset_num_proc": "dataset_num_proc",
        "no_cuda": "use_cpu",
        "early_stopping_patience": "early_stopping_patience",
    },
    defaults=hugging_face.DEFAULTS
    | {
        "learning_rate": 2e-5,
        "logging_steps": 10,
        "gradient_checkpointing": True,
        "max_length": 1024,
        "lora_config.r": 16,
        "lora_config.lora_alpha": 32,
        "lora_config.lora_dropout": 0.05,
    },
    unneeded=grouped(
        {
            hugging_face.CHOSEN: "padding_free pad_to_multiple_of model_init_kwargs ignore_bias_buffers eval_packing "
            "packing_strategy",
            "the tokenizer's own chat template and tokens are used": "chat_template_path eos_token pad_token "
            "lora_task_type",
            "rows are kept in data.cache_dir, in bounded memory": "dataset_streaming streaming dataset_batch_size",
            "rows are shuffled again in every epoch": "shuffle_dataset",
            "long rows lose their oldest turns first, never their answer": "truncation_mode",
            'rows {"text": ...} are trained whole': "dataset_text_field",
            hugging_face.INTERNAL: "router_aux_loss_coef",
        }
    ),
    without=grouped({"the base's own": "model_revision"}),
    read=read,
)
