"""What reports and logs tell of a module whose model is loaded."""

from typing import Any

from qwen_lit.families.table import family_of
from qwen_lit.hardware import product_dtype
from qwen_lit.model.coverage import coverage
from qwen_lit.model.load import count_parameters
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.flops import token_flops
from qwen_lit.quantization import count_linears, described


def module_facts(module: QwenModule) -> dict[str, Any]:
    """The base, the adapter, the engine and the optimizer, as plain values."""
    assert module.model is not None
    trained, _ = module.model.get_nb_trainable_parameters()
    lora, settings, device = module.lora_config, module.settings, module.trainer.strategy.root_device
    targets = lora.target_modules or []
    if not isinstance(targets, str):
        targets = [*targets, *(lora.target_parameters or [])]
    return {
        "model": module.name,
        "parameters": count_parameters(module.config) + int(trained),
        "trained_parameters": int(trained),
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "adapted": str(coverage(module.model)),
        "init_adapter": module.run.config.get("model", {}).get("init_adapter"),
        "quantization": described(module.held_weights(device), count_linears(module.config), product_dtype(device)),
        "engine": module.engine_description,
        "products": module.products.told,
        "learning_rate": settings.learning_rate,
        "lr_scheduler": settings.lr_scheduler,
        "optimizer": module.optimizer_name,
    }


def training_flops(module: QwenModule, length: float, supervised: float) -> tuple[float, float]:
    """Floating-point operations per token: of a training step without recomputation, and of a forward pass of the
    layers.

    Args:
        module: with its model.
        length: tokens of a document.
        supervised: share of the tokens that have a loss.
    """
    assert module.model is not None
    return token_flops(module.model, length, supervised)


def recomputed_share(module: QwenModule) -> float:
    """Share of the layers whose activations are computed again in backward."""
    if module.fast is None:
        return float(module.settings.gradient_checkpointing)
    return module.fast.recompute_layers / len(family_of(module.config).layers(module.config))
