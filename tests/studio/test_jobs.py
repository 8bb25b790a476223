"""Commands that outlive the page."""

import os
import signal
import subprocess
import sys
import time

from qwen_lit.studio.jobs import Job, Jobs, shown_command

START = """
import sys
from pathlib import Path
from qwen_lit.studio.jobs import Jobs
print(Jobs(Path(sys.argv[1]), Path(sys.argv[2])).start(sys.argv[3:]).folder, flush=True)
sys.stdin.read()
"""


def wait(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


def test_a_command_that_ends_leaves_its_code_and_its_outputs(tmp_path):
    jobs = Jobs(tmp_path / "jobs", tmp_path)
    job = jobs.start(["--version"])
    wait(lambda: job.code is not None)
    assert job.code == 0 and not job.alive and job.output("out").startswith("qwen_lit ")
    wrong = jobs.start(["no such $(touch pwned)"], tmp_path / "out")
    wait(lambda: wrong.code is not None)
    assert wrong.code == 2 and "there is no command no such $(touch pwned)" in wrong.output()
    assert not (tmp_path / "pwned").exists()
    assert jobs.newest("--version") == job and jobs.of_run(tmp_path / "out") == [wrong]


def test_a_command_outlives_whoever_started_it_and_is_found_and_stopped_by_another(tmp_path):
    # It waits for a configuration that nobody writes.
    fifo = tmp_path / "config.yaml"
    os.mkfifo(fifo)
    given = [str(tmp_path / "jobs"), str(tmp_path), "plan", "--config", str(fifo)]
    page = subprocess.Popen(
        [sys.executable, "-c", START, *given],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = page.stdout.readline().strip()
    (job,) = Jobs(tmp_path / "jobs", tmp_path).all()
    assert str(job.folder) == folder
    wait(lambda: job.pid is not None)
    os.killpg(page.pid, signal.SIGKILL)
    page.wait()
    time.sleep(0.2)
    assert job.alive
    os.kill(job.pid, signal.SIGKILL)
    wait(lambda: not job.alive)
    assert job.code == 128 + signal.SIGKILL


def test_another_process_with_its_number_is_not_taken_for_it(tmp_path):
    (tmp_path / "job.json").write_text('{"arguments": ["fit"]}')
    (tmp_path / "pid").write_text(str(os.getpid()))
    assert not Job(tmp_path).alive


def test_a_command_is_shown_as_it_can_be_typed():
    assert shown_command(["fit", "--config", "a b.yaml"]) == "qwen-lit fit --config 'a b.yaml'"
