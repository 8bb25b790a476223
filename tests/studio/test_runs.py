"""Runs as their folders show them."""

import json
import subprocess
import sys

from qwen_lit.run import Run
from qwen_lit.studio import runs
from qwen_lit.studio.curves import Curves
from qwen_lit.studio.exports import serving, verdict
from qwen_lit.studio.folders import Folders

LOCK = """
import sys
from pathlib import Path
from qwen_lit.run import Run
held = Run(Path(sys.argv[1])).lock()
print("held", flush=True)
sys.stdin.read()
"""


def test_a_run_of_a_terminal_is_seen_and_its_lock_is_not_touched(tmp_path):
    run = Run(tmp_path / "output" / "run")
    process = subprocess.Popen(
        [sys.executable, "-c", LOCK, str(run.output_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    assert [one.output_dir for one in runs.find_runs(Folders([str(tmp_path)]))] == [run.output_dir.resolve()]
    assert runs.holder(run.output_dir / ".lock") == process.pid
    assert runs.state(run) == "running"
    process.communicate()
    assert runs.state(run) == "begun"
    run.checkpoints.mkdir()
    run.step_checkpoint(3).touch()
    assert runs.state(run) == "stopped" and runs.checkpoints(run) == [run.step_checkpoint(3)]
    run.summary.write_text("{}")
    assert runs.state(run) == "finished"


def test_answers_before_and_after_are_paired_by_their_prompt(tmp_path):
    run = Run(tmp_path)
    lines = [
        {"step": step, "prompt": f"p{n}", "answer": f"{step}{n}", "wanted": None} for step in (0, 5) for n in (1, 2)
    ]
    run.samples.write_text("".join(json.dumps(one) + "\n" for one in lines))
    assert [(a.answer, b.answer) for a, b in runs.before_and_after(run)] == [("01", "51"), ("02", "52")]
    run.samples.write_text("{broken\n")
    assert runs.before_and_after(run) == []


def test_curves_are_read_on_and_a_step_trained_again_counts_as_it_was_last(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    curves = Curves()
    assert curves.of(tmp_path) == {}
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("train/loss", 2.0, 1)
    writer.flush()
    assert curves.of(tmp_path) == {"train/loss": [(1, 2.0)]}
    writer.add_scalar("train/loss", 1.0, 2)
    writer.flush()
    assert curves.of(tmp_path)["train/loss"] == [(1, 2.0), (2, 1.0)]
    writer.close()


def test_a_verdict_is_a_line_for_each_kind_of_weights():
    curves = {
        "verdict/adapter_loss": [(1, 9.0), (4, 2.0)],
        "verdict/original_loss": [(4, 2.5)],
        "verdict/original_same_top": [(4, 0.5)],
        "train/loss": [(1, 1.0)],
    }
    assert verdict(curves) == [
        {"name": "adapter", "loss": "2.00000"},
        {"name": "original", "loss": "2.50000", "same_top": "50.00%"},
    ]


def test_commands_that_serve_are_those_of_the_card(tmp_path):
    assert serving(tmp_path) == []
    (tmp_path / "README.md").write_text("text\n```bash\n# vLLM\nvllm serve .\n```\n```python\nx\n```\n")
    assert serving(tmp_path) == ["# vLLM\nvllm serve ."]
