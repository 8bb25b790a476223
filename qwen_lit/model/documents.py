"""Packed documents in linear attention: padded rows around the mixer alone, so that no state passes between them."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qwen_lit.data.batches import Batch
from qwen_lit.families.table import family_of

SHARE, FREE = 4, 64
"""Padding of a group of documents: at most a quarter of its tokens, or one chunk of the delta rule."""


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Documents in groups of similar length, so that little is padded: the numbers in each group, the longest first.

    Args:
        lengths: tokens of each document.
    """
    groups: list[list[int]] = []
    longest = tokens = 0
    for number in sorted(range(len(lengths)), key=lambda one: -lengths[one]):
        with_it = tokens + lengths[number]
        if not groups or (len(groups[-1]) + 1) * longest - with_it > max(with_it // SHARE, FREE):
            groups.append([])
            longest, with_it = lengths[number], lengths[number]
        groups[-1].append(number)
        tokens = with_it
    return groups


class Documents:
    """Where the documents of a micro-batch lie, and how they are laid out as rows.

    The layout is made once, when the first mixer asks for it, on the device and without waiting for it.
    """

    def __init__(self, batch: Batch) -> None:
        """Keeps the borders.

        Args:
            batch: documents end to end.
        """
        self.lengths, self.cu_seqlens = batch["lengths"], batch["cu_seqlens"]

    @functools.cached_property
    def layout(self) -> tuple[list[Tensor], Tensor]:
        """The rows of each group, int64 ``[documents, longest]``, numbers of tokens in the micro-batch; and the place
        of each token in all rows end to end, int64 ``[tokens]``.

        A row is padded with its own last token: a causal mixer shows it to no token of the row.
        """
        device, groups = self.cu_seqlens.device, alike(self.lengths)
        sizes = [(len(group), self.lengths[group[0]]) for group in groups]
        places, at = [0] * len(self.lengths), 0
        for group, (count, longest) in zip(groups, sizes, strict=True):
            for row, number in enumerate(group):
                places[number] = at + row * longest
            at += count * longest
        host = torch.tensor([[number for group in groups for number in group], places], device="cpu")
        order, starts_of_rows = (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
        starts, lengths = self.cu_seqlens[:-1].long(), self.cu_seqlens.diff().long()
        rows, seen = [], 0
        for count, longest in sizes:
            mine = order[seen : seen + count]
            inside = torch.arange(longest, device=device).minimum(lengths[mine, None] - 1)
            rows.append(starts[mine, None] + inside)
            seen += count
        total = sum(self.lengths)
        moved = torch.repeat_interleave(starts_of_rows - starts, lengths, output_size=total)
        return rows, moved + torch.arange(total, device=device)


class _KeepsApart(nn.Module):
    """A mixer that takes the documents of a pack one by one; mixed into its class."""

    def forward(self, hidden_states: Tensor, *args: Any, documents: Documents | None = None, **kwargs: Any) -> Any:
        if documents is None:
            return super().forward(hidden_states, *args, **kwargs)
        groups, back = documents.layout
        tokens, found = hidden_states.flatten(0, 1), []
        for group in groups:
            rows = tokens.index_select(0, group.flatten()).unflatten(0, group.shape)
            found.append(super().forward(rows, *args, **kwargs).flatten(0, 1))
        return torch.cat(found).index_select(0, back).view_as(hidden_states)


@functools.cache
def _apart(kind: Any) -> Any:
    """The class of a mixer with ``documents`` among the arguments of its forward."""
    return type(kind.__name__, (_KeepsApart, kind), {"__module__": kind.__module__})


def linear_mixers(model: nn.Module) -> list[nn.Module]:
    """The mixers with linear attention of a model for causal language modelling, as transformers builds it."""
    config: Any = model.config
    family = family_of(config)
    blocks: Any = model.get_submodule(family.decoder)
    layers = zip(blocks.layers, family.layers(config), strict=True)
    return [block.linear_attn for block, layer in layers if not layer.attends]


def keep_apart(model: nn.Module) -> None:
    """Let the mixers of a model keep the documents apart that its decoder is called with, ``documents=…``.

    Attention does so by itself, by the positions of the tokens. Without ``documents`` nothing is changed.

    Args:
        model: for causal language modelling, as transformers builds it; changed in place.
    """
    for mixer in linear_mixers(model):
        if not isinstance(mixer, _KeepsApart):
            kind: Any = type(mixer)
            mixer.__class__ = _apart(kind)
