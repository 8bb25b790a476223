"""One bar stays at the bottom of a terminal, and nothing is printed over it."""

import io
import logging
import os
import re
import sys
import time
import types
import warnings

import pytest
from tqdm.utils import disp_len
from transformers.utils import logging as transformers_logging

from qwen_lit import screen
from qwen_lit.callbacks.progress import SPARE, RunProgress
from qwen_lit.cli import main
from qwen_lit.progress import Progress
from qwen_lit.screen import Bar, Handler, drawn, printing_above


class Terminal(io.StringIO):
    """Keeps what is written; ``rows`` are what stands on its screen."""

    width = 80

    def isatty(self) -> bool:
        return True

    def rows(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for code, plain in re.findall(r"(\x1b\[\d*[KJA]|[\r\n])|([^\x1b\r\n]+)", self.getvalue()):
            if plain:
                rows[row] = rows[row][:column].ljust(column) + plain + rows[row][column + len(plain) :]
                column += len(plain)
            elif code == "\r":
                column = 0
            elif code == "\n":
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            elif code.endswith("A"):
                row -= int(code[2:-1] or 1)
            else:
                rows[row] = rows[row][:column]
                rows[row + 1 :] = [] if code.endswith("J") else rows[row + 1 :]
        return rows


@pytest.fixture
def terminal(monkeypatch):
    """Makes both streams one terminal, to which the lines of the log go; pytest sets the streams before each test."""
    found, log = Terminal(), logging.getLogger("qwen_lit")
    handler, level = Handler(found), log.level

    def begin() -> Terminal:
        monkeypatch.setattr(sys, "stderr", found)
        monkeypatch.setattr(sys, "stdout", found)
        monkeypatch.setattr(screen, "columns", lambda file: found.width)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        return found

    yield begin
    logging.captureWarnings(False)
    transformers_logging.set_tqdm_hook(None)
    log.removeHandler(handler)
    log.setLevel(level)


PARTS = {"loss": "loss 0.342", "val": "val 1.601", "lr": "lr 1.5e-04", "tok/s": "5,120 tok/s", "time": "1:12:34 left"}


@pytest.mark.parametrize("width", [30, 50, 77, 117, 250])
@pytest.mark.parametrize("head", ["step 12,345/28,500", "读取 小说.jsonl"])
def test_a_line_never_is_wider_than_the_terminal(width, head):
    for share in (None, 0.0, 0.4, 1.0, 1.2):
        assert disp_len(drawn(width, head, share, PARTS, SPARE)) <= width


def test_a_narrow_terminal_leaves_out_the_less_important_and_keeps_a_bar():
    assert drawn(77, "step 120/285", 0.5, PARTS, SPARE) == (
        "step 120/285 |██████      |  loss 0.342  val 1.601  5,120 tok/s  1:12:34 left"
    )
    assert all(part in drawn(117, "step 120/285", 0.5, PARTS, SPARE) for part in PARTS.values())
    narrow = drawn(50, "step 120/285", 0.5, PARTS, SPARE)
    assert "loss 0.342" in narrow and "1:12:34 left" in narrow and "val" not in narrow
    assert re.search(r"\|█{4,} {4,}\|", narrow)


def test_log_lines_and_prints_stand_above_the_bar_and_a_closed_bar_leaves_nothing(terminal):
    shown = terminal()
    log = logging.getLogger("qwen_lit.test")
    bar = Bar(lambda width: "the bar")
    with printing_above():
        log.info("first")
        print("printed", "in", "parts", end="")
        print(" and ended")
        shown.write("^C")
        log.warning("second")
        assert shown.rows() == ["first", "printed in parts and ended", "second", "the bar"]
        print("no end", end="")
    bar.close()
    assert shown.rows()[:3] == ["first", "printed in parts and ended", "second"] and "the bar" not in shown.rows()


def test_a_bar_is_drawn_anew_where_the_terminal_has_become_narrower(terminal):
    shown = terminal()
    bar = Bar(lambda width: "x" * width)
    assert shown.rows() == ["x" * 77]
    # The terminal has wrapped the line into two.
    shown.width = 50
    shown.seek(0)
    shown.truncate()
    shown.write("x" * 50 + "\n" + "x" * 27)
    bar.refresh()
    assert shown.rows() == ["x" * 47]
    bar.close()


def test_what_is_short_draws_no_bar_and_what_is_long_leaves_none(terminal, monkeypatch):
    shown = terminal()
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = logging.getLogger("qwen_lit.test")
    with Progress("reading 小说.jsonl", 100e6, "B") as progress:
        progress.advance(10e6, rows=100)
        log.info("a line")
        assert shown.rows() == ["a line", ""]
        now[0] = 3.0
        progress.advance(40e6, rows=400)
        assert shown.rows()[1].startswith("reading 小说.jsonl |███")
        assert shown.rows()[1].endswith("50%  50.0 MB of 100.0 MB  0:00:03 left")
    assert shown.rows() == ["a line", ""]


def test_a_run_has_one_bar_which_leaves_nothing_behind(terminal, command, tmp_path, monkeypatch):
    shown = terminal()
    seen = []
    line = RunProgress._line
    # However fast the machine is.
    monkeypatch.setattr(Bar, "draw", Bar.refresh)
    monkeypatch.setattr(RunProgress, "_line", lambda self, width: seen.append(line(self, width)) or seen[-1])
    options = [
        "--trainer.enable_progress_bar",
        "true",
        "--trainer.max_steps",
        "3",
        "--data.num_workers",
        "0",
        "--trainer.val_check_interval",
        "1",
    ]
    assert main(command(tmp_path / "out", *options)) == 0
    rows = shown.rows()
    assert not [row for row in rows if "|" in row or re.match(r"step \d", row)]
    assert any(one.startswith("step 0/3 |") for one in seen) and any("validating 1/" in one for one in seen)
    assert any(re.match(r"step 2/3 \|█+ +\|  loss .*\d:\d\d:\d\d left$", one) for one in seen)


def test_a_run_that_goes_on_begins_at_its_step_and_one_without_end_shows_what_has_passed(monkeypatch):
    bar = RunProgress()
    monkeypatch.setattr(time, "perf_counter", lambda: 120.0)
    bar.began, bar.last, bar.first, bar.step, bar.total = 0.0, 120.0, 100, 102, 200
    bar.metrics = {"loss": "1.234"}
    assert re.fullmatch(r"step 102/200 \|█{15,} +\|  loss 1.234  1:38:00 left", bar._line(80))
    bar.metrics |= {"tok/s": "400"}
    bar.each = " (100 a card)"
    assert bar._line(80).endswith("loss 1.234  400 tok/s (100 a card)  1:38:00 left")
    bar.metrics, bar.total = {"loss": "1.234"}, None
    assert bar._line(80) == "step 102  loss 1.234  0:02:00"


def test_a_notebook_gets_a_bar_below_its_lines_as_well(terminal, monkeypatch):
    shown = terminal()
    monkeypatch.setattr(Terminal, "isatty", lambda self: False)
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    bar = Bar(lambda width: "the bar")
    logging.getLogger("qwen_lit.test").info("a line")
    assert [row.rstrip() for row in shown.rows()] == ["a line", "the bar"] and "\x1b" not in shown.getvalue()
    bar.close()


def test_lines_stand_above_a_bar_of_rich_too(terminal, monkeypatch):
    shown = terminal()
    proxy = io.StringIO()
    proxy.isatty, proxy.rich_proxied_file = lambda: True, shown
    monkeypatch.setattr(sys, "stderr", proxy)
    logging.getLogger("qwen_lit.test").info("a line")
    assert proxy.getvalue() == "a line\n" and not shown.getvalue() and not screen.on_screen()


def test_a_dumb_terminal_and_a_file_get_plain_lines(terminal, monkeypatch):
    shown = terminal()
    monkeypatch.setenv("TERM", "dumb")
    logging.getLogger("qwen_lit.test").info("a line")
    assert shown.getvalue() == "a line\n" and not RunProgress().screen
    assert os.environ["TERM"] == "dumb"
