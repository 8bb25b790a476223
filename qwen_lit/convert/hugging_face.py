"""The words of transformers' TrainingArguments, which most peers share."""

from typing import Any

from qwen_lit.convert.draft import grouped

DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch",
    "max_grad_norm": 1.0,
    "save_steps": 500,
}
"""Where they differ from ours. ``logging_steps`` is left out: 500 shows nothing of most runs."""
WORDS = frozenset(
    "output_dir seed num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim weight_decay adam_beta1 "
    "adam_beta2 max_grad_norm neftune_noise_alpha bf16 fp16 use_cpu gradient_checkpointing logging_steps "
    "save_strategy "
    "save_steps save_total_limit eval_strategy eval_steps load_best_model_at_end metric_for_best_model report_to "
    "run_name project resume_from_checkpoint dataloader_num_workers".split()
)
"""Common words, which most peers' files have under these names."""
RENAMED = {"evaluation_strategy": "eval_strategy"}
"""Older names of them."""
CHOSEN = "the engine chooses its own kernels"
SEVERAL = (
    "for several GPUs give --trainer.devices 2 --trainer.strategy ddp; of a base in 4 bits too large for one of them, "
    "the layers that do not fit wait in host memory by themselves"
)
ALWAYS = "done here in any case"
INTERNAL = "an internal of that trainer"
OWN_REPORTS = "log, TensorBoard, summary.json and report.html have all that is measured"
UNNEEDED = grouped(
    {
        CHOSEN: "use_liger_kernel liger_kernel_config torch_compile torch_compile_backend torch_compile_mode tf32 "
        "attn_implementation optim_args",
        "rows are grouped by length in any case": "group_by_length length_column_name train_sampling_strategy",
        ALWAYS: "do_train do_eval remove_unused_columns average_tokens_across_devices logging_nan_inf_filter "
        "logging_first_step logging_strategy prediction_loss_only save_safetensors include_num_input_tokens_seen "
        "include_for_metrics include_tokens_per_second dataloader_pin_memory",
        INTERNAL: "sortish_sampler gradient_checkpointing_kwargs activation_checkpointing_kwargs use_cache "
        "torch_empty_cache_steps log_level log_level_replica log_on_each_node disable_tqdm "
        "eval_accumulation_steps local_rank eval_do_concat_batches eval_use_gather_object batch_eval_metrics "
        "save_on_each_node debug "
        "accelerator_config dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order label_names ddp_find_unused_parameters "
        "ddp_bucket_cap_mb ddp_broadcast_buffers "
        "ddp_static_graph skip_memory_metrics overwrite_cache use_mps_device jit_mode_eval "
        "ignore_data_skip restore_callback_states_from_checkpoint enable_jit_checkpoint past_index "
        "eval_batch_size ddp_timeout ddp_backend task_type inference_mode peft_type fp16_opt_level "
        "half_precision_backend auto_mapping",
        "held in bfloat16 and computed by trainer.precision": "torch_dtype dtype bf16_full_eval fp16_full_eval",
        "the base is loaded on each rank's own device": "device_map low_cpu_mem_usage",
        "never set, and Qwen needs none": "trust_remote_code",
        "the token of `hf auth login` is used": "hub_token hf_hub_token use_auth_token",
        "validation takes data.batch_size": "per_device_eval_batch_size",
        "TensorBoard is in output_dir/logs": "logging_dir",
        SEVERAL: "deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap "
        "parallelism_config",
    }
)
WITHOUT = grouped(
    {
        "the loss is that of the data's own tokens": "label_smoothing_factor",
        "validation measures the loss, and texts come from `samples` and `qwen-lit predict`": "predict_with_generate "
        "generation_max_length generation_num_beams generation_config do_predict",
        "AdamW with epsilon 1e-8": "adam_epsilon",
        "the order of rows follows seed_everything": "data_seed",
        "every row is trained in each epoch": "dataloader_drop_last",
        "validation comes after training steps": "eval_on_start eval_delay",
        "set data.batch_size; `qwen-lit plan` says what fits": "auto_find_batch_size",
        "a checkpoint holds the optimizer too": "save_only_model",
        "a new run into the folder of another is refused; give another output_dir": "overwrite_output_dir",
        "set the environment's variables for deterministic kernels": "full_determinism",
        "AdamW trains all of the adapter": "optim_target_modules",
        "`qwen-lit export --push_to_hub NAME/MODEL` uploads": "push_to_hub hub_model_id hub_strategy "
        "hub_private_repo hub_always_push hub_revision",
        "the loss alone says which checkpoint is best": "greater_is_better",
        "Trackio is no logger of Lightning": "trackio_space_id trackio_bucket_id trackio_static_space_id",
        "the fast engine sends activations to the host by itself": "activation_checkpointing activation_offloading",
    }
)
