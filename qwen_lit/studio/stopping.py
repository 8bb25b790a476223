"""Stopping a run, whoever has started it."""

import os
import signal

from qwen_lit.errors import UserError
from qwen_lit.run import Run
from qwen_lit.studio.jobs import Job
from qwen_lit.studio.runs import holder


def stop(run: Run, job: Job | None) -> None:
    """Ask a run to finish its optimizer step, save and end.

    Args:
        run: that is under way.
        job: that it was started with here; None for one of a terminal.

    Raises:
        UserError: it is another user's.
    """
    pid = holder(run.output_dir / ".lock")
    if pid is None:
        # It has not come to lock its folder yet, or has ended.
        if job is not None:
            job.stop()
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        return
    except PermissionError:
        raise UserError(f"process {pid} is another user's; stop it there.") from None
