"""Every row of a prepared dataset beside what the exported tokenizer makes of it by itself, token for token.

Run as a module it is the process that ``Prover`` starts.
"""

import contextlib
import itertools
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from qwen_lit.data.difference import difference
from qwen_lit.data.encoding import Task, encoding
from qwen_lit.data.faults import DataError
from qwen_lit.data.prepare import PROVED, cache_key
from qwen_lit.data.rows import Rows
from qwen_lit.errors import RunError
from qwen_lit.signals import end_with


def prove(task: Task, tokenizer: Any, folder: Path, processes: int | None = None) -> None:
    """Compare all rows, once for a folder; small datasets have been compared while they were prepared.

    The rows stream: memory holds a few chunks of the files, whatever their size.

    Args:
        task: what the folder was prepared from.
        tokenizer: transformers'.
        folder: as ``prepare`` returned it.
        processes: as for ``prepare``.

    Raises:
        DataError: naming the first row that differs, with the difference; or the files have changed since they were
            prepared, or cannot be read.
    """
    if (folder / PROVED).is_file():
        return
    try:
        _compare(task, tokenizer, folder, processes)
    except DataError as error:
        if _changed(task, tokenizer, folder):
            names = ", ".join(source.path for source in task.sources)
            raise DataError(
                f"{names}: changed since its rows were prepared, so they cannot be compared with the tokenizer's own "
                "token ids; put the file back, or start over with the changed one."
            ) from error
        raise
    # Where nobody can write, each run compares for itself.
    with contextlib.suppress(OSError):
        (folder / PROVED).touch()


def _compare(task: Task, tokenizer: Any, folder: Path, processes: int | None) -> None:
    try:
        stored = Rows(folder).batches
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{folder}: the prepared rows cannot be read ({error}); delete it and run again.") from error
    # Without the faster encoder each row is compared with ``apply_chat_template`` by the process that encodes it.
    with encoding(task, tokenizer, processes, None, "comparing rows with the chat template's own ids") as chunks:
        batches = (batch for batch, _, _ in chunks if batch is not None)
        for kept, own in itertools.zip_longest(stored, batches):
            if kept is None or own is None or not kept.equals(own):
                raise DataError(_told(_rows(kept), _rows(own), tokenizer, folder))


def _changed(task: Task, tokenizer: Any, folder: Path) -> bool:
    try:
        return cache_key(task, tokenizer) != folder.name
    except DataError:
        return True


def _rows(batch: Any) -> Iterator[dict[str, Any]]:
    return (batch.slice(row, 1).to_pylist()[0] for row in range(len(batch) if batch is not None else 0))


def _told(stored: Iterator[dict[str, Any]], own: Iterator[dict[str, Any]], tokenizer: Any, folder: Path) -> str:
    """The first row that differs, and how.

    Args:
        stored: prepared rows.
        own: the same by the tokenizer alone.
        tokenizer: transformers'.
        folder: of the prepared rows.
    """
    kept, wanted = next(pair for pair in itertools.zip_longest(stored, own) if pair[0] != pair[1])
    if kept is None or wanted is None:
        lines = [f"the row is {'missing from' if kept is None else 'only in'} the prepared ones"]
    else:
        backend = tokenizer.backend_tokenizer
        lines = difference(kept, wanted, lambda ids: backend.decode(ids, skip_special_tokens=False))
    shown = "".join(f"\n  {line}" for line in lines)
    return (
        f"{(wanted or kept)['place']}: the prepared token ids differ from the exported tokenizer's own:{shown}\n"
        f"Delete {folder} and start over, with another output_dir where a run has trained on it; report this."
    )


class Prover:
    """``prove`` in a process of its own, beside a training.

    It is a new process, never forked: CUDA runs in this process. It takes one core at the lowest priority and sees no
    GPU, does not hear the terminal's Ctrl-C, and ends with this process however that ends.
    """

    def __init__(self, prepared: Mapping[Path, Task], tokenizer: Any) -> None:
        """Starts it.

        Args:
            prepared: folder to what it was prepared from.
            tokenizer: transformers'.

        Raises:
            RunError: it cannot be started.
        """
        quiet = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        try:
            self.said = tempfile.TemporaryFile()
            # A file, as a pipe would wait for its reader.
            with tempfile.TemporaryFile() as given:
                pickle.dump((os.getpid(), dict(prepared), tokenizer), given)
                given.seek(0)
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "qwen_lit.data.prove"],
                    stdin=given,
                    stdout=self.said,
                    stderr=self.said,
                    env=os.environ | quiet,
                    start_new_session=True,
                )
        except OSError as error:
            raise RunError(
                f"the process that compares every row cannot be started ({error}); free memory or disk."
            ) from error
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self.process.pid, 19)

    def done(self) -> bool:
        """Whether every row has been compared and is the tokenizer's own; does not wait.

        Raises:
            DataError: as ``prove`` does.
            RunError: the process has ended without an answer, so nothing is proven.
        """
        if self.process.poll() is None:
            return False
        self.said.seek(0)
        last = self.said.read().decode("utf-8", "replace").strip().rpartition("\n")[2]
        try:
            # An exit code says too little: it reads 0 too where it was lost.
            error = json.loads(last)["error"]
        except (ValueError, TypeError, KeyError):
            code = self.process.returncode
            why = "out of memory?" if code == -9 else last[:500]
            raise RunError(f"the process that compares every row has ended with code {code} ({why})") from None
        if error is not None:
            raise DataError(error)
        return True

    def wait(self, seconds: float) -> None:
        """Wait for its end, so long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def stop(self) -> None:
        """End it at once; what it has compared is compared again by the next."""
        self.process.kill()
        self.process.wait()


def main() -> None:
    """Prove what stands on standard input; the last line of the output is the answer."""
    parent, prepared, tokenizer = pickle.load(sys.stdin.buffer)
    end_with(parent)
    error = None
    try:
        for folder, task in prepared.items():
            prove(task, tokenizer, folder, processes=1)
    except DataError as found:
        error = str(found)
    print(f"\n{json.dumps({'error': error})}", flush=True)


if __name__ == "__main__":
    main()
