"""What disturbs a command while its rows are prepared ends it at once, and leaves nothing behind."""

import json
import subprocess
import sys

import pytest

from qwen_lit.cli import main

STOPPED = {"group SIGINT": 130, "group SIGTERM": 143, "main SIGTERM": 143, "group SIGUSR1": 143, "group SIGHUP": 143}


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """More than what one process prepares, with room to be disturbed."""
    path = tmp_path_factory.mktemp("large") / "rows.jsonl"
    rows = ({"instruction": f"What is {n} plus {n}? " * 2, "output": f"It is {2 * n}. " * 5} for n in range(20_000))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert path.stat().st_size > 2_000_000
    return path


def test_a_disturbed_preparation_ends_with_its_code_without_a_process_or_half_a_cache(large, model_folder, tmp_path):
    cache = tmp_path / "cache"
    command = [
        "inspect",
        "--config",
        "configs/qwen7b.yaml",
        "--model.model_name_or_path",
        str(model_folder),
        "--data.dataset_path",
        str(large),
        "--data.num_proc",
        "3",
        "--data.cache_dir",
        str(cache),
        "--output_dir",
        str(tmp_path / "out"),
        "--trainer.accelerator",
        "cpu",
    ]
    asked = [*STOPPED, "worker SIGKILL", "main SIGKILL"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.interrupted", str(cache), ",".join(asked), *command],
        capture_output=True,
        text=True,
        timeout=1000,
    )
    found = json.loads(done.stdout)
    wanted = {**STOPPED, "worker SIGKILL": 1, "main SIGKILL": -9}
    assert {what: one["code"] for what, one in found.items()} == wanted, done.stderr
    assert not any(one["left"] for one in found.values())
    # Nobody can clear up after itself when it is killed; the next one does.
    assert {what: one["cache"] for what, one in found.items()} == {what: [] for what in asked} | {
        "main SIGKILL": ["tmp"]
    }
    assert "killed (code -9; out of memory?); lower data.num_proc" in done.stderr
    assert "Traceback" not in done.stderr
    assert main([one if one != "3" else "2" for one in command]) == 0
    assert sorted(path.suffix for path in cache.iterdir() if path.is_dir()) == [""]
