"""What products in 8 bits cost in truth, on a small real model with an NF4 base: gradients, training, traps.

    python benchmarks/fidelity.py pack MODEL OUT --rows FILE... [--original FOLDER]
    python benchmarks/fidelity.py gradients MODEL [--choices bf16,fp8,...] [--order PROBE.json] [--original FOLDER]
    python benchmarks/fidelity.py probe MODEL [--choices fp8,int8] [--wide 0,4,8,16] [--shares 0,0.05,0.1,0.2]
    python benchmarks/fidelity.py curves MODEL [--choices ...,peft,unsloth] [--seeds 0,1,2] [--steps 500]
    python benchmarks/fidelity.py traps MODEL [--choices ...]
    python benchmarks/fidelity.py table RUNS.json...

MODEL is a checkpoint's folder, with files of rows after ``--rows``; or the folder or archive that ``pack`` has
written, which has its rows.
The adapter has r=16 on all seven linears and no dropout; a step trains 8 packs of 512 tokens. A choice is a value of
``model.products``, or ``fp8+16``: all but the 16 products that ``probe`` found worst, whose file ``--order`` names.
Every part writes its figures to ``--json`` as they come.

``gradients`` compares with float32 products of the same weights (the numbers that bf16 products multiply) by
transformers' own modules. ``curves`` judges each trained adapter by exact bf16 products on the same held-out packs; a
seed draws the adapter and the order of rows. ``table`` joins the files of several processes, one a GPU.

To a machine without a network the model goes packed, as OUT.tar.gz, 57 MB for 135M parameters. NF4's own damage is
measured with a plain checkpoint, or with the one that ``pack --original`` writes. Unsloth trains where it is
installed. Products in integers need widths that are multiples of 128, which a packed model has: the share of a
choice's products that are in 8 bits stands in the tables.
"""

# Before torch, whose allocator it sets.
# isort: off
import qwen_lit  # noqa: F401
import torch

# isort: on
import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from choices import NAMES, PEERS, Choice, Order
from curves import Plan, curves, read_runs, table, told
from gradients import gradients, probe, trained_point
from packed import ARCHIVE, ROWS, Rows, pack, unpacked
from small import Bench
from traps import traps

from qwen_lit.engine.products import NAMED
from qwen_lit.engine.products_check import refusal

EIGHT = [name for name in NAMES if name != "bf16"]
CHOICES = {"gradients": NAMES, "probe": EIGHT, "curves": [*NAMES, *PEERS], "traps": EIGHT}


def read_orders(files: list[Path]) -> dict[str, Order]:
    """The worst products by the name of the choice, from what ``probe`` has written."""
    found = [one for file in files for one in json.loads(file.read_text())]
    return {one["name"]: [(layer, group) for layer, group in one["order"]] for one in found}


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    for name in ("pack", *CHOICES):
        one = parts.add_parser(name)
        one.add_argument("model", type=Path)
        one.add_argument("--rows", nargs="+", default=[], help="files, as data.dataset_path takes them")
        one.add_argument("--longest", type=int, default=512, help="tokens of a pack, and of a document at most")
        one.add_argument("--original", type=Path, help="the checkpoint before it is quantised")
        if name == "pack":
            one.add_argument("out", type=Path)
            continue
        one.add_argument("--choices", default=",".join(CHOICES[name]))
        one.add_argument("--order", type=Path, nargs="+", default=[], help="files that probe has written")
        one.add_argument("--steps", type=int, default=500 if name == "curves" else 100)
        one.add_argument("--per_step", type=int, default=8, help="packs of a step")
        one.add_argument("--lr", type=float, default=2e-4)
        one.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
        one.add_argument("--json", type=Path)
    for name in ("gradients", "probe", "traps"):
        one = parts.choices[name]
        one.add_argument("--batches", type=int, default=2, help="of which gradients are taken, at most 8")
        one.add_argument("--adapter", type=Path, help="the trained point: read, or written where it is not there")
    parts.choices["probe"].add_argument("--wide", default="0,4,8,16,32,64", help="products left in bf16")
    parts.choices["probe"].add_argument("--by_work", action="store_true", help="order by what a product costs, too")
    parts.choices["probe"].add_argument("--shares", default="", help="of multiplications, as a run would leave them")
    parts.choices["traps"].add_argument("--long", type=int, default=32_768, help="tokens of the long row")
    parts.choices["curves"].add_argument("--seeds", default="0,1,2")
    parts.choices["curves"].add_argument("--judged", type=int, default=64, help="held-out packs at most")
    parts.add_parser("table").add_argument("runs", type=Path, nargs="+")
    return parser.parse_args()


def run_curves(given: argparse.Namespace, bench: Bench, orders: dict[str, Order], names: list[str]) -> None:
    """The part ``curves``: every run is told and written as it ends."""
    runs: list[dict[str, Any]] = []

    def ended(run: dict[str, Any]) -> None:
        runs.append(run)
        same = [one for one in runs if one["products"] == "bf16" and one["seed"] == run["seed"] and "held" in one]
        print(told(run, same[0] if same else None), flush=True)
        write(given.json, runs)

    plan = Plan(given.steps, given.per_step, given.lr, given.judged)
    curves(bench, given.model, names, [int(one) for one in given.seeds.split(",")], plan, orders, ended)
    print("\n".join(table(runs)), flush=True)


def write(file: Path | None, found: list[dict[str, Any]]) -> None:
    """Figures to a file, where one is asked for."""
    if file is not None:
        file.write_text(json.dumps(found))


def main() -> int:
    """Run one part."""
    given = parsed()
    if given.part == "table":
        print("\n".join(table(read_runs(given.runs))))
        return 0
    with tempfile.TemporaryDirectory() as place:
        given.model = unpacked(given.model, Path(place))
        run(given)
    return 0


def run(given: argparse.Namespace) -> None:
    """Run one part on a model.

    Args:
        given: the command line, with the folder of the model.
    """
    began = time.perf_counter()
    rows = Rows.read(given.model, given.rows, given.longest)
    if given.part == "pack":
        size = pack(given.model, rows, given.out, given.original)
        print(f"{given.out}{ARCHIVE}: {size / 1e6:.1f} MB")
        return
    names = given.choices.split(",")
    choices = [Choice.of(name) for name in names if name not in PEERS]
    orders = read_orders(given.order)
    for choice in choices:
        choice.products(orders)
        if reason := refusal(NAMED[choice.name], torch.device(given.device)):
            print(f"{choice}: fit would not use it here: {reason}", flush=True)
    # What a float32 product is compared with is one.
    torch.backends.cuda.matmul.allow_tf32 = False
    bench = Bench.load(given.model, rows, torch.device(given.device))
    print(
        f"{len(rows.train)} documents in {len(rows.packs)} packs of {rows.longest} tokens, {len(rows.held)} held out; "
        f"{len(rows.used())} different tokens; loaded in {time.perf_counter() - began:.0f} s",
        flush=True,
    )
    if given.part == "curves":
        run_curves(given, bench, orders, names)
        return
    batches = trained_point(bench, given.steps, given.per_step, given.lr, given.adapter)[: given.batches]
    if given.part == "gradients":
        plain = None if (given.model / ROWS).is_file() else given.model
        found = gradients(bench, choices, orders, batches, given.original or plain)
    elif given.part == "probe":
        counts = [int(one) for one in given.wide.split(",")]
        shares = [float(one) for one in given.shares.split(",") if one]
        found = probe(bench, [choice.name for choice in choices], batches, counts, given.by_work, shares)
    else:
        found = traps(bench, choices, orders, given.long)
    write(given.json, found)


if __name__ == "__main__":
    sys.exit(main())
