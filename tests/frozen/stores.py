"""A store over a tiny 4-bit model, as the tests of streaming make it."""

import torch

from qwen_lit.families.table import family_of
from qwen_lit.frozen.blocks import FrozenLinear, Layout
from qwen_lit.frozen.host import Blocks
from qwen_lit.frozen.store import FrozenStore, LayerModules
from qwen_lit.quantization import loaded_weights

CPU = torch.device("cpu")


def snapshot(base) -> FrozenStore:
    """Takes the 4-bit weights of a loaded model out of its modules, into blocks on the host; all layers are away."""
    family, held = family_of(base.config), loaded_weights(base)
    layers, blocks = [], []
    for number, block in enumerate(base.get_submodule(family.decoder).layers):
        names = family.layers(base.config)[number].linears
        modules = {one.path: block.get_submodule(one.path) for one in names}
        linears = tuple(
            FrozenLinear(path, tuple(one.weight.quant_state.shape), held[f"{family.block(number)}.{path}.weight"])
            for path, one in modules.items()
        )
        layout = Layout(linears)
        memory = torch.zeros(layout.size, dtype=torch.uint8)
        views = layout.views(memory)
        for path, one in modules.items():
            state = one.weight.quant_state
            views[f"{path}.weight"].copy_(one.weight.data)
            views[f"{path}.absmax"].copy_(state.absmax)
            if state.nested:
                views[f"{path}.nested_absmax"].copy_(state.state2.absmax)
                views[f"{path}.offset"].copy_(state.offset)
            dtype = state.dtype
        layers.append(LayerModules(layout, modules, dtype))
        blocks.append(memory)
    sizes = tuple(one.numel() for one in blocks)
    starts = tuple(sum(sizes[:number]) for number in range(len(sizes)))
    base.frozen = FrozenStore(Blocks(torch.cat(blocks), starts, sizes), layers, CPU)
    return base.frozen


class LateCopies:
    """A device whose copies run as late as they may, and which writes rubbish into a slot as soon as it may."""

    def __init__(self, blocks) -> None:
        self.blocks, self.began, self.waiting, self.marks = blocks, [], {}, 0

    def begin(self, number, slot, free):
        assert free is None or free <= self.marks, "the slot is still in use"
        self.began.append(number)
        slot.fill_(255)
        self.waiting[number] = slot
        return number

    def finish(self, copy):
        self.waiting.pop(copy).copy_(self.blocks.read(copy))

    def mark(self):
        self.marks += 1
        return self.marks

    def close(self):
        self.waiting.clear()
