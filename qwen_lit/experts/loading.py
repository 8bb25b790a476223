"""Experts are quantised as they are read, a layer at a time, by transformers' own loader.

bitsandbytes replaces linears alone, so transformers leaves experts, which are parameters, in 16 bits: of a 30B model
with 3B active parameters, 55 GiB where 4 bits take 16.
"""

import logging
from typing import Any

from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from qwen_lit.experts.forward import use_own_function
from qwen_lit.experts.stacked import PARAMETERS, Stacked4bit, held_4bit, stacks

log = logging.getLogger(__name__)
BLOCKSIZE = 64
"""Numbers that share a scale, as in bitsandbytes' linears."""


class Quantize(ConversionOps):
    """Make the bytes of ``Stacked4bit`` out of experts that the loader has put together; linears are bitsandbytes'."""

    def __init__(self, linears: ConversionOps) -> None:
        self.linears = linears

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As transformers' loader calls it: the tensors of one module, by parameter name.

        Args:
            input_dict: the tensors.
            args: not used by the loader.
            kwargs: ``model``, which is loaded, and more.
        """
        (name, value), *_ = input_dict.items()
        module, own = get_module_from_name(kwargs["model"], name)
        form = held_4bit(module).get(own)
        if form is None:
            return self.linears.convert(input_dict, *args, **kwargs)
        weight = value[0] if isinstance(value, list) else value
        return {name: nn.Parameter(form.quantize(weight.to(form.dtype)), requires_grad=False)}


class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer of bitsandbytes' 4-bit linears, and of experts beside them."""

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        super()._process_model_before_weight_loading(model, device_map, **kwargs)
        if self.pre_quantized:
            return
        config = self.quantization_config
        for name, module in stacks(model):
            for own, parts in PARAMETERS.items():
                weight = getattr(module, own)
                count, rows, columns = weight.shape
                skipped = self.modules_to_not_convert
                if not all(should_convert_module(one, skipped) for one in (name, f"{name}.{own}")):
                    continue
                if rows % parts or columns % BLOCKSIZE:
                    # bitsandbytes' CPU kernel is wrong where a block goes on in the next row.
                    log.warning(
                        "%s.%s stays in 16 bits: %d columns are no blocks of %d", name, own, columns, BLOCKSIZE
                    )
                    continue
                form = Stacked4bit(
                    *(count, rows, columns, parts, config.bnb_4bit_quant_type, BLOCKSIZE),
                    config.bnb_4bit_use_double_quant,
                    weight.dtype,
                    config.bnb_4bit_compute_dtype,
                    config.bnb_4bit_quant_storage,
                )
                module.held_4bit = {**held_4bit(module), own: form}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is quantised while it is read."""
        module, own = get_module_from_name(model, param_name)
        return own in held_4bit(module) or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        """What quantises a parameter, be it a linear's or experts'."""
        return Quantize(super().get_quantize_ops())

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        use_own_function(model)
        return super()._process_model_after_weight_loading(model, **kwargs)


AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = ExpertsQuantizer
