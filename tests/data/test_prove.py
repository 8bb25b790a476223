"""Every prepared row is compared with the tokenizer's own, and what is lost or differs is never taken as proven."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from qwen_lit.data.faults import DataError
from qwen_lit.data.prepare import PROVED, Task, prepare
from qwen_lit.data.prove import Prover, prove
from qwen_lit.data.rows import SCHEMA
from qwen_lit.data.sources import Source
from qwen_lit.errors import RunError


def spoil(folder: Path, change: Callable[[list[dict]], object]) -> None:
    """Change the prepared rows, as if a faster encoder had made them so, and take the mark of proof away."""
    with pa.ipc.open_file(str(folder / "rows.arrow")) as reader:
        rows = reader.read_all().to_pylist()
    change(rows)
    (folder / "rows.arrow").unlink()
    with pa.ipc.new_file(str(folder / "rows.arrow"), SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=SCHEMA))
    (folder / PROVED).unlink(missing_ok=True)


@pytest.fixture
def task(dataset, tmp_path) -> Task:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(dataset.read_bytes())
    return Task([Source(str(path))], {"max_length": 256}, {})


@pytest.fixture
def folder(task, tokenizer, tmp_path) -> Path:
    """Prepared rows that nothing has compared yet."""
    made = prepare(task, tokenizer, tmp_path / "cache")
    (made / PROVED).unlink()
    return made


def test_rows_that_are_the_tokenizers_own_are_marked(task, tokenizer, folder):
    prove(task, tokenizer, folder)
    assert (folder / PROVED).is_file()


def test_an_id_that_differs_is_shown_with_its_row_and_the_text_around_it(task, tokenizer, folder):
    other = tokenizer.convert_tokens_to_ids("Z")

    def change(rows):
        ids = rows[7]["input_ids"]
        ids[rows[7]["spans"][0]] = other

    spoil(folder, change)
    with pytest.raises(DataError) as raised:
        prove(task, tokenizer, folder)
    text = str(raised.value)
    assert f"{task.sources[0].path}:8: the prepared token ids differ" in text and str(folder) in text
    lines = [line.strip() for line in text.splitlines()]
    part = next(line for line in lines if line.startswith("the ids part at token "))
    at = part.removeprefix("the ids part at token ").split()[0]
    assert f"prepared, from {at}: [{other}] 'Z'" in lines
    own = next(line for line in lines if line.startswith(f"apply_chat_template, from {at}: ["))
    assert own.partition("] ")[2].startswith("'I")
    assert any(line.startswith("both, from ") and "tant\\n" in line for line in lines)
    assert any(line.startswith("both, after it: [") for line in lines)
    assert not (folder / PROVED).exists()


def test_a_trained_range_that_differs_is_shown_on_both_sides(task, tokenizer, folder):
    def change(rows):
        rows[3]["spans"][0] += 1
        rows[3]["supervised"] -= 1

    spoil(folder, change)
    with pytest.raises(DataError, match=r"rows\.jsonl:4: ") as raised:
        prove(task, tokenizer, folder)
    text = str(raised.value)
    assert "the ids part" not in text and "the trained ranges [begin, end) of the tokens differ" in text
    begins = [int(line.split("[")[1].split(",")[0]) for line in text.splitlines() if ", [" in line and "]" in line]
    assert len(begins) == 2 and begins[0] == begins[1] + 1
    assert "<|im_end|>" in text and "supervised: " in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows[0]["input_ids"].append(5), "apply_chat_template, from .*: nothing"),
        (lambda rows: rows[0].update(note="cut"), "note: 'cut' prepared, '' by apply_chat_template"),
        (lambda rows: rows[0].update(hash=7), "hash: 7 prepared, [0-9]+ by apply_chat_template"),
        (lambda rows: rows.pop(), r"rows\.jsonl:25: .*\n  the row is missing from the prepared ones"),
        (lambda rows: rows.append(rows[0]), r"rows\.jsonl:1: .*\n  the row is only in the prepared ones"),
        (lambda rows: rows.clear(), r"rows\.jsonl:1: .*\n  the row is missing from the prepared ones"),
        (lambda rows: rows[0]["input_ids"].insert(0, -1), r"prepared, from 0: \[-1\] ''"),
    ],
)
def test_whatever_else_differs_is_named(task, tokenizer, folder, change, words):
    spoil(folder, change)
    with pytest.raises(DataError, match=words):
        prove(task, tokenizer, folder)
    assert not (folder / PROVED).exists()


@pytest.mark.parametrize("change", ["another row", "fewer rows", "gone"])
def test_files_that_have_changed_since_are_said_to_have_and_no_row_is_blamed(task, tokenizer, folder, change):
    path = Path(task.sources[0].path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if change == "gone":
        path.unlink()
    else:
        edited = lines[1:] if change == "fewer rows" else [lines[1], *lines[1:]]
        path.write_text("".join(edited), encoding="utf-8")
    with pytest.raises(DataError, match="changed since its rows were prepared.*put the file back") as raised:
        prove(task, tokenizer, folder)
    assert "differ from" not in str(raised.value)
    assert not (folder / PROVED).exists()


def test_prepared_rows_that_cannot_be_read_are_named(task, tokenizer, folder):
    (folder / "rows.arrow").write_bytes(b"torn")
    with pytest.raises(DataError, match="the prepared rows cannot be read"):
        prove(task, tokenizer, folder)


def test_rows_are_proven_where_the_mark_cannot_be_left(task, tokenizer, folder, monkeypatch):
    def refused(path, *arguments, **options):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "touch", refused)
    prove(task, tokenizer, folder)
    assert not (folder / PROVED).exists()


# in a process of its own


def ended(prover: Prover) -> bool:
    prover.wait(60)
    return prover.done()


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_of_its_own_proves_at_the_lowest_priority_and_hears_no_ctrl_c(task, tokenizer, folder):
    prover = Prover({folder: task}, tokenizer)
    pid = prover.process.pid
    assert not prover.done()
    assert os.getpriority(os.PRIO_PROCESS, pid) == 19 and os.getpgid(pid) != os.getpgid(0)
    assert ended(prover) and (folder / PROVED).is_file()


def test_a_process_of_its_own_tells_what_differs(task, tokenizer, folder):
    spoil(folder, lambda rows: rows[2]["input_ids"].append(5))
    with pytest.raises(DataError, match=r"rows\.jsonl:3: .*\n  the ids part at token "):
        ended(Prover({folder: task}, tokenizer))


@pytest.mark.parametrize("loss", ["killed", "broken", "its code is lost"])
def test_a_process_that_is_lost_proves_nothing(task, tokenizer, folder, loss):
    prover = Prover({folder: task} if loss != "broken" else {folder: None}, tokenizer)
    if loss == "broken":
        prover.wait(60)
    else:
        prover.process.kill()
    if loss == "its code is lost":
        # Another part of this process has waited for it.
        os.waitpid(prover.process.pid, 0)
    words = {"killed": r"code -9 \(out of memory", "broken": "code 1 .AttributeError: ", "its code is lost": "code 0"}
    with pytest.raises(RunError, match=words[loss]):
        ended(prover)
    assert not (folder / PROVED).exists()


def test_a_process_that_is_stopped_is_gone_at_once(task, tokenizer, folder):
    prover = Prover({folder: task}, tokenizer)
    prover.stop()
    assert not Path(f"/proc/{prover.process.pid}").exists()


class Endless:
    """In the place of a folder: the comparison has begun and never ends."""

    def __truediv__(self, name):
        time.sleep(600)


PARENT = """
import time
from qwen_lit.data.prove import Prover
from tests.data.test_prove import Endless
print(Prover({Endless(): None}, None).process.pid, flush=True)
time.sleep(600)
"""


def test_a_process_of_its_own_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    pid = int(parent.stdout.readline())
    time.sleep(2.0)
    assert running(pid)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    ends = time.monotonic() + 300
    while running(pid) and time.monotonic() < ends:
        time.sleep(0.05)
    assert not running(pid)
