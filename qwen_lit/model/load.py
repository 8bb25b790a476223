"""Finding, checking and loading the base model, and putting the adapter on it."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.names import HUB_NAME

SUPPORTED = ("qwen2", "qwen3")


def check_model_path(name: str) -> None:
    """Reject a base that cannot be one, from its folder alone.

    Raises:
        UserError: no such folder, no ``config.json`` in it, or a name that is neither a folder nor a hub name.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(
                f"model_name_or_path: {name} has no config.json; give the folder that holds the model's files."
            )
        check_shards(folder)
    elif not HUB_NAME.match(name) or folder.parent.is_dir():
        raise UserError(
            f"model_name_or_path: no such folder: {name}; give a folder with config.json, or a hub name like "
            "Qwen/Qwen2.5-7B-Instruct."
        )


def check_shards(folder: Path) -> None:
    """Reject an index of shards that names a file outside the folder, or one that is missing.

    Raises:
        UserError: it does, or it is not an index.
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"model_name_or_path: {index} is not an index of shards ({error}); fetch it again.") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name:
            raise UserError(f"model_name_or_path: {index} names {name!r}, outside its folder; nothing of it is read.")
        if not (folder / name).is_file():
            raise UserError(f"model_name_or_path: {folder} lacks {name}, which its index names; fetch it again.")


def load_config(name: str) -> Any:
    """The model's config, if it is a dense Qwen.

    Raises:
        UserError: the config cannot be had, or its ``model_type`` is not one of ``SUPPORTED``.
    """
    check_model_path(name)
    try:
        config = AutoConfig.from_pretrained(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model_name_or_path: cannot read the config of {name} ({reason}); download the model and give its folder."
        ) from error
    if config.model_type not in SUPPORTED:
        raise UserError(
            f"model_name_or_path: {name} is a {config.model_type!r}, not a Qwen2, Qwen2.5 or Qwen3 dense model."
        )
    return config


def load_tokenizer(name: str) -> Any:
    """The tokenizer that stands beside the model.

    Raises:
        UserError: there is none that loads.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"model_name_or_path: {name} has no tokenizer that loads ({reason}).") from error


def check_targets(config: Any, lora: LoraConfig) -> None:
    """Reject LoRA targets that name nothing in the model, before any weight is read.

    Raises:
        UserError: a name in ``target_modules`` matches no linear of the model.
    """
    targets = lora.target_modules
    if targets is None:
        raise UserError("lora_config.target_modules is not set; name linears, for example [q_proj, k_proj, v_proj].")
    if isinstance(targets, str):
        targets = [targets]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in targets:
        whole = target if target != "all-linear" else ".*"
        if not any(name.endswith("." + target) or name == target or re.fullmatch(whole, name) for name in linears):
            known = sorted({name.rsplit(".", 1)[-1] for name in linears})
            raise UserError(f"lora_config.target_modules: {target!r} matches no linear; the model has {known}.")


def load_base(name: str, quantization: BitsAndBytesConfig | None, device: torch.device) -> nn.Module:
    """The frozen base in bf16, its linears quantised while they are read, on ``device``."""
    where = str(device) if device.index is not None or device.type == "cpu" else f"{device.type}:0"
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=torch.bfloat16,
        quantization_config=quantization,
        device_map={"": where},
        use_safetensors=True,
    )
    model.requires_grad_(False)
    model.config.use_cache = False
    for module in model.modules():
        # In eval mode bitsandbytes would repack CPU weights in place; training after a validation then fails.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
    return model


def shard_layers(model: PeftModel, device: torch.device) -> None:
    """Shard the frozen weights of every decoder layer over all ranks by FSDP2; the adapter stays whole on each.

    Args:
        model: the base with its adapter, in host memory; every rank has the same.
        device: of this rank; the shards and all else are moved there, a layer at a time.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    base: Any = model.base_model.model
    for layer in base.model.layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})


def add_adapter(base: nn.Module, lora: LoraConfig, checkpointing: bool) -> PeftModel:
    """The base with fp32 LoRA weights, in training mode, recomputing activations in backward when asked.

    The base's norms and embeddings stay bf16: Qwen's RMSNorm computes in fp32 by itself.
    """
    lora.task_type = "CAUSAL_LM"
    model = get_peft_model(base, lora)  # type: ignore[arg-type]
    if checkpointing:
        enable = getattr(base, "activation_checkpointing_enable", None)
        if enable is not None:
            enable(activation_checkpointing_kwargs={"use_reentrant": False})
        else:
            base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
            base.enable_input_require_grads()  # type: ignore[operator]
    model.train()
    return model  # type: ignore[return-value]
