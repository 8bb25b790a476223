"""The decoder layers of a checkpoint in 4 bits, a layer at a time."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from qwen_lit.errors import UserError
from qwen_lit.families.table import family_of
from qwen_lit.frozen.blocks import PAGE, FrozenLinear, Layout
from qwen_lit.hub import SINGLE, shards
from qwen_lit.prequantized import names_on_disk
from qwen_lit.quantization import Held


def layouts_of(config: Any, held: Mapping[str, Held]) -> tuple[Layout, ...] | None:
    """The blocks of a model's layers, before one is read.

    Args:
        config: of the language model.
        held: how its weights will be held, by the names of the base, as ``planned_weights`` tells.

    Returns:
        None where not all of what is quantised are linears of decoder layers in 4 bits, or nothing is.
    """
    family, found = family_of(config), []
    for number, layer in enumerate(family.layers(config)):
        named = [(one, held.get(f"{family.block(number)}.{one.weight}")) for one in layer.linears]
        found.append(
            Layout(
                tuple(FrozenLinear(one.path, (one.outputs, one.inputs), how) for one, how in named if how is not None)
            )
        )
    kinds = {(how.kind in ("nf4", "fp4"), how.matrices) for how in held.values()}
    return (
        tuple(found) if held and kinds == {(True, 1)} and sum(len(one.linears) for one in found) == len(held) else None
    )


class Checkpoint:
    """The tensors of a model's files by the names of its parameters in transformers; a file is mapped while it is
    open."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, ExitStack()
        self.opened: dict[str, Any] = {}
        for file in shards(folder) or [SINGLE]:
            handle = self.files.enter_context(safe_open(folder / file, framework="pt"))
            self.opened |= dict.fromkeys(handle.keys(), handle)
        self.names = names_on_disk(folder, self.opened)

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *error: object) -> None:
        self.files.close()

    def __contains__(self, own: str) -> bool:
        return all(name in self.opened for name in self.names.get(own, ("",)))

    def read(self, own: str) -> Tensor:
        """A parameter as it is stored, on the CPU.

        Args:
            own: its name in transformers.

        Raises:
            UserError: the files lack it.
        """
        if own not in self:
            raise UserError(f"model_name_or_path: {self.folder} lacks {own}; fetch its files again.")
        (name,) = self.names[own]
        return self.opened[name].get_tensor(name)  # type: ignore[no-any-return]


def touch(weight: Tensor) -> None:
    """Have a tensor of a mapped file in memory: a page of it is read when a byte of it is.

    Args:
        weight: contiguous.
    """
    weight.view(-1).view(torch.uint8)[::PAGE].sum()


def quantized_layers(
    folder: Path, config: Any, layouts: Sequence[Layout], dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """The block of each layer of a checkpoint; two layers of it are in memory at most.

    Args:
        folder: of the checkpoint.
        config: of the language model.
        layouts: of the layers.
        dtype: in which weights are quantised: that of the products.
        device: that quantises them.

    Yields:
        uint8 ``[size]`` on the device.
    """
    family = family_of(config)
    with Checkpoint(folder) as checkpoint, ThreadPoolExecutor(1) as ahead:

        def read(number: int) -> dict[str, Tensor]:
            prefix = family.block(number)
            found = {one.path: checkpoint.read(f"{prefix}.{one.path}.weight") for one in layouts[number].linears}
            for weight in found.values():
                touch(weight)
            return found

        coming = ahead.submit(read, 0)
        for number, layout in enumerate(layouts):
            weights = coming.result()
            if number + 1 < len(layouts):
                coming = ahead.submit(read, number + 1)
            yield layout.quantize({path: weight.to(device).to(dtype) for path, weight in weights.items()})
