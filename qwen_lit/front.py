"""The entry of the command line: what can be answered without torch is answered here, within a second."""

import contextlib
import difflib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from qwen_lit import help
from qwen_lit.imports import import_bitsandbytes
from qwen_lit.keys import wrong_keys
from qwen_lit.signals import Interrupted, handle_signals
from qwen_lit.waiting import WAITS, environment_given, start_others

BESIDE = {
    "chat": "qwen_lit.commands.chat",
    "configs": "qwen_lit.shipped",
    "convert": "qwen_lit.convert",
    "data": "qwen_lit.data.split",
}
"""Commands that are no method of the Trainer: the module whose ``main`` takes the arguments."""
LIBRARIES = {"lightning": "trainer", "peft": "model.lora_config", "transformers": "model.quantization_config"}
"""Packages whose version decides which keys a section has."""
MEANT = {
    "train": "fit",
    "sft": "fit",
    "finetune": "fit",
    "fine-tune": "fit",
    "eval": "validate",
    "evaluate": "validate",
    "test": "validate",
    "infer": "predict",
    "generate": "predict",
    "merge": "export",
    "check": "inspect",
    "preprocess": "inspect",
    "estimate": "plan",
    "config": "configs",
    "init": "configs",
}
"""What other trainers call a command."""


def main(args: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 1 the work failed, 2 bad usage or input, 130 and 143 on signals.

    Args:
        args: of the command line, beginning with the command; None takes those of the process.
    """
    given = sys.argv[1:] if args is None else args
    if WAITS in os.environ:
        return _waited(given)
    code = answered(given)
    if code is not None:
        return code
    if args is None:
        start_others(given)
    if given[0] in BESIDE:
        with _interruptible():
            command = import_module(BESIDE[given[0]])
        try:
            with handle_signals():
                return int(command.main(given[1:]))
        except Interrupted as stop:
            return stop.exit_code
    with _interruptible():
        import_bitsandbytes()
        from qwen_lit.cli import run
    return run(given)


def _waited(given: list[str]) -> int:
    """Run a command as another rank than the first, once that one has come to train; load what it takes before."""
    with _interruptible():
        import_bitsandbytes()
        from qwen_lit.cli import run

        environment = environment_given()
    if environment is None:
        return 0
    os.environ.clear()
    os.environ.update(environment)
    return run(given)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends the process at once: while libraries are loaded it would be a traceback out of any of them."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def answered(given: list[str]) -> int | None:
    """The exit code, where a command line needs no more than the reference; else None."""
    reference = help.load()
    first = given[0].replace("_", "-") if given else ""
    if "--version" in given[:1]:
        _show(help.versions())
        return 0
    if not given:
        print(help.overview(reference), file=sys.stderr)
        return 2
    if first in ("-h", "--help", "help"):
        _show(help.overview(reference))
        return 0
    if first.startswith("-"):
        # A configuration of several commands may stand before the command.
        return None
    if first not in reference["commands"]:
        near = MEANT.get(first) or next(iter(difflib.get_close_matches(first, reference["commands"], 1, 0.5)), None)
        print(f"error: there is no command {given[0]}{_question(near)}", file=sys.stderr)
        return 2
    if "--help" in given or "-h" in given:
        below = " ".join([first, *given[1:2]])
        _show(help.command(reference, below if below in reference["commands"] else first))
        return 0
    if first in BESIDE:
        return None
    lines = wrong_keys(given[1:], known_keys(reference, first), help.keys_of(reference, first))
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 2 if lines else None


def _show(text: str) -> None:
    """Print it, also to one who stops reading, such as head."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def known_keys(reference: dict[str, Any], command: str) -> set[str]:
    """The keys of a command; a section of a library that is not the one of the reference counts as one open key."""
    open_sections = [section for name, section in LIBRARIES.items() if _version(name) != reference["versions"][name]]
    hidden = tuple(f"{section}." for section in open_sections)
    return {one for one in help.keys_of(reference, command) if not one.startswith(hidden)} | set(open_sections)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _question(near: str | None) -> str:
    return f"; did you mean {near}?" if near else "; --help lists them"
