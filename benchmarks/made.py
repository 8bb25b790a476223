"""A base of random weights that is made in memory: a shape of any size is measured without a checkpoint or a disk.

Its decoder layers lie in host memory as blocks, as those of a cache file do; all else is on the device.
"""

import mmap
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from random_base import config_of, drawn
from transformers import BitsAndBytesConfig
from transformers.quantizers.auto import AutoHfQuantizer

from qwen_lit.families.table import family_of
from qwen_lit.frozen.blocks import FrozenLinear, Layout
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.store import FrozenStore, LayerModules
from qwen_lit.model.load import empty_model, language_model
from qwen_lit.quantization import loaded_weights


def made_base(shape: str, quantization: BitsAndBytesConfig, device: torch.device, layers: int | None = None) -> Any:
    """A frozen base of which every layer is away.

    Args:
        shape: as of ``random_base.config_of``.
        quantization: 4 bits.
        device: where it computes; random numbers are made and quantised there.
        layers: instead of the shape's.
    """
    config = language_model(config_of(shape, layers))
    base = empty_model(config, torch.bfloat16)
    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=base, device_map={"": str(device)})
    base.is_loaded_in_4bit = True
    base.config.use_cache = False
    torch.manual_seed(0)
    modules = layer_modules(base, device)
    layouts = [one.layout for one in modules]
    blocks = room([layout.size for layout in layouts])
    for number, layout in enumerate(layouts):
        blocks.read(number).copy_(layout.quantize({one.path: drawn(one.shape, device) for one in layout.linears}))
    fill_rest(base, device)
    base.requires_grad_(False)
    base.frozen = FrozenStore(blocks, modules, device)
    base.frozen.hook(base.get_submodule(family_of(config).decoder).layers)
    return base


def layer_modules(base: Any, device: torch.device) -> list[LayerModules]:
    """bitsandbytes' linears of every decoder layer, without bytes of their own."""
    family, held, found = family_of(base.config), loaded_weights(base), []
    for number, layer in enumerate(family.layers(base.config)):
        place, modules, linears = family.block(number), {}, []
        for one in layer.linears:
            module = modules[one.path] = base.get_submodule(f"{place}.{one.path}")
            linears.append(FrozenLinear(one.path, (one.outputs, one.inputs), held[f"{place}.{one.weight}"]))
            how = linears[-1].held
            module.weight = Params4bit(
                torch.empty(0, dtype=torch.uint8, device=device),
                requires_grad=False,
                compress_statistics=how.double,
                quant_type=how.kind,
                blocksize=how.blocksize,
                bnb_quantized=True,
                module=module,
            )
        found.append(LayerModules(Layout(tuple(linears)), modules, torch.bfloat16))
    return found


def room(sizes: list[int]) -> Blocks:
    """Host memory for blocks, from where a page begins."""
    starts = tuple(sum(sizes[:number]) for number in range(len(sizes)))
    memory = mmap.mmap(-1, sum(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return Blocks(torch.frombuffer(memory, dtype=torch.uint8), starts, tuple(sizes))


def fill_rest(base: Any, device: torch.device) -> None:
    """Give random numbers to everything that is in no block, and ones to norms."""
    for name, parameter in list(base.named_parameters()):
        if parameter.is_meta:
            module, _, own = name.rpartition(".")
            is_one = "norm" in name
            value = torch.ones_like(parameter, device=device) if is_one else drawn(parameter.shape, device)
            setattr(base.get_submodule(module), own, torch.nn.Parameter(value, requires_grad=False))
    rotary = base.model.rotary_emb
    base.model.rotary_emb = type(rotary)(base.config).to(device)
    assert not any(one.is_meta for one in base.state_dict().values())
