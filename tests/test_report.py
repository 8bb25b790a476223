"""What a run tells: its start, its panel, its summary and its page; and the callbacks of others beside ours."""

import importlib.util
import json
import re
from html.parser import HTMLParser

import pytest
import torch

from qwen_lit.callbacks.metrics import Counts, Throughput
from qwen_lit.cli import main
from qwen_lit.flops import peak_flops, token_flops
from qwen_lit.report import chart, number, scale
from tests.runs import stopping


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(command(out, *stopping(4))) == 143
    assert main(command(out, "--ckpt_path", "last", "--export.merge", "true")) == 0
    return out


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_summary_holds_the_whole_run_across_a_resume(run):
    summary = json.loads((run / "summary.json").read_text())
    assert [point[0] for point in summary["history"]["loss"]] == list(range(1, 11))
    assert summary["resumed_at"] == [4] and summary["skipped_steps"] == 0
    assert [point[0] for point in summary["history"]["val_loss"]] == [5, 10]
    assert summary["data"]["examples trained"] == 53 and summary["verdict"]["rows"] == 6
    assert 0.5 < summary["throughput"]["fill"] <= 1 and summary["throughput"]["model_tflops"] > 0


def test_the_page_needs_nothing_else_and_shows_curves_samples_and_verdict(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert sum(tag == "figure" for tag, _ in tags.found) == 4
    outside = [value for _, attrs in tags.found for key, value in attrs.items() if key in ("src", "href")]
    assert not outside and "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    for words in ("Answers before and after", "answer at step 10", "merge, original", "supervised", "resumed at"):
        assert words in text, words


def test_what_users_write_cannot_become_markup():
    from qwen_lit.report import samples

    line = {"step": 1, "prompt": "<script>", "answer": "<b>&", "stopped": True, "wanted": None}
    assert "<script>" not in samples([line]) and "&lt;b&gt;&amp;" in samples([line])


@pytest.mark.parametrize(("low", "high"), [(0.1, 3.2), (5, 5), (-2e-6, 3e-6), (0, 20_000), (0, 0)])
def test_the_ticks_of_a_chart_are_round_and_hold_the_values(low, high):
    bottom, top, ticks = scale(low, high)
    assert bottom <= low <= high <= top and 2 <= len(ticks) <= 9
    assert all(len(number(tick)) <= 8 for tick in ticks)


def test_a_chart_of_points_that_are_not_finite_is_left_out():
    assert chart("Loss", {"training": [[1, float("nan")]], "validation": []}) == ""


def test_the_start_is_told_in_lines_of_eighty_columns(command, tmp_path, caplog):
    assert main(command(tmp_path / "out", "--trainer.max_steps", "1")) == 0
    told = [record.message for record in caplog.records if record.name == "qwen_lit.callbacks.report"]
    for name in ("model", "trained", "base", "engine", "data", "step", "run", "device", "output", "begins at"):
        assert any(line.startswith(name) for line in told), name
    assert all(len(line) <= 66 for line in told if "/tmp" not in line)


def test_the_panel_counts_four_operations_a_frozen_parameter(model_folder):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_folder)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    linear = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    lora, attention = 2 * 4 * (64 + 64), 2 * 10 * 64 * 2
    whole, forward = token_flops(model, length=10, supervised=0.5)
    assert whole == 4 * (linear + 0.5 * config.vocab_size * 64) + 6 * lora + 3 * attention
    assert forward == 2 * (linear + lora) + attention
    counts = Counts(1000, supervised=600, computed=1250, steps=2, waiting=0.1, saving=0.2, validating=1.0, seconds=2.0)
    panel = Throughput(flops=(2e9, 1e9), recomputed=0.5, peak=4e12).panel(counts)
    assert panel["tokens_per_second"] == 1000 and panel["fill"] == 0.8 and panel["model_tflops"] == 2.0
    assert panel["flop_use"] == 0.5 and panel["recompute_tflops"] == 0.5 and panel["share_validating"] == 0.5


def test_a_card_is_known_by_the_longest_name_that_fits():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("a card of tomorrow") is None


def test_without_a_gpu_the_plan_is_arithmetic_and_says_so(command, tmp_path, capsys):
    arguments = command(tmp_path / "out")[1:]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "no GPU is seen" in text and " 8.00 GiB" in text and "10 optimizer steps" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert main(["plan", *arguments, "--memory_budget", "1GiB", "--json", "true"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured"] is False and result["plans"][0]["budget_gib"] == 1.0 and result["steps"] == 10
    assert not (tmp_path / "out").exists()


def test_a_budget_that_nothing_fits_is_said_with_exit_code_1(command, tmp_path, capsys):
    assert main(["plan", *command(tmp_path / "out")[1:], "--memory_budget", "100MiB"]) == 1
    assert "does not fit" in capsys.readouterr().out


def test_a_log_file_gets_lines_without_control_codes(command, tmp_path):
    import subprocess
    import sys

    bar = ["--trainer.enable_progress_bar", "true", "--trainer.max_steps", "2", "--samples.rows", "0"]
    done = subprocess.run([sys.executable, "-m", "qwen_lit", *command(tmp_path / "out", *bar)], capture_output=True)
    assert done.returncode == 0
    assert re.search(rb"step 2 of 2  loss \d+\.\d+  lr ", done.stderr)
    assert b"\x1b" not in done.stderr + done.stdout and b"\r" not in done.stderr + done.stdout


LOGGERS = {"CSVLogger": None, "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
INSTALLED = [name for name, package in LOGGERS.items() if package is None or importlib.util.find_spec(package)]


@pytest.mark.parametrize("name", INSTALLED)
def test_lightning_s_own_loggers_work_from_the_configuration(command, tmp_path, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = [f"--trainer.logger={name}", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    assert main(command(tmp_path / "out", *logger, "--trainer.max_steps", "2")) == 0
    if name == "CSVLogger":
        assert "train/loss" in next((tmp_path / "log").rglob("metrics.csv")).read_text()
    assert (tmp_path / "out" / "report.html").is_file()


def test_early_stopping_and_a_profiler_work_from_the_configuration(command, tmp_path):
    stopper = [
        "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss",
        "--trainer.callbacks.min_delta=100", "--trainer.callbacks.patience=1", "--trainer.max_epochs", "9",
        "--trainer.profiler=simple",
    ]  # fmt: skip
    out = tmp_path / "out"
    assert main(command(out, *stopper)) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 10
