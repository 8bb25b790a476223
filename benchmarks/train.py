"""Tokens a second and peak memory of training steps, for this project and its peers, one process for each case.

    python benchmarks/train.py MODEL [--cases CASE;...] [--peers trl,unsloth] [--steps N] [--base_cache FOLDER]
                               [--json OUT]

MODEL is a folder with a checkpoint of the shape to measure and a tokenizer; random weights will do (``random_base.py``
writes them). It may be a shape of ``random_base.py`` too, such as qwen2.5-72b: then ``made.py`` makes it in memory,
quantised and with its layers on the host, which no peer can load. Each case of ``cases.py`` trains the same number of
tokens a step: 16,384, every token supervised unless it says otherwise. A peer runs beside each case where it is
installed.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from cases import CASES


def run(runner: str, model: str, case: dict[str, Any]) -> dict[str, Any]:
    """What a runner measures of a case, in this process."""
    if runner == "qwen_lit":
        from ours import ours

        return ours(model, case)
    from peers import sft

    return sft(model, case, runner)


def table(results: list[dict[str, Any]]) -> list[str]:
    """Lines of one table: ours of each case, and beside it each peer with how many times as fast ours is.

    Args:
        results: as the runners give them, with ``case`` and ``runner``; those of one case follow its own.
    """
    out = [
        "| case | runner | tokens/s | peak GiB | estimate GiB | host GiB | streamed | first step s | ours is |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ours: dict[str, Any] = {}
    for one in results:
        ours = one if one["runner"] == "qwen_lit" else ours
        if "error" in one:
            told = one["error"].strip().splitlines()
            out.append(f"| {one['case']} | {one['runner']} | failed: {told[-1][:80] if told else ''} | | | | | | |")
            continue
        speed, theirs = ours.get("tokens_per_second"), one["tokens_per_second"]
        ratio = f"{speed / theirs:.2f} x" if speed and one is not ours else ""
        out.append(
            f"| {one['case']} | {one['runner']} | {theirs:,} | {one['peak_gib']:.2f} | "
            f"{one.get('estimate_gib', '')} | {one.get('host_gib', '')} | {one.get('streamed', '')} | "
            f"{one['first_step_s']} | {ratio} |"
        )
    return out


def main() -> int:
    """Run every case in a process of its own; print a line for each as it ends, and one table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--cases", default=";".join(CASES), help="names of cases, or JSON objects, parted by ;")
    parser.add_argument("--peers", default="")
    parser.add_argument("--steps", type=int, help="of each case, instead of its own number")
    parser.add_argument("--base_cache", help="as model.base_cache; auto where it is not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        name, case = given.one.split(":", 1)
        print("RESULT " + json.dumps(run(name, given.model, json.loads(case))), flush=True)
        return 0
    results = []
    for name in given.cases.split(";"):
        case = dict(CASES[name] if name in CASES else json.loads(name))
        case |= {key: value for key in ("steps", "base_cache") if (value := getattr(given, key)) is not None}
        for runner in ["qwen_lit", *filter(None, given.peers.split(","))]:
            command = [sys.executable, __file__, given.model, "--one", f"{runner}:{json.dumps(case)}"]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            found = json.loads(lines[-1][7:]) if lines else {"error": (done.stderr or done.stdout)[-600:]}
            if case.get("profile"):
                print(done.stdout)
            results.append({"case": name, "runner": runner, **found})
            print(json.dumps(results[-1]), flush=True)
    print("\n".join(table(results)))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
