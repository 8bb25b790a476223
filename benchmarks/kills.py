"""Kill a run at random moments until it is done, and compare it with one that was left alone.

    python benchmarks/kills.py --kills 100 --config configs/demo.yaml [any key of fit ...]

Children are forked from one process, so that each starts in a moment; each goes on with ``--ckpt_path last`` and is
killed by SIGKILL, also while it loads, saves or exports. The figures are printed as JSON.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import load_file

from qwen_lit.cli import main as command


def start(arguments: list[str], log: Path) -> int:
    """Run a command in a forked child; returns its pid."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        os._exit(command(arguments))
    return pid


def end(pid: int) -> int:
    """The exit code of a child, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main() -> int:
    """Run, kill, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("output/kills"))
    given, keys = parser.parse_known_args()
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    log = given.output / "log.txt"

    def arguments(name: str) -> list[str]:
        out = given.output / name
        return [
            "fit",
            *keys,
            "--output_dir",
            str(out),
            "--ckpt_path",
            "last",
            "--trainer.enable_progress_bar",
            "false",
            "--trainer.callbacks+=qwen_lit.callbacks.trace.Trace",
            f"--trainer.callbacks.path={out / 'trace.jsonl'}",
        ]

    began = time.perf_counter()
    if end(start(arguments("whole"), log)):
        print(f"the run itself failed, see {log}", file=sys.stderr)
        return 1
    alone = time.perf_counter() - began
    draw, kills, rounds, moments = random.Random(given.seed), 0, 0, Counter[str]()
    while kills < given.kills:
        if (given.output / "killed" / "final_model").exists():
            # Done before all kills are spent: begin another run.
            rounds += 1
            (given.output / "killed").rename(given.output / f"killed-{rounds}")
        pid = start(arguments("killed"), log)
        time.sleep(draw.uniform(0.2, 0.8 * alone))
        os.kill(pid, signal.SIGSTOP)
        moments[moment(given.output / "killed")] += 1
        os.killpg(pid, signal.SIGKILL)
        kills += end(pid) == -signal.SIGKILL
    code = end(start(arguments("killed"), log))
    folders = [given.output / "killed", *(given.output / f"killed-{number + 1}" for number in range(rounds))]
    figures = {
        "kills": kills,
        "moments": dict(moments),
        "exit_code": code,
        "runs": len(folders),
        "same_adapter": all(same_adapter(given.output / "whole", one) for one in folders),
        "rows_once_each_epoch": all(rows_once(one) for one in folders),
        "seconds_alone": round(alone, 1),
    }
    print(json.dumps(figures, indent=1))
    return 0 if code == 0 and figures["same_adapter"] and figures["rows_once_each_epoch"] else 1


def moment(folder: Path) -> str:
    """What a stopped run is doing, from what it has half-written."""
    if list((folder / "checkpoints").glob("*.tmp-*")):
        return "saving"
    if (folder / "final_model.tmp").exists() or (folder / "lora_adapter.tmp").exists():
        return "exporting"
    return "elsewhere"


def same_adapter(first: Path, second: Path) -> bool:
    """Whether two runs end with the same adapter, bit for bit."""
    left, right = (load_file(one / "lora_adapter" / "adapter_model.safetensors") for one in (first, second))
    return all(torch.equal(left[name], right[name]) for name in left)


def rows_once(folder: Path) -> bool:
    """Whether the steps that count have trained the same rows in every epoch, each once.

    Rows that say the same are counted as often as they are there.
    """
    steps = {one["step"]: one for one in map(json.loads, (folder / "trace.jsonl").read_text().splitlines())}
    epochs: dict[int, Counter[str]] = {}
    for one in steps.values():
        epochs.setdefault(one["epoch"], Counter()).update(one["rows"])
    first = next(iter(epochs.values()))
    return all(epoch == first for epoch in epochs.values()) and sorted(steps) == list(range(1, len(steps) + 1))


if __name__ == "__main__":
    sys.exit(main())
