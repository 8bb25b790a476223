"""LLaMA-Factory: a YAML or JSON of its arguments, and the ``dataset_info.json`` that its datasets stand in."""

import json
from pathlib import Path
from typing import Any

from qwen_lit.convert import hugging_face
from qwen_lit.convert.draft import Draft, Peer, grouped
from qwen_lit.convert.named import named_sources, with_columns
from qwen_lit.convert.values import is_off, listed, number, spelled, truth, whole

REGISTER = "dataset_info.json"
COLUMNS = {
    "prompt": "instruction",
    "query": "input",
    "response": "output",
    "history": "history",
    "messages": "conversations",
    "system": "system",
    "tools": "tools",
}
"""Its column to our name."""
TAGS = {"role_tag": ("from", "role"), "content_tag": ("value", "content")}
"""Its name of a message's key to the names that are read by themselves; the first is ours."""
ROLES = ("user_tag", "assistant_tag", "observation_tag", "function_tag", "system_tag")
KNOWN_ROLES = (
    "human",
    "user",
    "gpt",
    "assistant",
    "observation",
    "tool",
    "function",
    "function_call",
    "tool_call",
    "system",
    "tool_response",
)
HUBS = {"hf_hub_url": "of the Hugging Face hub", "ms_hub_url": "of ModelScope", "om_hub_url": "of Modelers"}
LOSSES = ("use_dft_loss", "use_asft_loss", "use_eaft_loss")


def read(draft: Draft) -> None:
    """What takes more than one key, and what is refused."""
    stage, kind = str(draft.take("stage", "sft")), str(draft.take("finetuning_type", "lora"))
    if stage not in ("sft", "pt"):
        draft.refuse(f"stage: {stage} is not done here; stage: sft and pt are")
    if kind != "lora":
        draft.refuse(
            f"finetuning_type: {kind} is not done here: an adapter is trained on a frozen base; to do that, "
            "write finetuning_type: lora, lora_rank: 32"
        )
    if not is_off(draft.take("train_on_prompt")):
        draft.refuse("train_on_prompt: true is not done here: the answers alone are trained; take it out to do that")
    for key in LOSSES:
        if not is_off(draft.take(key)):
            draft.refuse(f"{key}: true is another loss than the one of this trainer; take it out to do without it")
    if stage == "pt":
        draft.note('stage: pt: rows {"text": ...} are trained whole; others are trained as instructions')
    template = draft.take("template")
    if template is not None:
        draft.note(f"not needed: template: {template}: the tokenizer's own chat template is used")
    rank = whole("lora_rank", draft.given.get("lora_rank") or 8)
    draft.move("lora_rank", "lora_config.r")
    if draft.given.get("lora_alpha") is None:
        draft.put("lora_config.lora_alpha", 2 * rank, "LLaMA-Factory's default, twice lora_rank")
    quantization(draft)
    steps = draft.take("pissa_iter", 16)
    if not is_off(draft.take("pissa_init")):
        kind = "pissa" if number("pissa_iter", steps) < 0 else f"pissa_niter_{steps}"
        draft.put("lora_config.init_lora_weights", kind, f"pissa_init: true, pissa_iter: {steps}")
    if (given := draft.take("disable_gradient_checkpointing")) is not None:
        draft.put(
            "gradient_checkpointing",
            not truth("disable_gradient_checkpointing", given),
            f"disable_gradient_checkpointing: {spelled(given)}",
        )
    if not is_off(draft.given.get("mask_history")):
        draft.put("train_on", "last", "mask_history: true")
    draft.take("mask_history")
    packed, neat = draft.take("packing"), draft.take("neat_packing")
    if not (is_off(packed) and is_off(neat)):
        draft.put("packing", True, "packing: true" if is_off(neat) else "neat_packing: true")
    trackers(draft)
    datasets(draft)


def quantization(draft: Draft) -> None:
    """Bits and method; what is not bitsandbytes becomes nf4."""
    bits, method = draft.take("quantization_bit"), str(draft.take("quantization_method", "bnb")).lower()
    double = draft.take("double_quantization", True)
    draft.move("quantization_type", "quantization_config.bnb_4bit_quant_type")
    if bits is None:
        return
    held = 8 if str(bits) == "8" else 4
    draft.put(f"quantization_config.load_in_{held}bit", True, f"quantization_bit: {bits}")
    draft.put("quantization_config.bnb_4bit_use_double_quant", double, "double_quantization: " + spelled(double))
    if str(bits) not in ("4", "8") or not method.startswith(("bnb", "bitsandbytes")):
        draft.note(
            f"quantization_bit: {bits}, quantization_method: {method}: the base is held in {held} bits of "
            "bitsandbytes here"
        )


def trackers(draft: Draft) -> None:
    """SwanLab has keys of its own."""
    own = {word: draft.take(f"swanlab_{word}") for word in ("project", "workspace", "run_name", "mode")}
    if is_off(draft.take("use_swanlab")):
        return
    draft.put("report_to", [*listed("report_to", draft.take("report_to")), "swanlab"], "use_swanlab: true")
    for word, value in (own | {"project": own["project"] or "llamafactory"}).items():
        if value is not None:
            draft.put(word, value)


def datasets(draft: Draft) -> None:
    """Names of datasets to the files and columns that ``dataset_info.json`` gives them."""
    folder = draft.take("dataset_dir", "data")
    if isinstance(folder, dict):
        place, register = Path("data"), folder
    else:
        place, register = registered(draft, str(folder))
    for key in ("dataset", "eval_dataset"):
        value = draft.take(key)
        items = []
        for name in listed(key, value):
            found = register.get(str(name))
            if isinstance(found, dict):
                items += source(draft, str(name), found, place)
            else:
                path = str(name) if "/" in str(name) or "." in str(name) else f"{place}/{name}.json"
                items.append({"path": path})
                draft.note(f"{key}: {name}: no {REGISTER} tells its file; {path} is written, set it to yours")
        if items:
            draft.put(key, items, f"{key}: {spelled(value)}")


def registered(draft: Draft, folder: str) -> tuple[Path, dict[str, Any]]:
    """The folder of the datasets as it is reached from here, and what ``dataset_info.json`` says."""
    beside = draft.path.parent
    for place in (Path(folder), beside / folder, beside, *(above / folder for above in beside.absolute().parents[:3])):
        try:
            found = json.loads((place / REGISTER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return place, found
    return Path(folder), {}


def source(draft: Draft, name: str, given: dict[str, Any], place: Path) -> list[dict[str, Any]]:
    """One dataset of the register."""
    if given.get("ranking") or any(key in (given.get("columns") or {}) for key in ("chosen", "rejected", "kto_tag")):
        draft.refuse(f"dataset: {name} is preference data, which is not trained here")
        return []
    if any((given.get("columns") or {}).get(key) for key in ("images", "videos", "audios")):
        draft.note(f"dataset: {name}: rows with pictures, videos or sound are refused")
    hub = next((key for key in HUBS if key in given), None)
    if hub:
        path = str(given[hub])
        if hub != "hf_hub_url":
            draft.note(f"dataset: {name} is {path} {HUBS[hub]}; datasets come from the Hugging Face hub, or as files")
    elif "file_name" in given:
        path = (place / str(given["file_name"])).as_posix()
    else:
        path = str(given.get("script_url") or given.get("cloud_file_name"))
        draft.note(f"dataset: {name} is {path}, which is not read here; save it as JSONL and give its path")
    entry = {"path": path, "name": given.get("subset"), "split": given.get("split")}
    items = with_columns(named_sources(draft, f"dataset: {name}", entry), columns(draft, name, given))
    return [{**one, "max_rows": int(given["num_samples"])} for one in items] if given.get("num_samples") else items


def columns(draft: Draft, name: str, given: dict[str, Any]) -> dict[str, str]:
    """The columns of one dataset that are not found by themselves."""
    mapped = {COLUMNS[key]: str(theirs) for key, theirs in (given.get("columns") or {}).items() if key in COLUMNS}
    mapped = {ours: theirs for ours, theirs in mapped.items() if theirs != ours and theirs != "messages"}
    tags = given.get("tags") or {}
    for key, known in TAGS.items():
        if key in tags and tags[key] not in known:
            mapped[known[0]] = str(tags[key])
    for key in ROLES:
        if key in tags and str(tags[key]).lower() not in KNOWN_ROLES:
            draft.note(f"dataset: {name}: {key} {tags[key]!r} is no role that is known; rename it, as to 'user'")
    return mapped


OTHER = "belongs to a stage or a method that is not done here"
PEER = Peer(
    name="LLaMA-Factory",
    marks=frozenset(
        "stage finetuning_type cutoff_len dataset_dir lora_rank lora_target quantization_bit quantization_method "
        "neat_packing do_train template train_on_prompt mask_history flash_attn preprocessing_num_workers plot_loss "
        "disable_gradient_checkpointing adapter_name_or_path overwrite_cache additional_target mix_strategy "
        "double_quantization use_unsloth".split()
    ),
    words={
        "model_name_or_path": "model_name_or_path",
        "adapter_name_or_path": "init_adapter",
        "cutoff_len": "max_length",
        "val_size": "val_size",
        "max_samples": "max_samples",
        "preprocessing_num_workers": "dataset_num_proc",
        "lora_alpha": "lora_config.lora_alpha",
        "lora_dropout": "lora_config.lora_dropout",
        "lora_target": "lora_config.target_modules",
        "additional_target": "lora_config.modules_to_save",
        "use_rslora": "lora_config.use_rslora",
        "use_dora": "lora_config.use_dora",
        "loraplus_lr_ratio": "lora_plus_ratio",
        "pure_bf16": "pure_bf16",
        "early_stopping_steps": "early_stopping_patience",
    },
    defaults=hugging_face.DEFAULTS
    | {
        "lora_config.r": 8,
        "lora_config.target_modules": "all",
        "max_length": 2048,
        "gradient_checkpointing": True,
    },
    unneeded=grouped(
        {
            hugging_face.CHOSEN: "flash_attn use_unsloth use_unsloth_gc enable_liger_kernel use_reentrant_gc "
            "shift_attn "
            "upcast_layernorm upcast_lmhead_output use_v1_kernels fp8 fp8_backend "
            "fp8_enable_fsdp_float8_all_gather",
            "a tool call is rendered by the tokenizer's own template": "tool_format",
            "report.html draws the curves": "plot_loss",
            hugging_face.OWN_REPORTS: "include_effective_tokens_per_second print_param_status compute_accuracy",
            "tokenised rows are kept in data.cache_dir by what is in the files": "tokenized_path streaming "
            "buffer_size "
            "preprocessing_batch_size data_shared_file_system",
            "the rows themselves say what was thought": "enable_thinking preserve_thinking",
            "of chat, export, evaluation or serving": "infer_backend infer_dtype offload_folder use_kv_cache "
            "do_sample "
            "temperature top_p top_k num_beams max_length max_new_tokens repetition_penalty length_penalty "
            "skip_special_tokens eval_num_beams vllm_maxlen vllm_gpu_util vllm_enforce_eager vllm_max_lora_rank "
            "vllm_config sglang_maxlen "
            "sglang_mem_fraction sglang_tp_size sglang_config sglang_lora_backend export_dir export_size "
            "export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples "
            "export_quantization_maxlen export_legacy_format export_hub_model_id task task_dir n_shot lang save_dir "
            "batch_size download_mode",
            hugging_face.INTERNAL: "use_fast_tokenizer ignore_pad_token_for_loss model_max_length block_diag_attn "
            "compute_dtype quantization_device_map moe_aux_loss_coef cache_dir adapter_folder hyper_parallel_args "
            "use_hyper_parallel use_mca ms_hub_token om_hub_token master_addr master_port ray_num_workers "
            "ray_init_kwargs asft_alpha eaft_alpha loraplus_lr_embedding pissa_convert create_new_adapter "
            "ray_run_name ray_storage_path resources_per_worker placement_strategy",
            "text alone is trained": "media_dir image_max_pixels image_min_pixels image_do_pan_and_scan "
            "crop_to_patches "
            "video_max_pixels video_min_pixels video_fps video_maxlen use_audio_in_video audio_sampling_rate "
            "freeze_vision_tower freeze_multi_modal_projector freeze_language_model",
            "see `qwen-lit plan`, and trainer.profiler": "enable_torch_profiler profiler_output_dir "
            "profiler_wait_steps "
            "profiler_warmup_steps profiler_active_steps profiler_repeat profiler_record_shapes "
            "profiler_profile_memory profiler_with_stack profile_modules",
            OTHER: "freeze_trainable_layers freeze_trainable_modules freeze_extra_modules module_dropout oft_rank "
            "oft_block_size oft_target pref_beta pref_ftx pref_bco_weight pref_loss dpo_label_smoothing "
            "kto_chosen_weight kto_rejected_weight simpo_gamma ppo_buffer_size ppo_epochs ppo_score_norm ppo_target "
            "ppo_whiten_rewards ref_model ref_model_adapters ref_model_quantization_bit reward_model "
            "reward_model_adapters reward_model_quantization_bit reward_model_type ld_alpha use_galore galore_target "
            "galore_rank galore_update_interval galore_scale galore_proj_type galore_layerwise use_apollo "
            "apollo_target apollo_rank apollo_update_interval apollo_scale apollo_proj apollo_proj_type "
            "apollo_scale_type apollo_layerwise apollo_scale_front use_badam badam_mode badam_start_block "
            "badam_switch_mode badam_switch_interval badam_update_ratio badam_mask_mode badam_verbose use_llama_pro "
            "use_kt kt_weight_path kt_expert_checkpoint_path kt_use_lora_experts kt_lora_expert_num "
            "kt_lora_expert_intermediate_size",
        }
    ),
    without=grouped(
        {
            "rows are mixed by data.dataset_path: [{path: FILE, weight: 2.0}]": "mix_strategy interleave_probs",
            "one validation loss is measured over all rows": "eval_on_each_dataset",
            "rows are shuffled again in every epoch": "disable_shuffling",
            "AdamW is the optimizer here": "use_adam_mini use_muon",
            "rows without a system prompt get the one of the tokenizer's template": "default_system",
            "the vocabulary stays the base's": "resize_vocab add_tokens add_special_tokens new_special_tokens_config "
            "init_special_tokens split_special_tokens",
            "the base's own": "rope_scaling mixture_of_depths train_from_scratch model_revision",
            "SwanLab's messages are set up in SwanLab": "swanlab_api_key swanlab_logdir swanlab_lark_webhook_url "
            "swanlab_lark_secret",
        }
    ),
    read=read,
)
