"""Items through a function in several processes, in order, none of which outlives its parent or its work."""

import multiprocessing
import os
import queue
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from qwen_lit.errors import RunError
from qwen_lit.signals import blocked, end_with, leave_to_parent


def in_order(
    function: Callable[[Any], Any], items: Iterable[Any], count: int, method: str
) -> Generator[Any, None, None]:
    """The function's value for each item, in the order of the items.

    A process waits for items on a pipe of its own; a thread for each process hands them over. However the iteration
    ends, the processes are gone with it.

    Args:
        function: forked with each process, or pickled once for it.
        items: read a little ahead of the values.
        count: processes.
        method: ``fork`` or ``spawn``.

    Raises:
        RunError: a process was killed.
    """
    context: Any = multiprocessing.get_context(method)
    processes: list[Any] = []
    idle: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    threads = ThreadPoolExecutor(count)

    def ask(item: Any) -> Any:
        process, pipe = idle.get()
        try:
            pipe.send(item)
            done, value = pipe.recv()
        except (EOFError, OSError):
            process.join()
            raise RunError(
                f"a process that reads rows was killed (code {process.exitcode}; out of memory?); "
                "lower data.num_proc, or free memory."
            ) from None
        finally:
            # Whoever asks a process that is gone is told so at once.
            idle.put((process, pipe))
        if not done:
            raise value
        return value

    waiting: deque[Future[Any]] = deque()
    try:
        # All are forked before a thread is started.
        for _ in range(count):
            with blocked():
                pipe, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(function, theirs, os.getpid()), daemon=True)
                processes.append(process)
                process.start()
            theirs.close()
            idle.put((process, pipe))
        for item in items:
            waiting.append(threads.submit(ask, item))
            if len(waiting) > 2 * count:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
        threads.shutdown(wait=True, cancel_futures=True)
        for process in processes:
            if process.pid is not None:
                process.join()


def _serve(function: Callable[[Any], Any], pipe: Any, parent: int) -> None:
    leave_to_parent()
    end_with(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    while True:
        item = pipe.recv()
        try:
            answer = (True, function(item))
        except Exception as error:
            error.add_note(traceback.format_exc())
            answer = (False, error)
        pipe.send(answer)
