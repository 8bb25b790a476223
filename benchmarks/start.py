"""Seconds from the start of ``fit`` to the end of its first step, as a user waits for them.

    python benchmarks/start.py MODEL [--checkouts OLD,NEW] [--base_cache FOLDER] [--from_disk] [--log FOLDER]

Each run is a process of its own in the folder of a checkout, with its configs/qwen7b.yaml, rows of 2,000 tokens, and
samples off; it is ended when the log tells of step 1. The first run of a checkout compiles kernels and prepares rows
and is not counted. A checkout that knows ``model.base_cache`` runs without it, with an empty one and with a filled
one. ``--from_disk`` drops the files of MODEL and of the cache from the page cache before each run; tmpfs keeps them.
"""

import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

FIRST_STEP = re.compile(r"\bstep 1(/|\s)")
WORDS = "the a of night river house walks under light stone tree bird sings long road home water wind old door".split()
TIMES = 2
"""Runs of which the median counts; an empty cache is there once."""


def write_rows(path: Path, words: int, rows: int = 400) -> None:
    """Rows of so many words, each of about a token."""
    draw = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            text = " ".join(draw.choice(WORDS) for _ in range(words))
            file.write(json.dumps({"instruction": f"Tell story {number}", "output": text}) + "\n")


def knows_cache(checkout: Path) -> bool:
    """Whether ``model.base_cache`` is a key of a checkout."""
    return "base_cache" in (checkout / "qwen_lit" / "model" / "settings.py").read_text(encoding="utf-8")


def drop(folder: Path) -> None:
    """Let the page cache forget the files of a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_to_first_step(checkout: Path, arguments: list[str], log: Path) -> float | None:
    """Start ``fit``, wait for the line of its first step, and end it.

    Args:
        checkout: that is run.
        arguments: of ``fit``.
        log: gets each line of the run after the seconds at which it came.

    Returns:
        Seconds; None where the run ended before.
    """
    command = [sys.executable, "-m", "qwen_lit", "fit", "--config", "configs/qwen7b.yaml", *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{checkout}:{os.environ.get('PYTHONPATH', '')}", "NO_COLOR": "1"}
    began, found = time.perf_counter(), None
    run = subprocess.Popen(
        command,
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.stdout is not None
    with log.open("w", encoding="utf-8") as file:
        for line in run.stdout:
            after = time.perf_counter() - began
            print(f"{after:7.2f} {line}", end="", file=file, flush=True)
            if FIRST_STEP.search(line):
                found = after
                break
    # What ``fit`` does after training is not waited for.
    run.kill()
    run.wait()
    return found


def ways(checkout: Path, cache: Path) -> list[tuple[str, list[str], int]]:
    """What is run of a checkout, in order: its name, its options and how often; the first one once more before."""
    if not knows_cache(checkout):
        return [("as it is", [], TIMES)]
    filled = ["--model.base_cache", str(cache)]
    return [
        ("base_cache off", ["--model.base_cache", "null"], TIMES),
        ("base_cache empty", filled, 1),
        ("base_cache filled", filled, TIMES),
    ]


def options_of(model: Path, rows: Path) -> list[str]:
    """What every run is given."""
    fixed = {
        "model.model_name_or_path": model,
        "data.dataset_path": rows,
        "data.val_size": 0,
        "trainer.max_steps": 4,
        "trainer.max_epochs": -1,
        "trainer.log_every_n_steps": 1,
        "samples.rows": 0,
    }
    return [text for key, value in fixed.items() for text in (f"--{key}", str(value))]


def main() -> int:
    """Run every way of every checkout; print each, and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--checkouts", default=".")
    parser.add_argument("--base_cache", type=Path, help="a folder that is emptied first; default: a temporary one")
    parser.add_argument("--from_disk", action="store_true")
    parser.add_argument("--log", type=Path)
    parser.add_argument("--words", type=int, default=1980, help="of a row")
    parser.add_argument("--fit", default="", help="further options of fit, parted by blanks")
    given = parser.parse_args()
    out = ["| checkout | run | seconds to the end of step 1 |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as made:
        here = Path(made)
        os.environ.setdefault("XDG_CACHE_HOME", str(here / "cache"))
        log, cache = given.log or here, given.base_cache or here / "bases"
        log.mkdir(parents=True, exist_ok=True)
        write_rows(here / "rows.jsonl", given.words)
        options = options_of(given.model.resolve(), here / "rows.jsonl") + given.fit.split()
        for checkout in (Path(one).resolve() for one in given.checkouts.split(",")):
            shutil.rmtree(cache, ignore_errors=True)
            for place, (name, chosen, times) in enumerate(ways(checkout, cache.resolve())):
                found: list[float | None] = []
                for number in range(times + (place == 0)):
                    for folder in (given.model, cache) if given.from_disk else ():
                        drop(folder)
                    label = f"{checkout.name}-{name}-{number}".replace(" ", "_")
                    arguments = [*options, "--output_dir", str(here / label), *chosen]
                    found.append(seconds_to_first_step(checkout, arguments, log / f"{label}.txt"))
                    print(label, told(found[-1:]), flush=True)
                    shutil.rmtree(here / label, ignore_errors=True)
                out.append(f"| {checkout.name} | {name} | {told(found[-times:])} |")
    print("\n".join(out))
    return 0


def told(seconds: list[float | None]) -> str:
    """The median, or that a run failed."""
    whole = [one for one in seconds if one is not None]
    return f"{statistics.median(whole):.1f}" if len(whole) == len(seconds) else "failed"


if __name__ == "__main__":
    sys.exit(main())
