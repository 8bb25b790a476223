"""Chat in a real terminal and in a pipe: editing, pastes, Ctrl-C, encodings."""

import codecs
import fcntl
import os
import pty
import re
import select
import subprocess
import sys
import termios
import time

import pytest

TALKING = """
import signal, sys, time
from qwen_lit.commands.chat import converse, line_editing

class Parrot:
    answering, cut, max_new_tokens = False, False, 9
    def command(self, line):
        return None if line == "/quit" else "obeyed " + line
    def ask(self, question):
        yield f"<{question!r}>"
        while "long" in question:
            yield "."
            time.sleep(0.01)

# A shell that starts the tests in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
with line_editing():
    sys.exit(converse(Parrot()))
"""


class Terminal:
    """A conversation in a real terminal of 80 columns, in a process of its own."""

    def __init__(self, folder, **environment) -> None:
        self.marks_pastes = False
        self.seen, self.decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
        self.fd, child = pty.openpty()
        settings = os.environ | {"XDG_STATE_HOME": str(folder), "TERM": "xterm", "COLUMNS": "80"} | environment
        self.process = subprocess.Popen(
            [sys.executable, "-c", TALKING],
            stdin=child,
            stdout=child,
            stderr=child,
            env=settings,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(child)
        self.until("> ")

    def until(self, words: str) -> str:
        """What is shown from here to some words."""
        began = time.monotonic()
        while words not in self.seen:
            assert time.monotonic() - began < 600, self.seen
            if select.select([self.fd], [], [], 0.5)[0]:
                self.seen += self.decoder.decode(os.read(self.fd, 4096))
        shown, _, self.seen = self.seen.partition(words)
        # A terminal marks what is pasted only while it is asked to.
        self.marks_pastes |= "\x1b[?2004h" in shown
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", shown + words)

    def type(self, text: str, words: str) -> str:
        if text == CTRL_C:
            # Python's readline overlooks a signal that comes between a key and its wait for the next one.
            time.sleep(0.5)
        os.write(self.fd, text.encode())
        return self.until(words)

    def ended(self) -> int:
        code = self.process.wait(60)
        os.close(self.fd)
        return code


BACKSPACE, UP, CTRL_C, CTRL_D = "\x7f", "\x1b[A", "\x03", "\x04"


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_terminal_edits_chinese_and_brings_the_last_question_back(tmp_path, locale):
    terminal = Terminal(tmp_path, LC_ALL=locale)
    assert "<'你在'>" in terminal.type("你好吗" + 2 * BACKSPACE + "在\r", "'>")
    terminal.until("> ")
    assert "<'你在吗'>" in terminal.type(UP + "吗\r", "'>")
    terminal.until("> ")
    terminal.type(CTRL_D, "\n")
    assert terminal.ended() == 0
    assert (tmp_path / "qwen_lit" / "chat_history").read_text("utf-8").splitlines() == ["你在", "你在吗"]


def test_lines_that_are_pasted_together_are_one_question(tmp_path):
    terminal = Terminal(tmp_path)
    assert terminal.marks_pastes
    pasted = "\x1b[200~one\ntwo\n三\x1b[201~"
    assert "<'one\\ntwo\\n三'>" in terminal.type(pasted + "\r", "'>")
    terminal.until("> ")
    terminal.type("/quit\r", "\n")
    assert terminal.ended() == 0


def test_ctrl_c_in_a_terminal_stops_an_answer_clears_a_line_and_twice_leaves(tmp_path):
    terminal = Terminal(tmp_path)
    terminal.type("a long one\r", "....")
    assert "Traceback" not in terminal.type(CTRL_C, "(Ctrl-C again leaves)")
    terminal.until("> ")
    terminal.type("half", "half")
    # A line that is cleared does not leave, though an answer was stopped just before.
    terminal.type(CTRL_C, "> ")
    assert "obeyed /x" in terminal.type("/x\r", "obeyed /x")
    terminal.until("> ")
    terminal.type("   \r", "> ")
    terminal.type("\r", "> ")
    terminal.type(CTRL_C, "(Ctrl-C again leaves)")
    terminal.until("> ")
    terminal.type(CTRL_C, "\n")
    assert terminal.ended() == 130


def test_a_pipe_gets_answers_alone_and_a_question_in_another_encoding_is_refused(tmp_path):
    def piped(text: bytes):
        return subprocess.run([sys.executable, "-c", PIPED + TALKING], input=text, capture_output=True, check=False)

    done = piped("你好\n\n   \n/x\nlast".encode())
    assert done.returncode == 0 and done.stdout.decode() == "<'你好'>\nobeyed /x\n<'last'>\n" and not done.stderr
    done = piped("您好".encode("gb18030"))
    assert done.returncode == 1 and b"this question is not utf-8" in done.stderr and not done.stdout


PIPED = "import sys; sys.stdin.reconfigure(encoding='utf-8', errors='replace')"
