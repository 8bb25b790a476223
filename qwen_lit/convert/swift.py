"""ms-swift: a YAML or JSON of its arguments, an ``args.json``, or a script that calls ``swift sft``."""

import json
import re
from typing import Any

from qwen_lit.convert import hugging_face
from qwen_lit.convert.draft import Draft, Peer, grouped
from qwen_lit.convert.named import is_hub_name, named_sources, with_columns
from qwen_lit.convert.values import is_off, listed, number, spelled, text, whole

TRAINED = ("causal_lm",)
DATASET = re.compile(r"(?:(?P<hub>HF|MS)::)?(?P<path>.+?)(?::(?P<subsets>[\w/-]+))?(?:#(?P<rows>\d+))?")
LONG_ROWS = {"delete": "drop", "raise": "error"}
COLUMNS = ("instruction", "input", "output", "query", "response", "history", "system", "messages", "tools")


def read(draft: Draft) -> None:
    """What takes more than one key, and what is refused."""
    tuner = next((value for key in ("tuner_type", "train_type", "sft_type") if (value := draft.take(key))), "lora")
    if tuner != "lora":
        draft.refuse(
            f"train_type: {tuner} is not done here: an adapter is trained on a frozen base; to do that, "
            "write train_type: lora, lora_rank: 32"
        )
    kind = draft.take("task_type", "causal_lm")
    if kind not in TRAINED or draft.take("rlhf_type") is not None:
        draft.refuse(f"task_type: {kind}, or rlhf, is not done here: answers to instructions are trained")
    if not is_off(draft.take("enable_dft_loss")) or draft.take("loss_type") is not None:
        draft.refuse("enable_dft_loss or loss_type is another loss than the one of this trainer; take it out")
    loss(draft)
    if (template := draft.take("template")) is not None:
        draft.note(f"not needed: template: {template}: the tokenizer's own chat template is used")
    if not is_off(draft.given.get("packing_length")):
        draft.note(f"packing_length: {draft.take('packing_length')}: packs hold batch_size x max_length tokens here")
    if (pattern := draft.take("target_regex")) is not None:
        draft.put("lora_config.target_modules", text("target_regex", pattern), f"target_regex: {spelled(pattern)}")
        draft.take("target_modules")
    weights = draft.take("init_weights")
    if weights is not None:
        low = str(weights).lower()
        draft.put("lora_config.init_lora_weights", low == "true" if low in ("true", "false") else weights)
        if low == "lora-ga":
            draft.refuse("init_weights: lora-ga is not done here; take it out")
    quantization(draft)
    batch = max(1, whole("per_device_train_batch_size", draft.given.get("per_device_train_batch_size") or 1))
    processes = str(draft.given.get("nproc_per_node") or 1)
    ranks = max(1, int(processes)) if processes.isdigit() else 1
    if draft.given.get("gradient_accumulation_steps") is None:
        draft.put("gradient_accumulation_steps", -(-16 // (batch * ranks)), "ms-swift's default, 16 rows a step")
    strategy = str(draft.take("truncation_strategy", "delete"))
    if strategy in LONG_ROWS:
        draft.put("overlong", LONG_ROWS[strategy], f"truncation_strategy: {strategy}")
    else:
        draft.note(f"truncation_strategy: {strategy}: long rows lose their oldest turns first, never their answer")
    kind = str(draft.take("torch_dtype", "")).lower()
    if kind == "float16":
        draft.put("fp16", True, "torch_dtype: float16")
    for key in ("adapters", "resume_from_checkpoint"):
        for value in listed(key, draft.take(key)):
            draft.put({"adapters": "init_adapter"}.get(key, key), value, f"{key}: {spelled(value)}")
    if is_off(draft.given.get("use_hf")) and is_hub_name(str(draft.given.get("model"))):
        draft.write("model.hub", "modelscope", "ms-swift's default; without it, the Hugging Face hub")
    trackers(draft)
    datasets(draft)


def loss(draft: Draft) -> None:
    """Which words are trained."""
    given = draft.take("loss_scale", "default")
    parts = [part for part in str(given).split("+") if part]
    if "all" in parts:
        draft.refuse("loss_scale: all is not done here: the answers alone are trained; take it out to do that")
    elif "last_round" in parts:
        draft.put("train_on", "last", f"loss_scale: {given}")
    others = [part for part in parts if part not in ("all", "last_round", "default", "ignore_empty_think")]
    if others:
        draft.note(f"no counterpart: loss_scale: {given}; mark what is not to be trained in the rows")


def quantization(draft: Draft) -> None:
    """Bits and method; what is not bitsandbytes becomes nf4."""
    method, bits = draft.take("quant_method"), draft.take("quant_bits")
    bits = bits if bits is not None else draft.take("quantization_bit")
    double = draft.take("bnb_4bit_use_double_quant", True)
    for name in ("compute_dtype", "quant_type", "quant_storage"):
        draft.move(f"bnb_4bit_{name}", f"quantization_config.bnb_4bit_{name}")
    if is_off(bits) or str(bits) == "0":
        return
    held = 8 if str(bits) in ("8", "float8") else 4
    draft.put(f"quantization_config.load_in_{held}bit", True, f"quant_bits: {bits}")
    draft.put("quantization_config.bnb_4bit_use_double_quant", double, f"bnb_4bit_use_double_quant: {spelled(double)}")
    if str(bits) not in ("4", "8") or str(method or "bnb").lower() != "bnb":
        draft.note(f"quant_method: {method}, quant_bits: {bits}: the base is held in {held} bits of bitsandbytes here")


def trackers(draft: Draft) -> None:
    """SwanLab has keys of its own."""
    own = {
        "project": draft.take("swanlab_project"),
        "workspace": draft.take("swanlab_workspace"),
        "run_name": draft.take("swanlab_exp_name"),
        "mode": draft.take("swanlab_mode"),
    }
    if "swanlab" in listed("report_to", draft.given.get("report_to")):
        for word, value in own.items():
            if value is not None:
                draft.put(word, value)


def datasets(draft: Draft) -> None:
    """Datasets as ``[HF::|MS::]PATH[:SUBSET][#ROWS]``, and how often their rows are validated."""
    columns = draft.take("columns")
    if isinstance(columns, str):
        try:
            columns = json.loads(columns)
        except ValueError:
            draft.note(f"columns: {spelled(columns)} is no JSON; set data.fields")
            columns = None
    fields: dict[str, str] = {}
    if isinstance(columns, dict):
        named = {theirs: "instruction" if ours == "query" else ours for theirs, ours in columns.items()}
        fields = {ours: theirs for theirs, ours in named.items() if ours in COLUMNS}
    for key, word in (("dataset", "dataset"), ("val_dataset", "eval_dataset")):
        value = draft.take(key)
        items = [made for one in listed(key, value) for made in with_columns(source(draft, key, str(one)), fields)]
        if items:
            draft.put(word, items, f"{key}: {spelled(value)}")
    ratio = number("split_dataset_ratio", draft.take("split_dataset_ratio", 0))
    strategy = draft.given.get("eval_strategy") or draft.given.get("save_strategy")
    if ratio > 0 and not (strategy is not None and is_off(strategy)):
        draft.put("val_size", ratio, f"split_dataset_ratio: {ratio}")
    if strategy is None or str(strategy).lower() == "steps":
        if draft.given.get("eval_steps") is None and ("eval_dataset" in draft.common or ratio > 0):
            steps = draft.given.get("save_steps") or hugging_face.DEFAULTS["save_steps"]
            draft.put("eval_steps", steps, f"save_steps: {steps}")
    elif draft.given.get("eval_strategy") is None:
        draft.put("eval_strategy", strategy, f"save_strategy: {strategy}")


def source(draft: Draft, key: str, given: str) -> list[dict[str, Any]]:
    """One dataset by its path, its name and the number of its rows."""
    found = DATASET.fullmatch(given)
    assert found is not None
    path = found["path"]
    if is_hub_name(path) and found["hub"] != "HF":
        draft.note(f"{key}: {path} is a name of ModelScope; datasets come from the Hugging Face hub, or as files")
    if path == "swift/self-cognition":
        draft.note(
            f"{key}: {path}: its rows hold {{{{NAME}}}} and {{{{AUTHOR}}}}, which model_name and model_author "
            "fill; save it as JSONL and put them in"
        )
    subsets = found["subsets"].split("/") if found["subsets"] else [None]
    items = [one for name in subsets for one in named_sources(draft, f"{key}: {given}", {"path": path, "name": name})]
    return [{**one, "max_rows": int(found["rows"])} for one in items] if found["rows"] else items


PEER = Peer(
    name="ms-swift",
    marks=frozenset(
        "tuner_type train_type sft_type quant_bits quant_method split_dataset_ratio truncation_strategy attn_impl "
        "lorap_lr_ratio loss_scale tuner_backend lazy_tokenize model_author model_name use_hf target_regex "
        "add_version init_weights freeze_vit val_dataset early_stop_interval custom_register_path model_type "
        "torch_dtype system agent_template external_plugins padding_free".split()
    ),
    words={
        "model": "model_name_or_path",
        "lora_rank": "lora_config.r",
        "lora_alpha": "lora_config.lora_alpha",
        "lora_dropout": "lora_config.lora_dropout",
        "target_modules": "lora_config.target_modules",
        "target_parameters": "lora_config.target_parameters",
        "modules_to_save": "lora_config.modules_to_save",
        "lora_bias": "lora_config.bias",
        "use_rslora": "lora_config.use_rslora",
        "use_dora": "lora_config.use_dora",
        "lorap_lr_ratio": "lora_plus_ratio",
        "max_length": "max_length",
        "packing": "packing",
        "dataset_num_proc": "dataset_num_proc",
        "early_stop_interval": "early_stopping_patience",
        "max_epochs": "num_train_epochs",
    },
    defaults=hugging_face.DEFAULTS
    | {
        "lora_config.r": 8,
        "lora_config.lora_alpha": 32,
        "lora_config.lora_dropout": 0.05,
        "lora_config.target_modules": "all-linear",
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "adam_beta2": 0.95,
        "max_length": 32768,
        "logging_steps": 5,
    },
    unneeded=grouped(
        {
            hugging_face.CHOSEN: "attn_impl experts_impl use_logits_to_keep padding_free padding_side "
            "vit_gradient_checkpointing tuner_backend use_swift_lora lora_dtype enable_npu_model_patch optimizer",
            "rows are kept in data.cache_dir, in bounded memory": "lazy_tokenize load_from_cache_file streaming "
            "shuffle_buffer_size cached_dataset cached_val_dataset packing_num_proc packing_strategy download_mode "
            "dataset_shuffle train_dataloader_shuffle val_dataset_shuffle interleave_prob stopping_strategy",
            "the tokenizer's own chat template is used": "use_chat_template template_backend agent_template "
            "model_type "
            "add_non_thinking_prefix enable_thinking preserve_thinking",
            "the run's own folder is output_dir": "add_version create_checkpoint_symlink",
            "the hub that names are looked for on": "use_hf",
            hugging_face.ALWAYS: "acc_strategy check_model is_binary_loss_scale safe_serialization "
            "max_shard_size strict "
            "enable_channel_loss disable_auto_column_mapping disable_ignore_empty_think",
            hugging_face.INTERNAL: "load_args load_data_args ignore_args_error model_kwargs local_repo_path "
            "max_memory "
            "max_model_len external_plugins custom_register_path custom_dataset_info callbacks use_flash_ckpt "
            "zero_hpz_partition_size deepspeed_autotp_size ds3_gather_for_generation swanlab_token "
            "swanlab_notification_method swanlab_webhook_url swanlab_secret swanlab_sender_email "
            "swanlab_receiver_email swanlab_smtp_server swanlab_smtp_port swanlab_email_language router_aux_loss_coef "
            "num_labels problem_type mrl_dims resume_only_model init_strategy use_ray ray_exp_name device_groups",
            "of generation, which `qwen-lit chat` and vLLM do": "max_new_tokens temperature top_k top_p "
            "repetition_penalty num_beams stream stop_words logprobs top_logprobs structured_outputs_regex "
            "eval_use_evalscope eval_dataset eval_dataset_args eval_limit eval_generation_config extra_eval_args "
            "eval_metric",
            "text alone is trained": "max_pixels norm_bbox freeze_vit freeze_aligner freeze_llm aligner_lr vit_lr",
            "of a method that is not done here": "freeze_parameters freeze_parameters_regex freeze_parameters_ratio "
            "trainable_parameters trainable_parameters_regex lora_ga_batch_size lora_ga_iters lora_ga_max_length "
            "lora_ga_direction lora_ga_scale lora_ga_stable_gamma fourier_n_frequency fourier_scaling boft_block_size "
            "boft_block_num boft_n_butterfly_factor boft_dropout vera_rank vera_projection_prng_key vera_dropout "
            "vera_d_initial adapter_act adapter_length adalora_target_r adalora_init_r adalora_tinit adalora_tfinal "
            "adalora_deltaT adalora_beta1 adalora_beta2 adalora_orth_reg_weight llamapro_num_new_blocks "
            "llamapro_num_groups reft_layer_key reft_layers reft_rank reft_intervention_type reft_args use_galore "
            "galore_target_modules galore_rank galore_update_proj_gap galore_scale galore_proj_type "
            "galore_optim_per_parameter galore_with_embedding galore_quantization galore_proj_quant galore_proj_bits "
            "galore_proj_group_size galore_cos_threshold galore_gamma_proj galore_queue_size lisa_activated_layers "
            "lisa_step_interval hqq_axis decision_drop_instructions decision_subsample_options decision_state_as_text "
            "decision_shuffle_fields",
        }
    ),
    without=grouped(
        {
            "rows without a system prompt get the one of the tokenizer's template": "system",
            "put the name into the rows": "model_name model_author",
            "the answer is trained as it stands in the row": "response_prefix",
            "the vocabulary stays the base's": "new_special_tokens",
            "the base's own": "rope_scaling model_revision",
            "one long row is on one GPU": "sequence_parallel_size",
        }
    ),
    read=read,
)
