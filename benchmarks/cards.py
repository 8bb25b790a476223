"""Run what several cards of one machine have to do, and print a JSON line for each case.

    python benchmarks/cards.py --cards 4 --base MODEL --rows ROWS.jsonl [--cases packed,kill] [any key of fit ...]

Speeds are medians of the steps after the third, of the run and of a card, beside one card's in one call. ``start`` is
the time to the first step over one card's. ``resume`` compares a run that SIGTERM has stopped and that went on with
one that was left alone. ``ended_s`` is how long other ranks live on after one was killed. Ranks on a CPU are asked for
by ``--trainer.accelerator cpu``.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch

from qwen_lit.callbacks.checkpoint_io import last_checkpoint

WARM = 3
"""Steps that no speed is taken of."""
PATIENCE = 300.0
"""Seconds after which a case is given up."""
PACKED = ["--data.packing", "true", "--data.batch_size", "1", "--data.max_length", "2048"]
SHORT = ["--data.packing", "false", "--data.batch_size", "8", "--trainer.accumulate_grad_batches", "1"]

BY_STEPS = ["--trainer.check_val_every_n_epoch", "null"]
"""Steps between validations are counted over epochs."""


class Poison(L.Callback):
    """Makes the loss of one rank in one step not finite."""

    def __init__(self, step: int = 2, rank: int = 1) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Spoil the loss of the first micro-batch of that step."""
        if trainer.global_step + 1 == self.step and trainer.global_rank == self.rank:
            plain = pl_module.loss_sum

            def poisoned(one: Any) -> torch.Tensor:
                pl_module.loss_sum = plain
                return plain(one) * float("nan")

            pl_module.loss_sum = poisoned


class Bench:
    """The cases, in one folder."""

    def __init__(self, given: argparse.Namespace, keys: list[str]) -> None:
        self.given, self.keys, self.cards = given, keys, given.cards

    def start(self, name: str, *options: str, cards: int | None = None, torchrun: bool = False) -> "Fit":
        """Begin a run.

        Args:
            name: of its folder.
            options: of ``fit``.
            cards: that it uses; all where it is not given.
            torchrun: starts its ranks.
        """
        out, cards = self.given.output / name, cards or self.cards
        begins = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(cards)] if torchrun else []
        several = ["--trainer.strategy", "ddp"] if cards > 1 else []
        command = [
            *(sys.executable, *begins, "-m", "qwen_lit", "fit", "--config", self.given.config),
            *("--model.model_name_or_path", self.given.base, "--data.dataset_path", self.given.rows),
            *("--output_dir", str(out), "--trainer.devices", str(cards), *several),
            *("--trainer.max_epochs", "-1", "--trainer.log_every_n_steps", "1", "--samples.rows", "0"),
            *("--trainer.enable_progress_bar", "false", "--data.val_size", "0", "--export.merge", "false"),
            *(
                "--trainer.callbacks+=qwen_lit.callbacks.trace.Trace",
                f"--trainer.callbacks.path={out / 'trace.jsonl'}",
            ),
            *self.keys,
            *options,
        ]
        return Fit(out, command)

    def speed(self, name: str, *options: str) -> dict[str, Any]:
        """One card and all of them on the same rows."""
        found: dict[str, Any] = {}
        for cards in (1, self.cards):
            run = self.start(f"{name}-{cards}", *options, "--trainer.max_steps", str(self.given.steps), cards=cards)
            code = run.end()
            rate = run.speed() if code == 0 else float("nan")
            found[f"cards_{cards}"] = {
                "code": code,
                "tokens_per_second": round(rate),
                "per_card": round(rate / cards),
                "first_step_s": round(run.first_step, 1),
            }
        one, all_of_them = found["cards_1"], found[f"cards_{self.cards}"]
        if one["tokens_per_second"] and not one["code"] and not all_of_them["code"]:
            found["scaling"] = round(all_of_them["tokens_per_second"] / one["tokens_per_second"] / self.cards, 4)
            found["start"] = round(all_of_them["first_step_s"] / one["first_step_s"], 2)
        return found

    def packed(self) -> dict[str, Any]:
        """Filled micro-batches."""
        return self.speed("packed", *PACKED)

    def short(self) -> dict[str, Any]:
        """Rows as they are."""
        return self.speed("short", *SHORT)

    def budget(self) -> dict[str, Any]:
        """24 GiB on each card: layers offloaded while neighbours copy too."""
        return self.speed("budget", *PACKED, "--model.memory_budget", "24GiB")

    def resume(self) -> dict[str, Any]:
        """Validation and an export at the end; and the same, stopped by SIGTERM and resumed."""
        half = ["--checkpoint.every_n_train_steps", "2", "--trainer.val_check_interval", "4", *BY_STEPS]
        options = [*PACKED, *half, "--data.val_size", "16", "--trainer.max_steps", str(self.given.steps)]
        whole = self.start("whole", *options)
        codes = [whole.end()]
        stopped = self.start("stopped", *options)
        stopped.until(lambda: stopped.steps_done() >= 3)
        stopped.process.send_signal(signal.SIGTERM)
        codes.append(stopped.end())
        at = stopped.steps_done()
        codes.append(self.start("stopped", *options, "--ckpt_path", "last").end())
        first, second = whole.trace(), stopped.trace()
        apart = [abs(first[n]["loss"] - second[n]["loss"]) / abs(first[n]["loss"]) for n in first if n in second]
        summary = whole.summary()
        return {
            "codes": codes,
            "stopped_after": at,
            "same_rows": [one["rows"] for one in first.values()] == [one["rows"] for one in second.values()],
            "losses_within": max(apart, default=float("nan")),
            "validated": summary.get("best"),
            "exported": summary.get("exported"),
            "adapter": (whole.out / "lora_adapter" / "adapter_model.safetensors").is_file(),
        }

    def kill(self) -> dict[str, Any]:
        """SIGKILL to another rank than the first."""
        run = self.start("kill", *PACKED, "--checkpoint.every_n_train_steps", "1", "--trainer.max_steps", "100000")
        run.until(lambda: run.steps_done() >= 3)
        ranks = [one for one in psutil.Process(run.process.pid).children() if "qwen_lit" in " ".join(one.cmdline())]
        ranks[0].kill()
        began = time.perf_counter()
        code = run.end()
        psutil.wait_procs(ranks, PATIENCE)
        saved = last_checkpoint(run.out / "checkpoints")
        state = torch.load(saved, weights_only=True) if saved else {}
        ended = round(time.perf_counter() - began, 1)
        return {"code": code, "ended_s": ended, "checkpoint_step": state.get("global_step")}

    def nan(self) -> dict[str, Any]:
        """A loss that is not finite on the second rank."""
        poison = ["--trainer.callbacks+=benchmarks.cards.Poison", "--trainer.callbacks.step=2"]
        run = self.start("nan", *PACKED, *poison, "--trainer.max_steps", "5")
        code = run.end()
        skipped = [step for step, one in run.trace().items() if one["loss"] is None]
        return {"code": code, "steps": run.steps_done(), "skipped": skipped}

    def torchrun(self) -> dict[str, Any]:
        """Ranks that torchrun starts, ended by early stopping at the second validation."""
        stop = [
            "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping",
            *("--trainer.callbacks.monitor=val/loss", "--trainer.callbacks.stopping_threshold=1000"),
            *("--trainer.val_check_interval", "3", *BY_STEPS, "--data.val_size", "16", "--trainer.max_steps", "50"),
        ]
        run = self.start("torchrun", *PACKED, *stop, torchrun=True)
        return {"code": run.end(), "steps": run.steps_done(), "validated": run.summary().get("best")}


class Fit:
    """A run under way, and what it leaves."""

    def __init__(self, out: Path, command: list[str]) -> None:
        self.out = out
        out.mkdir(parents=True, exist_ok=True)
        self.began, self.first_step, before = time.time(), float("nan"), self.steps_done()
        self.before = before
        self.log = (out.parent / f"{out.name}.log").open("a")
        root = str(Path(__file__).resolve().parents[1])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log, env=environment)

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        self.until(lambda: self.process.poll() is not None)
        self.log.close()
        return self.process.wait()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something, the end of the run, or ``PATIENCE``."""
        ends = time.monotonic() + PATIENCE
        while not condition() and self.process.poll() is None:
            if self.steps_done() > self.before and self.first_step != self.first_step:
                self.first_step = time.time() - self.began
            if time.monotonic() > ends:
                self.process.kill()
            time.sleep(0.1)

    def trace(self) -> dict[int, Any]:
        """What each step has trained, by its number; of one that was made twice, the last."""
        return {one["step"]: one for one in self._lines()}

    def _lines(self) -> Iterator[Any]:
        path = self.out / "trace.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else []:
            # The last line may be in the making.
            if line.endswith("}"):
                yield json.loads(line)

    def steps_done(self) -> int:
        """Optimizer steps that count."""
        return len(self.trace())

    def summary(self) -> dict[str, Any]:
        """``summary.json``; empty where there is none."""
        path = self.out / "summary.json"
        return dict(json.loads(path.read_text())) if path.is_file() else {}

    def speed(self) -> float:
        """Tokens a second of the run, the median of the steps after the first ones."""
        return statistics.median(rate for _, rate in self.summary()["history"]["tokens_per_second"][WARM:])


CASES = ("packed", "short", "budget", "resume", "kill", "nan", "torchrun")


def main() -> int:
    """Run the cases one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--base", required=True)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--config", default="configs/qwen7b.yaml")
    parser.add_argument("--steps", type=int, default=14, help="optimizer steps of a run")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--output", type=Path, default=Path("output/cards"))
    given, keys = parser.parse_known_args()
    shutil.rmtree(given.output, ignore_errors=True)
    given.output.mkdir(parents=True)
    bench = Bench(given, keys)
    for name in given.cases.split(","):
        began = time.perf_counter()
        try:
            found = getattr(bench, name)()
        except (KeyError, IndexError, OSError, ValueError) as error:
            found = {"error": f"{type(error).__name__}: {error}; see {given.output}/*.log"}
        print(json.dumps({"case": name, **found, "seconds": round(time.perf_counter() - began, 1)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
