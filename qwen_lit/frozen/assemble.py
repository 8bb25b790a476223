"""A model whose frozen linears are in blocks: transformers' own modules, with nothing read that the blocks have."""

from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig
from transformers.quantizers.auto import AutoHfQuantizer

from qwen_lit.families.table import family_of
from qwen_lit.frozen.blocks import Layout
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.quantize import Checkpoint, layouts_of
from qwen_lit.frozen.store import FrozenStore, LayerModules
from qwen_lit.model.load import empty_model
from qwen_lit.quantization import loaded_weights


@dataclass
class Skeleton:
    """A model without weights, on the meta device, whose linears bitsandbytes has replaced."""

    model: Any
    quantizer: Any
    config: Any
    """Of the language model."""
    dtype: torch.dtype
    """Of all that is not quantised, and of what comes out of the blocks."""

    @staticmethod
    def of(config: Any, quantization: BitsAndBytesConfig, device: torch.device, dtype: torch.dtype) -> "Skeleton":
        """The skeleton of a model.

        Args:
            config: of the language model.
            quantization: of its linears.
            device: where it computes.
            dtype: of all that is not quantised.
        """
        config.dtype = dtype
        model = empty_model(config, dtype)
        quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
        quantizer.preprocess_model(model=model, device_map={"": str(device)}, dtype=dtype)
        return Skeleton(model, quantizer, config, dtype)

    @cached_property
    def layouts(self) -> tuple[Layout, ...] | None:
        """As of ``layouts_of``."""
        return layouts_of(self.config, loaded_weights(self.model))

    @property
    def rest(self) -> int:
        """Bytes of the parameters that are in no block."""
        return sum(p.nbytes for p in self.model.parameters() if not isinstance(p, Params4bit))


def assemble(skeleton: Skeleton, blocks: Blocks, folder: Path, device: torch.device) -> Any:
    """The model as transformers loads it, in evaluation mode, with all of its layers away.

    Args:
        skeleton: of the model, with layouts; it becomes the model.
        blocks: of the layers.
        folder: of the checkpoint, from which all is read that is in no block.
        device: where it computes.

    Raises:
        UserError: the files lack weights of the model.
    """
    model, family = skeleton.model, family_of(skeleton.config)
    decoder = model.get_submodule(family.decoder)
    layers = [
        LayerModules(layout, {one.path: _linear(block, one, device) for one in layout.linears}, skeleton.dtype)
        for layout, block in zip(skeleton.layouts or (), decoder.layers, strict=True)
    ]
    model.frozen = FrozenStore(blocks, layers, device)
    _read_rest(model, folder, device)
    _make_buffers(model, device)
    model.eval()
    with suppress(OSError):
        # Without such a file the model keeps what its config says.
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.name_or_path = model.config._name_or_path = str(folder)
    model.hf_quantizer = skeleton.quantizer
    skeleton.quantizer.postprocess_model(model)
    model.frozen.hook(decoder.layers)
    return model


def _linear(block: nn.Module, one: Any, device: torch.device) -> Any:
    """bitsandbytes' module of a linear, with a weight that the store binds to memory."""
    module: Any = block.get_submodule(one.path)
    module.weight = Params4bit(
        torch.empty(0, dtype=torch.uint8, device=device),
        blocksize=one.held.blocksize,
        compress_statistics=one.held.double,
        quant_type=one.held.kind,
        module=module,
        bnb_quantized=True,
    )
    return module


def _read_rest(model: Any, folder: Path, device: torch.device) -> None:
    """Read the parameters that are in no block, in the dtypes in which transformers would hold them."""
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    with Checkpoint(folder) as checkpoint:
        for name, parameter in list(model.named_parameters(remove_duplicate=False)):
            if parameter.is_meta and (name not in tied or name in checkpoint and not model.config.tie_word_embeddings):
                place, _, own = name.rpartition(".")
                module = model.get_submodule(place)
                # bitsandbytes makes biases in torch's default dtype.
                dtype = model.config.dtype if isinstance(module, Linear4bit) else parameter.dtype
                value = checkpoint.read(name).to(device, dtype)
                setattr(module, own, nn.Parameter(value, requires_grad=parameter.requires_grad))
    model.tie_weights()


def _make_buffers(model: nn.Module, device: torch.device) -> None:
    """Make what is in no file, such as the frequencies of rotary positions: a module of its kind is made anew."""
    for module in list(model.modules()):
        if any(buffer.is_meta for buffer in module._buffers.values() if buffer is not None):
            with device:
                made = type(module)(module.config)
            for name, buffer in made._buffers.items():
                module._buffers[name] = buffer
            for name, value in vars(made).items():
                if isinstance(value, torch.Tensor):
                    setattr(module, name, value)
