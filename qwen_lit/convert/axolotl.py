"""Axolotl: one YAML with the datasets and their types in it."""

from typing import Any

from qwen_lit.convert import hugging_face
from qwen_lit.convert.draft import Draft, Peer, grouped
from qwen_lit.convert.named import named_sources, with_columns
from qwen_lit.convert.values import is_nothing, is_off, listed, spelled, truth

FIELDS = {
    "field_messages": "messages",
    "message_field_role": "role",
    "message_field_content": "content",
    "message_field_training": "train",
    "field_tools": "tools",
    "field_thinking": "reasoning_content",
    "field": "text",
    "text_column": "text",
    "field_system": "system",
    "field_instruction": "instruction",
    "field_input": "input",
    "field_output": "output",
}
"""Its name of a column or key to ours."""
FOUND = {
    "messages": ("messages", "conversations"),
    "role": ("role", "from"),
    "content": ("content", "value"),
    "train": ("train", "weight", "loss"),
    "reasoning_content": ("thinking", "reasoning", "reasoning_content"),
}
"""Our name to those that are found by themselves."""
LONG_ROWS = {"drop": "drop", "raise": "error"}
KNOWN = (
    "alpaca",
    "sharegpt",
    "chat_template",
    "completion",
    "load_",
    "alpaca_chat",
    "alpaca_w_system",
    "context_qa",
    "pretrain",
)
"""Beginnings of axolotl's dataset types whose rows are recognised by their columns here."""
INNER = frozenset(
    {
        *FIELDS,
        "field_human",
        "field_model",
        "path",
        "type",
        "ds_type",
        "data_files",
        "name",
        "split",
        "roles",
        "roles_to_train",
        "chat_template",
        "chat_template_jinja",
        "conversation",
        "message_property_mappings",
        "message_field_training_detail",
        "train_on_eos",
        "train_on_eot",
        "trust_remote_code",
        "revision",
        "shards",
        "shards_idx",
        "preprocess_shards",
        "format",
        "no_input_format",
        "system_prompt",
        "system_format",
        "text_column",
        "skip",
        "split_thinking",
        "template_thinking_key",
        "drop_system_message",
        "input_transform",
        "input_format",
        "temperature",
        "logprobs_field",
    }
)


def read(draft: Draft) -> None:
    """What takes more than one key, and what is refused."""
    method, adapter = draft.take("rl"), draft.take("adapter")
    if method is not None:
        draft.refuse(f"rl: {method} is not done here; take it out to train on instructions")
    for key in ("reward_model", "process_reward_model", "unfrozen_parameters", "qat", "relora", "use_eaft"):
        if not is_off(draft.take(key)):
            draft.refuse(f"{key} is not done here; take it out to train an adapter on instructions")
    if adapter is None:
        draft.refuse(
            "no adapter is set, which is full fine-tuning, and an adapter is trained here; to do that, write "
            "adapter: qlora, lora_r: 32"
        )
    elif adapter not in ("lora", "qlora"):
        draft.refuse(f"adapter: {adapter} is not done here; write adapter: lora or qlora")
    if not is_off(draft.take("train_on_inputs")):
        draft.refuse("train_on_inputs: true is not done here: the answers alone are trained; take it out to do that")
    held = [bits for bits in (4, 8) if not is_off(draft.given.get(f"load_in_{bits}bit"))]
    for bits in (4, 8):
        draft.move(f"load_in_{bits}bit", f"quantization_config.load_in_{bits}bit")
    if held == [4]:
        draft.put("quantization_config.bnb_4bit_use_double_quant", True, "Axolotl's default")
    for name, value in (draft.take("bnb_config_kwargs") or {}).items():
        draft.put(f"quantization_config.{name}", value)
    linear, named = draft.take("lora_target_linear"), draft.take("lora_target_modules")
    if not is_off(linear):
        draft.put("lora_config.target_modules", "all-linear", "lora_target_linear: true")
    elif named is not None:
        draft.put("lora_config.target_modules", named, "lora_target_modules")
    lengths(draft)
    trackers(draft)
    datasets(draft)


def lengths(draft: Draft) -> None:
    """What becomes of long rows, and how often is validated and saved."""
    strategy = draft.take("excess_length_strategy", "drop")
    if strategy in LONG_ROWS:
        draft.put("overlong", LONG_ROWS[strategy], f"excess_length_strategy: {strategy}")
    else:
        draft.note(f"excess_length_strategy: {strategy}: long rows lose their oldest turns first, never their answer")
    checkpointing = draft.take("gradient_checkpointing")
    if checkpointing is not None:
        known = str(checkpointing).lower() in ("true", "false")
        draft.put(
            "gradient_checkpointing",
            truth("", checkpointing) if known else True,
            f"gradient_checkpointing: {spelled(checkpointing)}",
        )
    times = draft.take("saves_per_epoch")
    if times is not None:
        draft.note(
            f"saves_per_epoch: {times}: checkpoint.every_n_train_steps counts steps, and stays at 100; "
            "`qwen-lit plan` shows the steps of an epoch"
        )
    elif draft.given.get("save_steps") is None and draft.given.get("save_strategy") is None:
        draft.put("save_strategy", "epoch", "save_strategy: epoch, Axolotl's default")
    if not is_off(draft.take("auto_resume_from_checkpoints")):
        draft.put("resume_from_checkpoint", True, "auto_resume_from_checkpoints: true")


def trackers(draft: Draft) -> None:
    """Each tracker has keys of its own."""
    names = []
    for name, switch, project in (
        ("wandb", "use_wandb", "wandb_project"),
        ("mlflow", "use_mlflow", "mlflow_experiment_name"),
        ("comet_ml", "use_comet", "comet_project_name"),
        ("trackio", "use_trackio", "trackio_project_name"),
    ):
        if not is_off(draft.take(switch)) or draft.given.get(project):
            names.append(name)
    if not is_off(draft.take("use_tensorboard")):
        names.append("tensorboard")
    for key, word in (
        ("wandb_project", "project"),
        ("wandb_entity", "entity"),
        ("wandb_name", "run_name"),
        ("wandb_run_id", "run_id"),
        ("wandb_mode", "mode"),
        ("wandb_log_model", "log_model"),
        ("mlflow_experiment_name", "project"),
        ("mlflow_run_name", "run_name"),
        ("mlflow_tracking_uri", "tracking_uri"),
        ("comet_project_name", "project"),
        ("comet_workspace", "workspace"),
    ):
        draft.move(key, word)
    if str(draft.common.get("mode")).lower() == "disabled":
        names = [name for name in names if name != "wandb"]
    if names:
        draft.put("report_to", names, ", ".join(name for name in names))


def datasets(draft: Draft) -> None:
    """The datasets with their columns."""
    for key, word in (("datasets", "dataset"), ("pretraining_dataset", "dataset"), ("test_datasets", "eval_dataset")):
        given = draft.take(key)
        if given is None:
            continue
        if key == "pretraining_dataset":
            draft.note('pretraining_dataset: rows {"text": ...} are trained whole')
        entries = [given] if isinstance(given, dict | str) else given
        items = [one for entry in entries for one in source(draft, key, entry)]
        if items:
            draft.put(word, [*draft.common.get(word, []), *items], key)


def source(draft: Draft, key: str, entry: Any) -> list[dict[str, Any]]:
    """One dataset with its columns."""
    entry = {"path": entry} if isinstance(entry, str) else dict(entry)
    path, kind = str(entry.get("path")), entry.get("type")
    where = f"{key}: {path}"
    if isinstance(kind, dict):
        entry |= kind
        if any(kind.get(name) for name in ("format", "no_input_format", "system_format", "system_prompt")):
            draft.note(f"{where}: its format is left out: question and input are joined by an empty line")
    elif kind is not None and not str(kind).startswith(KNOWN):
        draft.note(f"{where}: type {kind}: rows are told by their columns here; look with `qwen-lit inspect`")
    if str(kind).startswith(("dpo", "kto", "orpo", "bradley")):
        draft.refuse(f"{where}: type {kind} is preference data, which is not trained here")
        return []
    if str(kind) == "input_output":
        draft.refuse(f"{where}: type input_output (segments) is not read here; write messages")
        return []
    trained = [str(one) for one in listed("", entry.get("roles_to_train"))]
    if set(trained) - {"assistant", "gpt", "model"}:
        draft.refuse(
            f"{where}: roles_to_train: {', '.join(trained)} is not done here: the assistant's words alone are trained"
        )
    if entry.get("train_on_eos") not in (None, "turn", "all"):
        draft.note(f"{where}: train_on_eos: {entry['train_on_eos']}: each trained answer ends with <|im_end|> here")
    for name in (one for one in entry if one not in INNER and not is_off(entry[one])):
        draft.note(f"no counterpart: {where}: {name}: {spelled(entry[name])}")
    properties = entry.get("message_property_mappings") or {}
    mapped = {FIELDS[name]: str(entry[name]) for name in FIELDS if not is_nothing(entry.get(name))}
    mapped |= {name: str(theirs) for name, theirs in properties.items() if name in ("role", "content")}
    columns = {ours: theirs for ours, theirs in mapped.items() if theirs not in FOUND.get(ours, (ours,))}
    return with_columns(named_sources(draft, where, entry), columns)


PEER = Peer(
    name="Axolotl",
    marks=frozenset(
        "base_model micro_batch_size sequence_len sample_packing val_set_size adapter lora_target_linear num_epochs "
        "train_on_inputs pad_to_sequence_len saves_per_epoch evals_per_epoch dataset_prepared_path wandb_project "
        "flash_attention special_tokens lora_model_dir early_stopping_patience xformers_attention pretraining_dataset "
        "datasets eval_sample_packing".split()
    ),
    words={
        "base_model": "model_name_or_path",
        "lora_model_dir": "init_adapter",
        "lora_r": "lora_config.r",
        "lora_alpha": "lora_config.lora_alpha",
        "lora_dropout": "lora_config.lora_dropout",
        "lora_modules_to_save": "lora_config.modules_to_save",
        "lora_rank_pattern": "lora_config.rank_pattern",
        "lora_alpha_pattern": "lora_config.alpha_pattern",
        "lora_target_parameters": "lora_config.target_parameters",
        "peft_layers_to_transform": "lora_config.layers_to_transform",
        "peft_layers_pattern": "lora_config.layers_pattern",
        "peft_use_dora": "lora_config.use_dora",
        "peft_use_rslora": "lora_config.use_rslora",
        "peft_init_lora_weights": "lora_config.init_lora_weights",
        "peft_trainable_token_indices": "lora_config.trainable_token_indices",
        "peft_layer_replication": "lora_config.layer_replication",
        "peft_ensure_weight_tying": "lora_config.ensure_weight_tying",
        "loraplus_lr_ratio": "lora_plus_ratio",
        "sequence_len": "max_length",
        "sample_packing": "packing",
        "val_set_size": "val_size",
        "dataset_processes": "dataset_num_proc",
        "dataset_num_proc": "dataset_num_proc",
        "micro_batch_size": "per_device_train_batch_size",
        "num_epochs": "num_train_epochs",
        "optimizer": "optim",
        "lr_scheduler": "lr_scheduler_type",
        "evals_per_epoch": "evals_per_epoch",
        "bfloat16": "pure_bf16",
        "float16": "fp16",
        "early_stopping_patience": "early_stopping_patience",
        "noisy_embedding_alpha": "neftune_noise_alpha",
    },
    defaults={
        "num_train_epochs": 1,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.03,
        "optim": "adamw_torch_fused",
        "max_grad_norm": 1.0,
        "max_length": 512,
        "gradient_checkpointing": False,
        "output_dir": "./model-out",
        "save_total_limit": 4,
    },
    unneeded=grouped(
        {
            hugging_face.CHOSEN: "flash_attention sdp_attention xformers_attention flex_attention sage_attention "
            "eager_attention flash_attn_cross_entropy flash_attn_rms_norm flash_attn_fuse_mlp flash_optimum "
            "flex_attn_compile_kwargs lora_mlp_kernel lora_qkv_kernel lora_o_kernel lora_embedding_kernel "
            "chunked_cross_entropy chunked_cross_entropy_num_chunks tiled_mlp tiled_mlp_num_shards "
            "tiled_mlp_use_original_mlp torch_compile_options use_kernels liger_rope liger_rms_norm liger_layer_norm "
            "liger_glu_activation liger_swiglu liger_cross_entropy liger_fused_linear_cross_entropy cut_cross_entropy "
            "plugins unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_qkv unsloth_lora_o unsloth_rms_norm "
            "unsloth_rope fused_attn_kernel sdpa_varlen large_head_attention flash_attn_d512 experts_implementation "
            "gemma4_hybrid_attn_impl s2_attention fp32_norms fp32_norm_classes selective_checkpointing "
            "quantize_moe_experts fp8 fp8_config fp8_enable_fsdp_float8_all_gather deepcompile "
            "ple_cpu_offload llama4_linearized_experts use_onebitllms",
            "the tokenizer's own chat template is used": "chat_template chat_template_jinja chat_template_kwargs "
            "eot_tokens tokenizer_save_jinja_files",
            "of the tokenizer, which is taken as it is": "tokenizer_type tokenizer_use_fast tokenizer_legacy "
            "tokenizer_use_mistral_common processor_type processor_kwargs model_type type_of_model "
            "is_llama_derived_model is_falcon_derived_model is_mistral_derived_model is_qwen_derived_model "
            "base_model_config cls_model_config tokenizer_config",
            "rows are kept in data.cache_dir, in bounded memory": "dataset_prepared_path dataset_keep_in_memory "
            "skip_prepare_dataset num_dataset_shards_to_save streaming streaming_multipack_buffer_size "
            "pretrain_multipack_buffer_size preprocess_iterable is_preprocess dataset_shard_num dataset_shard_idx "
            "push_dataset_to_hub hf_use_auth_token",
            "packing takes whole rows, and padding is no question of speed": "pad_to_sequence_len eval_sample_packing "
            "sample_packing_group_size sample_packing_bin_size sample_packing_sequentially "
            "sample_packing_mp_start_method multipack_real_batches batch_flattening pad_to_multiple_of "
            "pretrain_multipack_attn pretraining_sample_concatenation sample_packing_eff_est total_num_tokens "
            "total_supervised_tokens curriculum_sampling",
            hugging_face.ALWAYS: "shuffle_merged_datasets shuffle_before_merging_datasets include_tkps strict "
            "lora_fan_in_fan_out peft_autocast_adapter_dtype eval_causal_lm_metrics do_causal_lm_eval",
            hugging_face.INTERNAL: "world_size ddp gc_steps gc_collect_steps lora_on_cpu qlora_sharded_model_loading "
            "device gptq merge_lora merge_method loss_watchdog_threshold loss_watchdog_patience "
            "experimental_skip_move_to_device axolotl_config_path capabilities env_capabilities dynamic_checkpoint "
            "torchdistx_path bench_dataset bench_split do_bench_eval eval_table_size eval_max_new_tokens "
            "use_ray ray_run_name ray_num_workers resources_per_worker gradio_title gradio_share gradio_server_name "
            "gradio_server_port gradio_max_new_tokens gradio_temperature profiler_steps profiler_steps_start "
            "use_otel_metrics otel_metrics_host otel_metrics_port max_packed_sequence_len loraplus_lr_embedding "
            "wandb_watch comet_api_key comet_experiment_key comet_mode comet_online comet_experiment_config "
            "hf_mlflow_log_artifacts trackio_project_name trackio_run_name eaft_alpha eaft_k",
            "trainer.precision says in what is computed": "float32",
            "set model.memory_budget for less than what is free": "max_memory gpu_memory_limit",
            "see the section `samples`": "generate_samples num_generation_samples generation_max_new_tokens "
            "generation_temperature generation_top_p generation_top_k generation_prompt_ratio generation_do_sample",
            "layers in 4 bits that do not fit the card wait in host memory by themselves": "layer_offloading",
            hugging_face.SEVERAL: "fsdp_version fsdp_final_state_dict_type dp_shard_size dp_replicate_size",
            "of a method that is not done here": "trl vllm ebft num_labels dpo_use_weighting dpo_label_smoothing "
            "precompute_ref_log_probs dpo_use_liger_kernel dpo_padding_free dpo_loss_type dpo_loss_weights "
            "center_rewards_coefficient orpo_alpha simpo_gamma cpo_alpha rpo_alpha kto_desirable_weight dpo_beta "
            "kto_undesirable_weight rl_beta max_prompt_len dpo_use_logits_to_keep dpo_generate_during_eval "
            "dpo_norm_loss trainer_cls relora_prune_ratio relora_prune_method relora_cpu_offload "
            "jagged_restart_steps jagged_restart_warmup_steps jagged_restart_anneal_steps lisa_n_layers "
            "lisa_step_interval lisa_layers_attribute image_size image_resize_algorithm role_boundaries "
            "freeze_mm_modules quantization qgalore_rank qgalore_update_proj_gap qgalore_scale qgalore_proj_type "
            "qgalore_proj_quant qgalore_proj_bits qgalore_proj_group_size qgalore_cos_threshold qgalore_gamma_proj "
            "qgalore_queue_size dion_lr dion_momentum dion_rank_fraction dion_rank_multiple_of",
        }
    ),
    without=grouped(
        {
            "the learning rate falls to 0": "cosine_min_lr_ratio cosine_constant_lr_ratio lr_quadratic_warmup "
            "lr_div_factor lr_groups embedding_lr embedding_lr_scale",
            "AdamW is the optimizer here": "adam_epsilon2 adam_beta3",
            "the vocabulary stays the base's": "special_tokens tokens added_tokens_overrides fix_untrained_tokens "
            "resize_token_embeddings_to_32x mean_resizing_embeddings shrink_embeddings embeddings_skip_upcast",
            "the base's own": "overrides_of_model_config overrides_of_model_kwargs revision_of_model rope_scaling "
            "model_quantization_config model_quantization_config_kwargs reinit_weights scaling_softmax "
            "scaling_softmax_factor scaling_softmax_bias use_pose pose_split_on_token_ids pose_max_context_len "
            "pose_num_chunks",
            "one long row is on one GPU": "sequence_parallel_degree context_parallel_size heads_k_stride "
            "ring_attn_func "
            "tensor_parallel_size",
            "rows without a system prompt get the one of the tokenizer's template": "default_system_message",
            "duplicates are counted by `qwen-lit inspect`, and trained": "dataset_exact_deduplication",
            "the longest row is data.max_length for both": "eval_sequence_len min_sample_len",
            "set data.batch_size and trainer.accumulate_grad_batches": "batch_size",
            "peft.loftq_config is a key of model.lora_config": "peft",
            "the first checkpoint comes after checkpoint.every_n_train_steps": "save_first_step",
        }
    ),
    read=read,
)
