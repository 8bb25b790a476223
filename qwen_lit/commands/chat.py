"""``qwen-lit chat PATH``: talk to an adapter on its base, or to a merged model."""

from __future__ import annotations

import argparse
import contextlib
import io
import locale
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from qwen_lit.errors import UserError, shortened
from qwen_lit.imports import import_bitsandbytes
from qwen_lit.names import expanded

if TYPE_CHECKING:
    # torch takes seconds to import, which a wrong option need not wait for.
    from qwen_lit.commands.conversation import Chat

HELP = """/system TEXT       start over under a system prompt; without TEXT, under none
/reset             start over; the system prompt stays
/think             switch thinking on or off
/save FILE.jsonl   add the conversation to a file, as a row to train on
/help              this list
/quit              leave; Ctrl-D does too
Ctrl-C             stop the answer; twice, leave"""
OUT_OF_MEMORY = (
    "out of memory; /reset starts over with a short conversation, and chat with --load_in_4bit takes a quarter of the "
    "memory for weights"
)
PROMPT = "> "


def main(args: list[str]) -> int:
    """One answer with ``--prompt``, a conversation without."""
    given = parser().parse_args(args)
    try:
        chat, described = started(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for stream in (sys.stdin, sys.stdout):
        # A terminal of another encoding shows what it can.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        if given.prompt is not None:
            return 0 if answered(chat, given.prompt) else 1
        if given.json:
            return converse_in_lines(chat, described)
        print(described, file=sys.stdout if sys.stdin.isatty() else sys.stderr)
        if sys.stdin.isatty():
            print("/help lists the commands; Ctrl-C stops an answer, twice leaves")
        # Ctrl-C is for the answer here, and not for the command.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with line_editing():
            code = converse(chat)
    except BrokenPipeError:
        # Whoever read the answers has gone; nothing more can be flushed there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if chat.answering:
        # A thread that still computes a token would abort the interpreter at its end.
        sys.stdout.flush()
        os._exit(code)
    return code


def parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="qwen-lit chat",
        usage="qwen-lit chat PATH [options]",
        description="Talk to an adapter on its base, or to a merged model.",
        epilog="In the conversation, /help lists the commands; Ctrl-C stops an answer, twice leaves.",
        allow_abbrev=False,
    )
    parser.add_argument("path", help="the output folder of a run, or final_model/ or lora_adapter/ in it")
    parser.add_argument("--prompt", help="answer this and leave")
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let it think first, or not (default: as trained)",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help='converse in JSON lines: {"ask": TEXT} in, {"piece": TEXT} and {"end": …} out',
    )
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token instead of drawing")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="most tokens of an answer (1024)")
    parser.add_argument(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="hold the weights in 4 bits, or not (default: as trained, or what fits)",
    )
    return parser


def started(given: argparse.Namespace) -> tuple[Chat, str]:
    """The conversation, and a line on its model.

    Raises:
        UserError: there is no model, or it does not fit.
    """
    if given.max_new_tokens < 1:
        raise UserError(f"--max_new_tokens is {given.max_new_tokens}; it must be at least 1.")
    if not os.path.isdir(expanded(given.path)):
        raise UserError(f"chat: no such folder: {given.path}; give the output folder of a run.")
    print(f"loading {given.path} ...", file=sys.stderr, flush=True)
    import_bitsandbytes()
    import torch

    from qwen_lit.commands.chat_model import choose, load
    from qwen_lit.commands.conversation import Chat
    from qwen_lit.gpu import check_gpu
    from qwen_lit.logs import set_up_logging
    from qwen_lit.thinking import read_form

    set_up_logging()
    check_gpu("auto", warn=True)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    choice, passed = choose(given.path, given.load_in_4bit, device)
    if passed:
        print(f"{passed}; taking {choice}", file=sys.stderr)
    model, tokenizer = load(choice, device)
    form = read_form(choice.folder)
    think = given.think if given.think is not None or form is None else form.enable_thinking
    chat = Chat(model, tokenizer, given.max_new_tokens, not given.greedy, think)
    if given.system:
        chat.command("/system " + given.system)
    if given.think is not None and not chat.can_think:
        print("this model's chat template has no thinking mode: --think changes nothing", file=sys.stderr)
    thinking = ("on" if chat.think else "off") if chat.can_think else "none"
    if chat.can_think and given.think is None and form is not None:
        thinking += ", as trained"
    held = choice.held or str(model.dtype).removeprefix("torch.")
    return chat, f"{choice}, {held}, on {device}, thinking: {thinking}"


def converse_in_lines(chat: Chat, described: str) -> int:
    """A conversation with a program; its first line tells of the model."""
    from qwen_lit.commands.chat_lines import converse, tell

    signal.signal(signal.SIGINT, signal.default_int_handler)
    tell(ready=described, thinks=chat.can_think)
    return converse(chat)


def converse(chat: Chat) -> int:
    """Questions and answers until the end; returns the exit code."""
    interactive, stopped, failed = sys.stdin.isatty(), False, False
    while True:
        line = None
        try:
            if interactive:
                print()
            line = input(PROMPT if interactive else "")
            stopped = False
            if line.startswith("/"):
                said = chat.command(line)
                if said is None:
                    break
                print(said)
            elif "\N{REPLACEMENT CHARACTER}" in line:
                print(f"error: this question is not {sys.stdin.encoding}; give it in that encoding.", file=sys.stderr)
                failed = True
            elif line.strip():
                failed |= not answered(chat, line.strip())
        except EOFError:
            if interactive:
                print()
            break
        except KeyboardInterrupt:
            print()
            if line is None and _typed():
                # It clears what was typed, as in a shell.
                continue
            if stopped or chat.answering:
                return 130
            print("(Ctrl-C again leaves)")
            stopped = True
    return int(failed and not interactive)


def _typed() -> str:
    """What stands on the line that Ctrl-C has left."""
    readline = sys.modules.get("readline")
    return readline.get_line_buffer() if readline else ""


def answered(chat: Chat, question: str) -> bool:
    """Print the answer as it comes; False when there is none, and why is said."""
    answer = chat.ask(question)
    try:
        for piece in answer:
            print(piece, end="", flush=True)
        print()
    except BrokenPipeError:
        raise
    except Exception as error:
        import torch

        full = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if full and torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = f"{type(error).__name__}: {shortened(' '.join(str(error).split()))}"
        print(f"error: {OUT_OF_MEMORY if full else reason}.", file=sys.stderr)
        return False
    finally:
        answer.close()  # type: ignore[attr-defined]
    if chat.cut:
        print(f"(cut at {chat.max_new_tokens} tokens; --max_new_tokens takes more)", file=sys.stderr)
    return True


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Editing and a history of questions in a terminal, where Python has readline."""
    if not sys.stdin.isatty():
        yield
        return
    if locale.nl_langinfo(locale.CODESET) == "ANSI_X3.4-1968":
        # In the locales C and POSIX Python reads UTF-8, but readline, which asks the environment, bytes.
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
            os.environ["LC_ALL"] = "C.UTF-8"
    try:
        import readline
    except ImportError:
        yield
        return
    # Lines that are pasted together are one question.
    readline.parse_and_bind("set enable-bracketed-paste on")
    history = Path(expanded(os.environ.get("XDG_STATE_HOME") or "~/.local/state")) / "qwen_lit" / "chat_history"
    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.set_history_length(1000)
            readline.write_history_file(history)
