"""Runs of the tiny model, their traces, and callbacks that disturb them."""

import errno
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import lightning as L
import torch
from safetensors.torch import load_file

from qwen_lit.data.batches import padded

WORKERS = ["--data.num_workers", "2"]
"""Two processes of each loader build its batches."""


class StopAt(L.Callback):
    """Sends this process a signal while a step is under way."""

    def __init__(self, step: int, signum: int = signal.SIGTERM) -> None:
        self.step, self.signum = step, signum

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), self.signum)


def trace(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "lora_adapter" / "adapter_model.safetensors")


def same(first: Path, second: Path) -> bool:
    left, right = adapter(first), adapter(second)
    return trace(first) == trace(second) and all(torch.equal(left[name], right[name]) for name in left)


def begun(folder: Path) -> dict[str, str]:
    """The lines with which a run began, by name."""
    from qwen_lit.lines import start_lines

    return start_lines(json.loads((folder / "summary.json").read_text("utf-8"))["run"], folder)


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def forked(
    arguments: list[str],
    errors: str | Path = os.devnull,
    environment: dict[str, str] | None = None,
    output: str | Path = os.devnull,
) -> int:
    """Start a command in a child that shares this process's imports.

    Args:
        arguments: of the command line; ranks that the child starts are ``python -m qwen_lit`` with them.
        errors: the file for what it says on stderr.
        environment: variables that it has beside those of this process.
        output: the file for what it says on stdout.

    Returns:
        Its pid.
    """
    import qwen_lit.__main__ as program

    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.environ.update(environment or {})
        for number, path in ((1, output), (2, errors)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644), number)
        # Those of pytest take lines to itself.
        logging.getLogger().handlers.clear()
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", 1, closefd=False)
        sys.argv, sys.modules["__main__"] = ["qwen_lit", *arguments], program
        torch.set_num_threads(1)
        code = 1
        try:
            code = program.main(arguments)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wait_for(path: Path) -> None:
    for _ in range(6000):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


def lengths(rows: list[dict], folder: Path) -> tuple[list[int], list[int]]:
    """Tokens of each instruction row by the tokenizer's own chat template, and how many of them are trained."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def tokens(chat: list[dict], **options) -> int:
        return len(tokenizer.apply_chat_template(chat, **options)["input_ids"])

    asked = [[{"role": "user", "content": row["instruction"]}] for row in rows]
    whole = [[*ask, {"role": "assistant", "content": row["output"]}] for ask, row in zip(asked, rows, strict=True)]
    found = [tokens(one) for one in whole]
    # What is trained ends with <|im_end|>; a newline follows it.
    prompts = [tokens(one, add_generation_prompt=True) for one in asked]
    return found, [length - prompt - 1 for length, prompt in zip(found, prompts, strict=True)]


def stopping(step: int, name: str = "SIGTERM") -> list[str]:
    number = int(signal.Signals[name])
    return [
        "--trainer.callbacks+=tests.runs.StopAt",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.signum={number}",
    ]


class Poison(L.Callback):
    """Makes the loss of the second micro-batch, or a gradient, of chosen steps not finite."""

    def __init__(self, steps: list[int], what: str = "loss") -> None:
        self.steps, self.what = steps, what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not hasattr(self, "plain"):
            self.plain = pl_module.loss_sum
        second = batch[1]["input_ids"]

        def loss_sum(one):
            loss = self.plain(one)
            return loss * float("nan") if torch.equal(one["input_ids"], second) else loss

        bad = trainer.global_step + 1 in self.steps and self.what == "loss"
        pl_module.loss_sum = loss_sum if bad else self.plain

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step + 1 in self.steps and self.what == "gradient":
            next(p for p in pl_module.parameters() if p.requires_grad).grad[0, 0] = float("inf")


class Gradients(L.Callback):
    """Keeps the gradient of every optimizer step, before it is clipped."""

    kept: list[dict[str, torch.Tensor]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        trained = ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
        self.kept.append({name: p.grad.clone() for name, p in trained})


class Modes(L.Callback):
    """Notes whether autocast is on in forward, in backward and where the step is made."""

    seen: dict[str, bool] = {}

    def on_train_start(self, trainer, pl_module):
        def note(name):
            return lambda *_: self.seen.update({name: torch.is_autocast_enabled("cpu")})

        parameter = next(p for p in pl_module.parameters() if p.requires_grad)
        parameter.register_hook(note("backward"))
        pl_module.model.get_output_embeddings().register_forward_pre_hook(note("forward"))
        trainer.optimizers[0].register_step_post_hook(note("step"))


class Slow(L.Callback):
    """Gives whoever watches the run time to disturb it, however busy the machine is."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        time.sleep(0.3)


SLOW = ["--trainer.callbacks+=tests.runs.Slow"]


class Do(L.Callback):
    """Calls a function of this module when a step begins."""

    def __init__(self, step: int, name: str, argument: str = "") -> None:
        self.step, self.name, self.argument, self.done = step, name, argument, False

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1 and not self.done:
            self.done = True
            globals()[self.name](trainer, self.argument)


def kill_workers(trainer, argument):
    import multiprocessing

    # Those of the validation live on after it, and nothing tells them from those of the training.
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)


def use_up_the_time(trainer, argument):
    from lightning.pytorch.callbacks import Timer

    for one in trainer.callbacks:
        if isinstance(one, Timer):
            one._duration = 0.0


def remove_file(trainer, path):
    Path(path).unlink()


def doing(step: int, name: str, argument: str = "") -> list[str]:
    return [
        "--trainer.callbacks+=tests.runs.Do",
        f"--trainer.callbacks.step={step}",
        f"--trainer.callbacks.name={name}",
        f"--trainer.callbacks.argument={argument}",
    ]


def spoil_adapter(trainer, argument):
    next(p for p in trainer.lightning_module.parameters() if p.requires_grad).data.fill_(float("nan"))
    trainer.lightning_module.on_before_optimizer_step = lambda optimizer: None


def count_workers(trainer, path):
    import multiprocessing

    Path(path).write_text(str(len(multiprocessing.active_children())))


def poison_rank(trainer, rank):
    module = trainer.lightning_module
    plain = module.loss_sum
    if trainer.global_rank == int(rank):

        def poisoned(batch):
            module.loss_sum = plain
            return plain(batch) * float("nan")

        module.loss_sum = poisoned


class Record(L.Callback):
    """Writes what a run begins with, what it is given, and how far the embeddings are from the table's."""

    def __init__(self, path: str) -> None:
        self.path, self.batches, self.noise, self.products = Path(path), [], [], set()

    def on_train_start(self, trainer, pl_module):
        self.first = {name: value.clone() for name, value in pl_module.state_dict().items()}
        table = pl_module.model.get_input_embeddings()

        def look(module, given, output):
            changed = (output - torch.nn.functional.embedding(given[0], module.weight)).abs().max()
            self.noise.append((float(changed), output.shape[1] * output.shape[2], module.training))

        table.register_forward_hook(look)
        head = pl_module.model.get_output_embeddings()
        head.register_forward_hook(lambda module, given, output: self.products.add(output.dtype))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        names = ("input_ids", "target_index", "targets")
        self.batches += [{name: padded(one, 0)[name] for name in names} for one in batch]

    def on_fit_end(self, trainer, pl_module):
        told = {"batches": self.batches, "noise": self.noise, "products": sorted(map(str, self.products))}
        torch.save({"first": self.first, **told}, self.path)


def recording(path: Path) -> list[str]:
    return ["--trainer.callbacks+=tests.runs.Record", f"--trainer.callbacks.path={path}"]


def scalars(out: Path) -> dict[str, list[float]]:
    """What TensorBoard shows, by name, in the order of the steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, dict[int, float]] = {}
    for file in sorted((out / "logs").glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        for name in events.Tags()["scalars"]:
            found.setdefault(name, {}).update({event.step: event.value for event in events.Scalars(name)})
    return {name: [values[step] for step in sorted(values)] for name, values in found.items()}


def worsen_validation(trainer, argument):
    """Every validation from here on is worse by a hundred nats a token."""
    module = trainer.lightning_module
    plain = module.on_validation_epoch_end

    def worse():
        module.validated[0] += 100 * module.validated[1]
        plain()

    module.on_validation_epoch_end = worse


def damage_file(trainer, path):
    Path(path).write_bytes(Path(path).read_bytes()[:1000])


def spoil_products(trainer, argument):
    """Products in 8 bits give another gradient from here on."""
    engine = trainer.lightning_module.fast
    plain = engine.loss_sum

    def spoiled(batch):
        loss = plain(batch)
        return loss + 1e3 * sum(p.sum() for p in engine.trained) if engine.products.narrow else loss

    engine.loss_sum = spoiled
