"""What would make a run faster or smaller: the advice of ``plan``."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import lightning as L
import torch
from peft import PeftModel

from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.examples import RAW_TEXT
from qwen_lit.lines import plural
from qwen_lit.model.module import QwenModule
from qwen_lit.planner.memory import ModelMemory
from qwen_lit.planner.plan import GIB, Plan
from qwen_lit.planner.search import choose
from qwen_lit.planner.speed import time_of
from qwen_lit.prequantized import own_quantization
from qwen_lit.quantization import Held
from qwen_lit.seams import options_of

MOST = 192 * GIB
"""Bytes of a card up to which more memory is advised."""

STEP = GIB // 4
"""Bytes between two sizes of a card that are tried, or more where these are large."""

WORTH = 0.02
"""Share of time from which a gain is worth a line."""

COMMAND = "qwen-lit "
"""How a line of advice begins that is a command to type."""

PLANS = ("json", "explain", "memory_budget")
"""Options that ``plan`` alone has."""

WORTH_BYTES = GIB // 8
"""Bytes from which a saving by shorter rows is worth a line."""


@dataclass(frozen=True)
class Packed:
    """A run whose micro-batches are filled, with a step of about as many rows as before."""

    batch_size: int
    accumulate: int
    """``trainer.accumulate_grad_batches``."""
    tokens: int
    """Of a full micro-batch."""
    rows_before: int
    """Rows of a step over all ranks, as configured."""
    rows: int
    """Rows of a step over all ranks, packed."""

    @staticmethod
    def of(data: QwenDataModule, mean: float, per_step: int, ranks: int) -> "Packed":
        """As few micro-batches of the configured size as have the rows of a step; where one has more, a smaller one.

        Args:
            data: whose settings say how rows are put together.
            mean: tokens of a micro-batch on average, not packed.
            per_step: micro-batches of a step on each rank.
            ranks: of the run.
        """
        size, length = data.settings.batch_size, data.settings.max_length
        # Rows that ``max_length`` tokens have room for.
        in_length = max(1.0, length * size / mean)
        lengths = max(1, round(size * per_step / in_length))
        accumulate = max(1, round(lengths / size))
        batch_size = min(size, max(1, round(lengths / accumulate)))
        rows = round(batch_size * accumulate * in_length)
        return Packed(batch_size, accumulate, batch_size * length, size * per_step * ranks, rows * ranks)

    def told(self, mean: float, gain: float, given: Sequence[str]) -> list[str]:
        """What packing changes, and the whole command, a line each.

        Args:
            mean: tokens of a micro-batch on average, not packed.
            gain: of speed, 0.5 for half as fast again.
            given: what followed ``plan`` on its command line.
        """
        keys = {
            "data.packing": "true",
            "data.batch_size": str(self.batch_size),
            "trainer.accumulate_grad_batches": str(self.accumulate),
        }
        return [
            f"faster: data.packing: true fills micro-batches of {mean:,.0f} tokens up to {self.tokens:,}: about "
            f"{gain:.0%} faster; a step has about {plural(self.rows, 'row')} instead of {self.rows_before:,}:",
            COMMAND + fit_with(given, keys),
        ]


def fit_with(given: Sequence[str], keys: Mapping[str, str]) -> str:
    """The command that trains as ``plan`` was asked, but for some keys.

    Args:
        given: what followed ``plan`` on its command line.
        keys: that are set, by name.
    """
    left, kept, rest = {*keys, *PLANS}, list[str](), list(given)
    while rest:
        name, _, value = rest.pop(0).partition("=")
        follows = not value and rest and not rest[0].startswith("--")
        words = [name + f"={value}" * bool(value), *([rest.pop(0)] if follows else [])]
        kept += words * (name.removeprefix("--") not in left)
    return shlex.join(["fit", *kept, *(word for key, one in keys.items() for word in (f"--{key}", one))])


def advice(
    trainer: L.Trainer,
    memory: ModelMemory,
    static: int,
    plan: Plan,
    sizes: dict[int, int],
    mean: float,
    module: QwenModule,
    data: QwenDataModule,
    model: PeftModel,
    weights: Callable[[PeftModel, Mapping[str, Held]], int],
) -> list[str]:
    """What would make it faster or smaller, with the gain of each by the planner's own arithmetic.

    Args:
        trainer: of the run.
        memory: of the model.
        static: bytes of its weights.
        plan: that was chosen.
        sizes: as of ``choose``.
        mean: tokens of a micro-batch on average.
        module: with the settings.
        data: with its rows.
        model: of ``arithmetic_model``.
        weights: bytes of the model's weights, by how they are held.
    """
    policies = plan.policies
    found = []
    if policies.recomputed or policies.streamed:
        larger = [choose(memory, static, budget, sizes, mean=mean) for budget in _budgets(plan.budget)]
        goals = {
            "recomputed": [one for one in larger if not one.policies.recomputed] * bool(policies.recomputed),
            "streamed": [one for one in larger if not one.policies.streamed] * bool(policies.streamed),
        }
        for what, there in goals.items():
            gain = time_of(plan, mean, memory) / time_of(there[0], mean, memory) - 1 if there else 0.0
            if gain > WORTH:
                size = there[0].budget / GIB
                found.append(f"faster: with {size:.1f} GiB no layer is {what}, about {gain:.0%} faster")
        if memory.kept == "bf16":
            in_8_bits = replace(memory, kept="int8")
            packed = choose(in_8_bits, static, plan.budget, sizes, mean=mean)
            gain = time_of(plan, mean, memory) / time_of(packed, mean, in_8_bits) - 1
            if gain > WORTH:
                rounds = "rounds what the MLP keeps for backward"
                found.append(f"faster: model.kept: int8, which {rounds}: about {gain:.0%} faster")
    if not data.settings.packing:
        filled = Packed.of(data, mean, options_of(trainer).micro_batches_per_step, trainer.world_size)
        gain = time_of(plan, mean, memory) / time_of(plan, filled.tokens, memory) - 1
        if gain > WORTH:
            found += filled.told(mean, gain, module.run.given)
    tokens = sizes[plan.micro_batches_at_once]
    whole, half = (memory.peak(static, share, policies) for share in (tokens, tokens // 2))
    if whole - half > WORTH_BYTES:
        shorter = max(8, sizes[1] // 2)
        assert data.train_rows is not None
        lengths, text = data.train_rows.column("length"), data.train_rows.of_kind(RAW_TEXT)
        longer = int(((lengths > shorter) & ~text).sum())
        counted = f"{longer:,} of {len(lengths):,} rows are longer and would be shortened or dropped"
        found.append(
            f"smaller: data.max_length {shorter} takes {(whole - half) / GIB:.1f} GiB less; "
            f"{counted if longer else 'no row is longer'}"
        )
    lora = sum(p.numel() for p in model.parameters() if p.requires_grad)
    saved = lora // 2 * (8 + module.state_bytes)
    found.append(f"smaller: lora_config.r {module.lora_config.r // 2} takes {saved / GIB:.2f} GiB less")
    config = module.quantization_config
    if own_quantization(module.config) is not None:
        # The files hold the base in what it is held in.
        return found
    if config is None or not config.load_in_4bit:
        found.append("smaller: quantization_config nf4 takes about a quarter of the weights' memory")
    elif not config.bnb_4bit_use_double_quant:
        as_held = module.held_weights(torch.device("cpu"))
        double = {name: replace(one, double=True) for name, one in as_held.items()}
        less = weights(model, as_held) - weights(model, double)
        found.append(f"smaller: bnb_4bit_use_double_quant: true takes {less / GIB:.2f} GiB less")
    return found


def _budgets(least: int) -> Iterator[int]:
    """The sizes of a card that are tried."""
    while least < MOST:
        yield least
        least += max(STEP, least // 32)
