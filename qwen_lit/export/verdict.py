"""Which merge answers as trained: the adapter on its base against each, on held-out rows, layer by layer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, linear, log_softmax

from qwen_lit.experts.forward import Factors, experts_forward
from qwen_lit.experts.stacked import PARAMETERS, stacks
from qwen_lit.export.adapter import Pair, apply_pair, read_adapter
from qwen_lit.export.experts import each_expert
from qwen_lit.export.folder import TORCH, BaseModel, read_json
from qwen_lit.export.merge import fit_names
from qwen_lit.families.table import family_of
from qwen_lit.hardware import product_dtype
from qwen_lit.model.load import empty_model, load_config
from qwen_lit.progress import through
from qwen_lit.quantization import Held, on_disk

log = logging.getLogger(__name__)
LOUD_LOSS = 0.05
"""A merge whose loss is this much above the adapter's, in nats a token, gets a warning."""
NEAR = 0.01
"""Losses that differ by less, in nats a token, are taken as equal."""
CHUNK = 256
"""Rows of logits that exist at a time: 150 MB in float32 for 150,000 words, and about eight such are there at once."""


@dataclass(frozen=True)
class Figures:
    """How a merge answers beside the adapter on its base."""

    loss: float
    """Nats a supervised token."""
    kl: float
    """Kullback-Leibler divergence from the adapter's answer to the merge's, nats a token."""
    same_top: float
    """Share of tokens whose most likely choice is the same."""


@dataclass(frozen=True)
class Verdict:
    """The adapter's own loss, and the figures of each merge."""

    adapter_loss: float
    tokens: int
    rows: int
    merges: dict[str, Figures]

    @property
    def best(self) -> str:
        """The merge with the lower loss; where their losses are near, the one nearer to the adapter."""
        lowest = min(one.loss for one in self.merges.values())
        near = [name for name, one in self.merges.items() if one.loss - lowest <= NEAR]
        return min(near, key=lambda name: self.merges[name].kl)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, with the name of the best merge."""
        return asdict(self) | {"best": self.best}

    def lines(self) -> list[str]:
        """A table of at most 80 columns."""
        head = f"{'':<24}{'loss':>9}{'KL':>10}{'same top token':>16}"
        rows = [f"{'adapter on its base':<24}{self.adapter_loss:>9.4f}"]
        rows += [
            f"{'merge, ' + name:<24}{one.loss:>9.4f}{one.kl:>10.5f}{one.same_top:>15.2%}"
            for name, one in self.merges.items()
        ]
        return [head, *rows]

    def warning(self, name: str) -> str | None:
        """What is wrong with a merge, if it answers worse than the adapter."""
        worse = self.merges[name].loss - self.adapter_loss
        if worse <= LOUD_LOSS:
            return None
        return (
            f"THE MERGED MODEL ANSWERS WORSE THAN WAS TRAINED: its loss is {worse:.3f} nats a token above the "
            f"adapter's; serve the base with lora_adapter/ instead, or merge with export.merge_base: {self.best}."
        )


def measure(
    adapter_dir: Path,
    base_dir: Path,
    examples: Sequence[tuple[Any, Any]],
    held: Mapping[str, Held],
    device: torch.device,
    original_dir: Path | None = None,
) -> Verdict:
    """Run the rows through the adapter on its base and through each merge, one decoder layer in memory at a time.

    Args:
        adapter_dir: PEFT folder.
        base_dir: folder of the model that was trained on.
        examples: token ids ``[t]`` and trained ranges ``[k, 2]`` of each row.
        held: how the base's quantised weights were held in training; empty for a bf16 base.
        device: where it runs, in its ``product_dtype``.
        original_dir: folder of the original, where the files of ``base_dir`` are quantised.

    Returns:
        Figures of the merge ``original``, where there is one, and, for a quantised base, of ``dequantized``.

    Raises:
        ExportError: the adapter does not fit the base, or cannot be merged.
    """
    has_original = original_dir is not None or not BaseModel(base_dir).stored
    variants = ["adapter", *(["original"] if has_original else []), *(["dequantized"] if held else [])]
    family = family_of(read_json(base_dir / "config.json"))
    model = empty_model(load_config(base_dir), product_dtype(device)).eval()
    decoder = model.get_submodule(family.decoder)
    trained = _Weights(adapter_dir, base_dir, held, device)
    original = _Weights(adapter_dir, original_dir, held, device) if original_dir is not None else trained
    sources = {name: original if name == "original" else trained for name in variants}
    rotary = type(decoder.rotary_emb)(model.config).to(device)
    rows = [torch.tensor(ids, dtype=torch.int64, device=device)[None] for ids, _ in examples]
    with torch.no_grad():
        hidden = {}
        for name in variants:
            embed = sources[name].of(f"{family.embedding}.weight", name)
            hidden[name] = [embed[row] for row in rows]
            del embed
        for number, layer in enumerate(through(decoder.layers, "comparing the merges", "layers")):
            layer.to_empty(device=device)
            for name in variants:
                hooks = sources[name].load(layer, family.block(number) + ".", name)
                for index, row in enumerate(rows):
                    positions = torch.arange(row.shape[1], device=device)[None]
                    # A rotation of three positions: on text they are equal.
                    three = positions.expand(3, 1, -1) if hasattr(rotary, "mrope_section") else positions
                    around = rotary(hidden[name][index], three)
                    out = layer(
                        hidden[name][index], attention_mask=None, position_ids=positions, position_embeddings=around
                    )
                    hidden[name][index] = out[0] if isinstance(out, tuple) else out
                for hook in hooks:
                    hook.remove()
            layer.to("meta")
        return _compare(model.get_submodule(family.norm), sources, hidden, examples)


class _Weights:
    """The weights of a module in the adapter's or a merge's version, read from the base's files."""

    def __init__(
        self,
        adapter_dir: Path,
        folder: Path,
        held: Mapping[str, Held],
        device: torch.device,
    ) -> None:
        config = read_json(folder / "config.json")
        self.adapter, self.base = read_adapter(adapter_dir), BaseModel(folder)
        self.held = on_disk(held, config, self.base.where)
        self.family = family_of(config)
        self.stored = self.family.weights(config, self.base.where)
        self.names = fit_names(self.adapter, self.base, config)
        self.device = device
        self.dtype = product_dtype(device)

    def of(self, name: str, variant: str) -> Tensor:
        """One weight, rounded to bf16, on the device; for the adapter's version, without what PEFT adds beside it.

        Args:
            name: of the parameter in transformers' model.
            variant: adapter, original or dequantized.
        """
        parts = [self._tensor(one, variant) for one in self.stored[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _tensor(self, name: str, variant: str) -> Tensor:
        """One tensor of the base's files with a variant's weights, by its name in the files."""
        if name in self.adapter.full:
            weight = self.adapter.full[name]
        else:
            weight = self.base.get(self.names[name], self.device)
            if variant != "original" and name in self.held and name not in self.base.stored:
                weight = self.held[name].round_trip(weight.to(self.device))
        if name in self.adapter.bias:
            weight = weight.float() + self.adapter.bias[name].to(weight.device)
        pair = self.adapter.pairs.get(name)
        if pair is not None and not (variant == "adapter" and _stands_beside(pair)):
            weight, _ = apply_pair(weight, pair, self.device, TORCH[self.base.where[self.names[name]][1]])
        return weight.to(self.device, torch.bfloat16).to(self.dtype)

    def head(self, variant: str) -> Callable[[Tensor], Tensor]:
        """The output layer; a tied one is the embedding."""
        tied = self.family.head_on_disk not in self.names
        name = f"{self.family.embedding if tied else self.family.head}.weight"
        weight = self.of(name, variant)
        pair = self.adapter.pairs.get(self.family.on_disk(name))
        if variant != "adapter" or pair is None or not _stands_beside(pair):
            return lambda rows: linear(rows, weight)
        added = _Added(pair, self.device)
        return lambda rows: added(None, (rows,), linear(rows, weight))

    @property
    def heads_differ(self) -> bool:
        """Whether the output layer is another in each version."""
        head = self.family.head_on_disk
        return head in self.adapter.pairs or head in self.held

    def load(self, module: nn.Module, prefix: str, variant: str) -> list[Any]:
        """Fill a module; returns the hooks that add the adapter's share, where it is not merged."""
        hooks: list[Any] = []
        for name, parameter in module.named_parameters():
            parameter.data.copy_(self.of(prefix + name, variant).view(parameter.shape))
        if variant == "adapter":
            for name, one in module.named_modules():
                pair = self.adapter.pairs.get(self.family.on_disk(f"{prefix}{name}.weight"))
                if pair is not None and _stands_beside(pair):
                    hooks.append(one.register_forward_hook(_Added(pair, self.device)))
            for name, one in stacks(module):
                pairs = {own: self.adapter.stacked.get(f"{prefix}{name}.{own}") for own in PARAMETERS}
                hooks.append(_Experts(one, {own: pair for own, pair in pairs.items() if pair}, self.device))
        return hooks


def _stands_beside(pair: Pair) -> bool:
    """Whether a pair's share is added to what the weight makes, and not to the weight."""
    return pair.magnitude is None and not pair.embedding


class _Added:
    """``scaling · B A x`` beside a linear, in the dtype of products as trained."""

    def __init__(self, pair: Pair, device: torch.device) -> None:
        assert pair.a is not None and pair.b is not None
        self.a, self.b = (one.to(device, product_dtype(device)) for one in (pair.a, pair.b))
        self.scaling = pair.scaling

    def __call__(self, module: nn.Module | None, inputs: Any, output: Tensor) -> Tensor:
        return output + (inputs[0] @ self.a.T @ self.b.T) * self.scaling


class _Experts:
    """LoRA beside the experts of a layer, until it is removed."""

    def __init__(self, module: Any, pairs: Mapping[str, Pair], device: torch.device) -> None:
        self.module, dtype, lora = module, product_dtype(device), {}
        for own, pair in pairs.items():
            each = each_expert(pair, pair.stack)
            a, b = (torch.stack([cast(Tensor, getattr(one, key)) for one in each]) for key in ("a", "b"))
            lora[own] = Factors(a.to(device, dtype), b.to(device, dtype), pair.scaling)
        module.forward = partial(experts_forward, module, lora=lora)

    def remove(self) -> None:
        """Let the experts compute alone."""
        del self.module.forward


def _compare(
    norm: Any, sources: dict[str, _Weights], hidden: dict[str, list[Tensor]], examples: Sequence[tuple[Any, Any]]
) -> Verdict:
    device = sources["adapter"].device
    norm.to_empty(device=device)
    variants = list(hidden)
    wanted = [_supervised(spans).to(device) for _, spans in examples]
    targets = torch.cat(
        [
            torch.tensor(ids, dtype=torch.int64, device=device)[where + 1]
            for (ids, _), where in zip(examples, wanted, strict=True)
        ]
    )
    heads: dict[str, Callable[[Tensor], Tensor]] = {}
    final: dict[str, Tensor] = {}
    for name, weights in sources.items():
        norm.weight.data.copy_(weights.of(f"{weights.family.norm}.weight", name))
        final[name] = torch.cat([norm(one)[0][where] for one, where in zip(hidden[name], wanted, strict=True)])
        heads[name] = weights.head(name) if not heads or weights.heads_differ else heads["adapter"]
    losses, kls, tops = ({name: 0.0 for name in variants} for _ in range(3))
    for start in range(0, len(targets), CHUNK):
        part = slice(start, start + CHUNK)
        logits = {name: heads[name](final[name][part]).float() for name in variants}
        own = log_softmax(logits["adapter"], dim=-1)
        for name in variants:
            losses[name] += float(cross_entropy(logits[name], targets[part], reduction="sum"))
            theirs = log_softmax(logits[name], dim=-1)
            kls[name] += float(kl_div(theirs, own, log_target=True, reduction="sum"))
            tops[name] += float((logits[name].argmax(-1) == own.argmax(-1)).sum())
    count = max(1, len(targets))
    merges = {name: Figures(losses[name] / count, kls[name] / count, tops[name] / count) for name in variants[1:]}
    return Verdict(losses["adapter"] / count, len(targets), len(examples), merges)


def _supervised(spans: Any) -> Tensor:
    """Positions whose next token is trained."""
    ranges = [torch.arange(max(int(begin), 1) - 1, int(end) - 1) for begin, end in spans]
    return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)
