"""Training by each choice and by the peers, seed by seed: losses, and what the adapter is worth by exact products."""

import json
import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import NAMES, PEERS, Choice, Order, held_out, rates, timed, train
from random_base import NF4
from small import Bench

from qwen_lit.data.batches import padded
from qwen_lit.model.load import load_base

TAIL = 0.25
"""Share of the steps, the last ones, whose mean is told as the training loss."""


@dataclass(frozen=True)
class Plan:
    """What every run trains."""

    steps: int
    per_step: int
    """Packs of documents."""
    lr: float
    most_judged: int
    """Held-out packs."""


def curves(
    bench: Bench,
    folder: Path,
    names: Sequence[str],
    seeds: Sequence[int],
    plan: Plan,
    orders: dict[str, Order],
    ended: Callable[[dict[str, Any]], None],
) -> None:
    """Train every choice from every seed, and judge each adapter on the same held-out rows by exact bf16 products.

    Args:
        bench: of the model.
        folder: that it was loaded from.
        names: of choices and peers.
        seeds: each draws an adapter and an order of rows.
        plan: of a run.
        orders: as of ``Choice.products``.
        ended: given each run as it ends, failed ones too.
    """
    judged = bench.rows.judged(plan.most_judged)
    tokens = [len(batch["targets"]) for batch in judged]

    def tell(name: str, seed: int, losses: list[float], seconds: float) -> None:
        held = held_out(bench, judged)
        ended({"products": name, "seed": seed, "seconds": seconds, "losses": losses, "held": held, "tokens": tokens})

    bench.begin(seeds[0])
    tell("untrained", seeds[0], [], 0.0)
    for seed in seeds:
        for name in names:
            if name == "unsloth":
                continue
            try:
                bench.begin(seed)
                batches = bench.rows.steps(seed, plan.steps, plan.per_step)
                products = None if name == "peft" else Choice.of(name).of_run(orders, bench, batches[0])
                losses, seconds = timed(train, bench, batches, products, plan.lr)
                tell(name, seed, losses, seconds)
            except Exception as error:
                ended({"products": name, "seed": seed, "error": f"{type(error).__name__}: {error}"})
    if "unsloth" in names:
        for one in unsloth(bench, folder, seeds, plan):
            if "error" in one:
                ended(one)
                continue
            bench.set(one["adapter"])
            tell("unsloth", one["seed"], one["losses"], one["seconds"])


def unsloth(bench: Bench, folder: Path, seeds: Sequence[int], plan: Plan) -> Iterator[dict[str, Any]]:
    """The runs of Unsloth in a process of its own, on the same 4-bit numbers, from the same adapter, on the same rows.

    Args:
        bench: draws the adapters.
        folder: of the model.
        seeds: of the runs.
        plan: of a run.

    Yields:
        Of each run its ``seed``, ``losses``, ``seconds`` and ``adapter``; or ``seed`` and ``error``.
    """
    with tempfile.TemporaryDirectory() as place:
        work = Path(place)
        shutil.copytree(folder, work / "base")
        if "quantization_config" not in json.loads((folder / "config.json").read_text()):
            base: Any = load_base(folder, NF4, bench.device)
            base.save_pretrained(work / "base")
            del base
        for seed in seeds:
            bench.begin(seed)
            batches = [padded(one, 0) for one in bench.rows.steps(seed, plan.steps, plan.per_step)]
            job = {"adapter": bench.taken(), "batches": batches, "rates": rates(plan.steps, plan.lr)}
            torch.save(job, work / f"{seed}.pt")
        command = [sys.executable, str(Path(__file__).with_name("unsloth_curve.py")), place, *map(str, seeds)]
        left, said = list(seeds), list[str]()
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line.strip())
                if line.startswith("TRAINED "):
                    seed = left.pop(0)
                    yield {"seed": seed, **torch.load(work / f"{seed}-done.pt")}
        for seed in left:
            yield {"products": "unsloth", "seed": seed, "error": " / ".join(filter(None, said[-3:]))[-300:]}


def tail(losses: Sequence[float]) -> float:
    """Mean of the last losses; NaN of none."""
    return float(np.mean(losses[-max(1, round(TAIL * len(losses))) :])) if losses else math.nan


def held(run: dict[str, Any]) -> float:
    """Mean held-out loss of a run, in nats."""
    return float(sum(run["held"]) / sum(run["tokens"]))


def told(run: dict[str, Any], base: dict[str, Any] | None) -> str:
    """A line of one run.

    Args:
        run: as ``curves`` gives it.
        base: the run in bf16 from the same seed, where there is one.
    """
    head = f"{run['products']}, seed {run['seed']}"
    if "error" in run:
        return f"{head}: failed: {run['error'][:300]}"
    out = f"{head}: training loss {tail(run['losses']):.4f}, held out {held(run):.4f}"
    if base is not None and base is not run:
        apart = (np.array(run["held"]) - np.array(base["held"])) / np.array(base["tokens"])
        error = apart.std(ddof=1) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        out += f", against bf16 {held(run) - held(base):+.4f}, of a pack {apart.mean():+.4f} ± {error:.4f}"
    return f"{out} ({run['seconds']:.0f} s)"


def spread(runs: Sequence[dict[str, Any]]) -> float:
    """How far bf16's seeds are from each other: the mean distance of two of them; NaN of one."""
    values = [held(run) for run in runs]
    pairs = [abs(one - other) for number, one in enumerate(values) for other in values[:number]]
    return float(np.mean(pairs)) if pairs else math.nan


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of the table of all runs: each choice beside bf16 of the same seeds.

    A choice passes where its mean distance to bf16 of the same seed, whichever way, is below the spread of bf16's
    seeds; else it is experimental. Peers are not judged.

    Args:
        runs: as ``curves`` gives them, of any number of processes; of two runs of one seed the last one counts.
    """
    by_name: dict[str, dict[int, dict[str, Any]]] = {}
    errors = {run["products"]: run["error"] for run in runs if "error" in run}
    for run in runs:
        if "error" not in run:
            by_name.setdefault(run["products"], {})[run["seed"]] = run
    base = by_name.get("bf16", {})
    wide = spread(list(base.values()))
    out = [
        f"spread of bf16's {len(base)} seeds, mean distance of two: {wide:.4f}",
        "",
        "| products | seeds | training loss | above bf16 | held out | above bf16, same seed | distance | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in by_name.items():
        both = [(run, base[seed]) for seed, run in found.items() if seed in base and name != "untrained"]
        train_loss = np.mean([tail(run["losses"]) for run in found.values()])
        line = f"| {name} | {len(found)} | {train_loss:.4f} |"
        mean = np.mean([held(run) for run in found.values()])
        if name == "bf16" or not both:
            out.append(f"{line} | {mean:.4f} | | | |")
            continue
        above = np.mean([tail(run["losses"]) - tail(other["losses"]) for run, other in both])
        apart = np.array([held(run) - held(other) for run, other in both])
        error = f" ± {apart.std(ddof=1) / math.sqrt(len(apart)):.4f}" if len(apart) > 1 else ""
        distance = float(np.abs(apart).mean())
        out.append(
            f"{line} {above:+.4f} | {mean:.4f} | {apart.mean():+.4f}{error} | {distance:.4f} | "
            f"{verdict(name, distance, wide)} |"
        )
    out += [f"| {name} | failed: {error[:120]} | | | | | | |" for name, error in errors.items() if name not in by_name]
    return out


def verdict(name: str, distance: float, wide: float) -> str:
    """Whether a choice passes.

    Args:
        name: of the choice or the peer.
        distance: its mean distance to bf16 of the same seed.
        wide: the spread of bf16's seeds; NaN where there are not two.
    """
    if name in PEERS or name.partition("+")[0] not in NAMES:
        return ""
    if math.isnan(wide):
        return "not judged: one seed"
    return "passes" if distance < wide else "experimental"


def read_runs(files: Sequence[Path]) -> list[dict[str, Any]]:
    """The runs in files that several processes have written."""
    return [run for file in files for run in json.loads(file.read_text())]
