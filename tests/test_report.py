"""What a run tells: its start, its panel, its summary and its page; and the callbacks of others beside ours."""

import html
import json
import math
import platform
import re
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.callbacks.metrics import Counts, Throughput
from qwen_lit.cli import main
from qwen_lit.hardware import cpu_has_bf16
from qwen_lit.model.schedules import schedule
from qwen_lit.planner.flops import peak_flops, token_flops
from qwen_lit.report import chart, number, page, scale
from tests.runs import begun, ended, forked, lengths, stopping, trace


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    answering = ["--samples.rows", "2"]
    assert main(command(out, *answering, *stopping(4))) == 143
    assert main(command(out, *answering, "--ckpt_path", "last", "--export.merge", "true")) == 0
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
    assert summary["data"]["examples_trained"] == 53 and summary["verdict"]["rows"] == 6


def test_a_run_s_figures_are_those_of_its_rows_however_fast_it_was(arguments, tmp_path, model_folder, dataset, rows):
    assert main([*arguments, "--samples.rows", "0", "--export.merge", "false"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    panel, data = summary["throughput"], summary["data"]
    tokens, answers = (np.array(one) for one in lengths(rows, model_folder))
    assert data["tokens_in_an_epoch"] == tokens.sum() and data["supervised_tokens"] == answers.sum()
    share = answers.sum() / tokens.sum()
    # Rates are timed, their quotients are not.
    rate = panel["tokens_per_second"]
    assert panel["supervised_tokens_per_second"] / rate == pytest.approx(share, rel=1e-5)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    once, again = token_flops(model, float((tokens**2).sum() / tokens.sum()), float(share))
    assert panel["model_tflops"] * 1e12 / rate == pytest.approx(once, rel=1e-5)
    assert panel["recompute_tflops"] * 1e12 / rate == pytest.approx(again, rel=1e-5), "every layer is recomputed"
    shares = [panel[f"share_{name}"] for name in ("waiting_for_data", "saving", "validating")]
    assert all(0 <= one < 1 for one in shares) and sum(shares) <= 1
    assert 0.5 < panel["fill"] <= 1


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder / "logs"))
    events.Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_counts_the_steps_of_the_log_and_shows_what_each_was_made_with(run):
    found, lines = scalars(run), trace(run)
    assert found["train/loss"] == [(line["step"], pytest.approx(line["loss"])) for line in lines]
    factor = schedule("cosine", 1, 10)
    assert found["train/lr"] == [(n, pytest.approx(2e-4 * factor(n - 1))) for n in range(1, 11)]
    supervised = json.loads((run / "summary.json").read_text())["data"]["supervised_tokens"]
    assert sum(value for _, value in found["train/supervised_tokens"]) == 2 * supervised
    assert found["train/skipped_steps"] == [(n, 0.0) for n in range(1, 11)]
    assert [step for step, _ in found["val/loss"]] == [5, 10]
    assert found["val/perplexity"] == [(step, pytest.approx(math.exp(value))) for step, value in found["val/loss"]]
    assert all(value > 0 for _, value in found["train/grad_norm"])
    assert [step for step, _ in found["verdict/adapter_loss"]] == [10]
    of_table = set(re.findall(r"`(train/\w+)`", Path("docs/watch.md").read_text(encoding="utf-8")))
    only_on_a_gpu = {"train/flop_use", "train/memory_gib", "train/peak_memory_gib"}
    only_in_8_bits = {"train/products_cosine", "train/products_error"}
    with_several_cards = {"train/tokens_per_second_per_card"}
    assert of_table - only_on_a_gpu - only_in_8_bits - with_several_cards == {
        tag for tag in found if tag.startswith("train/")
    }


def test_a_run_shorter_than_the_interval_shows_the_loss_of_its_last_step_everywhere(command, tmp_path, caplog):
    out = tmp_path / "out"
    options = ["--trainer.log_every_n_steps", "10", "--trainer.max_steps", "4"]
    bar = ["--trainer.enable_progress_bar", "true", "--export.merge", "true", "--export.smoke_rows", "0"]
    assert main(command(out, *options, *bar)) == 0
    last = trace(out)[-1]["loss"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["last"]["loss"] == pytest.approx(last) and summary["history"]["loss"][-1][0] == 4
    assert f"step 4 of 4  loss {last:.3f}" in caplog.text and f"training {last:.4f} at step 4" in caplog.text
    assert scalars(out)["train/loss"] == [(4, pytest.approx(last))]
    assert scalars(out)["train/tokens_per_second"][0][0] == 4
    for name in ("report.html", "final_model/README.md"):
        assert f"{last:.4f}" in (out / name).read_text(encoding="utf-8"), name


def test_the_figures_follow_log_every_n_steps_after_a_resume(command, tmp_path):
    out, quick = tmp_path / "out", ["--trainer.log_every_n_steps", "4"]
    assert main(command(out, *quick, *stopping(3))) == 143
    assert main(command(out, *quick, "--ckpt_path", "last")) == 0
    assert [step for step, _ in scalars(out)["train/tokens_per_second"]] == [4, 8, 10]
    assert [step for step, _ in scalars(out)["train/loss"]] == [4, 8, 10]


def test_the_configuration_is_written_by_fit_alone_and_kept_for_each_attempt(command, tmp_path, capsys):
    out, quick = tmp_path / "out", ["--trainer.max_steps", "3"]
    assert main(command(out, *quick, "--data.batch_size", "0")) == 2
    assert not (out / "config.yaml").exists()
    assert main(command(out, *quick)) == 0
    first = (out / "config.yaml").read_text()
    assert "max_steps: 3" in first and "learning_rate: 0.0002" in first
    events = sorted(path.name for path in (out / "logs").iterdir())
    other = ["--model.learning_rate", "0.003"]
    for name in ("validate", "plan", "inspect"):
        assert main([name, *command(out, *other)[1:]]) == 0
    assert sorted(path.name for path in (out / "logs").iterdir()) == events
    assert main(command(out, *other, "--ckpt_path", "last", "--data.batch_size", "2")) == 2
    assert "data.batch_size" in capsys.readouterr().err
    assert (out / "config.yaml").read_text() == first and not list(out.glob("config-*.yaml"))
    assert main(command(out, *other, "--ckpt_path", "last", "--trainer.max_steps", "5")) == 0
    assert (out / "config-3.yaml").read_text() == first
    assert "learning_rate: 0.003" in (out / "config.yaml").read_text()


def test_validate_without_rows_is_refused_and_without_a_checkpoint_says_what_it_measures(command, tmp_path, caplog):
    out = tmp_path / "out"
    assert main(["validate", *command(out)[1:], "--data.val_size", "0"]) == 2
    assert main(["validate", *command(out)[1:]]) == 0
    assert "the base with an adapter that has learnt nothing" in caplog.text
    assert not out.exists() or not list(out.rglob("*.yaml"))


def test_any_share_of_ten_rows_holds_out_one_and_of_fewer_says_what_to_write(arguments, rows, tmp_path, caplog):
    for count, told in ((10, "9 rows to train on"), (9, "holds out none of 9 distinct rows")):
        path = tmp_path / f"{count}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]))
        options = ["--data.dataset_path", str(path), "--data.val_size", "0.000001"]
        assert main(["inspect", *arguments[1:], *options]) == 0
        assert told in caplog.text
    assert "such as data.val_size: 1" in caplog.text


def test_the_page_needs_nothing_else_and_shows_curves_samples_and_verdict(run):
    text = (run / "report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert sum(tag == "figure" for tag, _ in tags.found) == 4
    outside = [value for _, attrs in tags.found for key, value in attrs.items() if key in ("src", "href")]
    assert not outside and "http" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL)
    for words in ("Answers before and after", "answer at step 10", "merge, original", "supervised", "resumed at"):
        assert words in text, words


HOSTILE = "<script>alert('x')</script><b onclick=\"x\">&amp;"


def hostile(value):
    """The same with markup at the end of every word, names included."""
    if isinstance(value, dict):
        return {name if name.isidentifier() else name + HOSTILE: hostile(one) for name, one in value.items()}
    if isinstance(value, list):
        return [hostile(one) for one in value]
    if not isinstance(value, str):
        return value
    # Within the turns of a prompt, not after them.
    return value.replace("<|im_end|>", HOSTILE + "<|im_end|>") if "<|im_end|>" in value else value + HOSTILE


def test_what_users_write_cannot_become_markup(run):
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    summary["export"] = {"missing": {"a file": "why"}, "again": "qwen-lit export"}
    summary["data"]["a name"] = "a value"
    summary["samples"][-1] |= {"answer": "what it says", "wanted": "an answer"}
    changed = hostile(summary) | {name: summary[name] for name in ("started", "ended")}
    pages = [page(summary), page(changed)]
    found = [Tags(), Tags()]
    for tags, text in zip(found, pages, strict=True):
        tags.feed(text)
    assert [tag for tag, _ in found[0].found] == [tag for tag, _ in found[1].found]
    assert not any(tag == "script" or "onclick" in attrs for tag, attrs in found[1].found)
    plain = html.unescape(pages[1])
    for words in ("a value", "a name", "what it says", "an answer", "why", "qwen-lit export"):
        assert words + HOSTILE in plain, words


@pytest.mark.parametrize(("low", "high"), [(0.1, 3.2), (5, 5), (-2e-6, 3e-6), (0, 20_000), (0, 0)])
def test_the_ticks_of_a_chart_are_round_and_hold_the_values(low, high):
    bottom, top, ticks = scale(low, high)
    assert bottom <= low <= high <= top and 2 <= len(ticks) <= 9
    assert all(len(number(tick)) <= 8 for tick in ticks)


def test_a_chart_of_points_that_are_not_finite_is_left_out():
    assert chart("Loss", {"training": [[1, float("nan")]], "validation": []}) == ""


def test_the_start_says_what_is_trained_on_what_and_for_how_long(run, model_folder):
    summary = json.loads((run / "summary.json").read_text())
    told, data = begun(run), summary["data"]
    tokens, supervised = data["tokens_in_an_epoch"], data["supervised_tokens"]
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder))
    # r x (inputs + outputs) of q, k, v and o, in two layers.
    trained = 4 * 2 * (2 * (64 + 64) + 2 * (64 + 32))
    total = sum(p.numel() for p in base.parameters()) + trained
    assert told == {
        "model": f"{model_folder} ({total / 1e6:.1f} million parameters)",
        "trained": f"{trained:,} ({trained / total:.2%}): r=4, alpha=64 on k_proj, o_proj, q_proj, v_proj; "
        "2 of 2 layers, 8 of 14 linears adapted",
        "base": "quantisation nf4, double, 14 of 15 linears",
        "engine": "reference (there is no CUDA device)",
        "data": f"53 rows, {tokens:,} tokens, {supervised / tokens:.0%} supervised; 6 rows held out",
        "step": f"3 micro-batches of 1 x 352 tokens, packed, about {tokens / 5:,.0f} tokens",
        "run": "10 optimizer steps, 2 epochs of 5, learning rate 0.0002 (cosine, 1 of warmup), paged_adamw_8bit",
        "device": "1 x cpu, precision "
        + ("bf16-mixed" if cpu_has_bf16() else "32-true (this CPU has no instructions for bf16)"),
        "output": str(run),
        "begins at": "step 4 (resumed)",
    }


def test_the_summary_has_the_figures_of_data_verdict_samples_and_versions(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["versions"]) >= {"torch", "transformers", "peft", "lightning", "bitsandbytes"}
    assert summary["versions"]["torch"] == torch.__version__
    last = {name: summary["history"][name][-1][1] for name in ("loss", "val_loss")}
    assert summary["last"] == {"step": 10, **last}
    assert summary["stopped"][1] == 3 and 0 <= summary["stopped"][0] <= 3
    lines = (run / "samples.jsonl").read_text("utf-8").splitlines()
    assert summary["samples"] == [json.loads(line) for line in lines] and lines
    assert summary["export"] == {} and summary["config"]["model"]["lora_config"]["r"] == 4
    data, manifest = summary["data"], json.loads((run / "checkpoints" / "step=00000010.json").read_text())
    assert data["rows_read"] == 59 and data["examples_held_out"] == 6
    assert data["share_supervised"] == pytest.approx(data["supervised_tokens"] / data["tokens_in_an_epoch"], abs=1e-6)
    assert data["fingerprint"] and data["fingerprint"] in json.dumps(manifest)


def test_rows_that_are_skipped_dropped_and_changed_are_counted_in_the_summary(arguments, dataset, tmp_path):
    path = tmp_path / "rows.jsonl"
    long = [{"instruction": "long " * 300, "output": "short"}, {"instruction": "a", "output": "long " * 300}] * 2
    text = dataset.read_text("utf-8") + "".join(json.dumps(row) + "\n" for row in long[:3]) + "nonsense\n" * 2
    path.write_text(text, "utf-8")
    skip = ["--data.dataset_path", str(path), "--data.on_bad_row", "skip", "--data.max_length", "128"]
    assert main([*arguments, *skip, "--trainer.max_steps", "1", "--export.merge", "false"]) == 0
    data = json.loads((tmp_path / "out" / "summary.json").read_text())["data"]
    assert (data["rows_read"], data["examples_trained"]) == (30, 27) and data["files"] == str(path)
    assert (data["faulty_skipped"], data["dropped"], data["changed"]) == (2, 1, 2)


def test_the_start_is_told_in_lines_of_eighty_columns(command, tmp_path, caplog):
    assert main(command(tmp_path / "out", "--trainer.max_steps", "1")) == 0
    told = [record.message for record in caplog.records if record.name == "qwen_lit.callbacks.report"]
    for name in ("model", "trained", "base", "engine", "data", "step", "run", "device", "output", "begins at"):
        assert any(line.startswith(name) for line in told), name
    assert all(len(line) <= 66 for line in told if "/tmp" not in line)


def test_the_panel_counts_four_operations_a_frozen_parameter(model_folder):
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
    assert "tokens_per_second_per_card" not in panel
    several = Throughput(flops=(2e9, 1e9), peak=4e12, cards=4).panel(counts)
    assert several["tokens_per_second"] == 1000 and several["tokens_per_second_per_card"] == 250
    assert panel["flop_use"] == 0.5 and panel["recompute_tflops"] == 0.5 and panel["share_validating"] == 0.5


def test_a_card_is_known_by_the_longest_name_that_fits():
    assert peak_flops("NVIDIA H100 PCIe") == 756e12 and peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("a card of tomorrow") is None


def test_a_log_file_gets_lines_without_control_codes(command, tmp_path):
    bar = ["--trainer.enable_progress_bar", "true", "--trainer.max_steps", "2"]
    errors, output = tmp_path / "errors.txt", tmp_path / "output.txt"
    assert ended(forked(command(tmp_path / "out", *bar), errors, output=output)) == 0
    said = errors.read_bytes()
    assert re.search(rb"step 2 of 2  loss \d+\.\d+  lr ", said)
    assert not set(b"\x1b\r") & set(said + output.read_bytes())


def test_the_summary_has_times_machine_and_paths_as_fields(run):
    summary = json.loads((run / "summary.json").read_text())
    started, ended = (datetime.fromisoformat(summary[name]) for name in ("started", "ended"))
    assert started.tzinfo and (ended - started).total_seconds() == pytest.approx(summary["duration_seconds"], abs=2)
    assert summary["attempts"] == 2 and summary["trained_seconds"] > 0
    assert summary["hardware"]["type"] == "cpu" and summary["hardware"]["count"] == 1 and summary["hardware"]["name"]
    assert summary["versions"]["python"] == platform.python_version() and "cuda" in summary["versions"]
    # The tests run in a checkout of this project.
    assert re.fullmatch("[0-9a-f]{40}", summary["git"]["commit"]) and summary["git"]["dirty"] in (True, False)
    facts = summary["run"]
    assert (facts["learning_rate"], facts["r"], facts["lora_alpha"], facts["rows"]) == (2e-4, 4, 64, 53)
    assert (facts["steps"], facts["steps_per_epoch"], facts["epochs"], facts["begins_at"]) == (10, 5, 2, 4)
    assert summary["best"]["step"] in (5, 10) and summary["best"]["val_loss"] <= summary["last"]["val_loss"]
    assert summary["exported"]["step"] == 10 and summary["exported"]["checkpoint"] == "last"
    assert {Path(path).relative_to(run).parts[0] for path in summary["files"].values()} == {
        "lora_adapter",
        "final_model",
        "checkpoints",
        "config.yaml",
        "samples.jsonl",
        "logs",
        "summary.json",
        "report.html",
    }
    # Words stand where words are values, never sentences.
    sections = ("run", "hardware", "last", "best", "throughput", "exported")
    assert all(not str(one).endswith(".") for name in sections for one in summary[name].values())


def test_the_end_says_how_long_it_took_what_was_best_and_what_to_do_next(command, tmp_path, caplog):
    out = tmp_path / "my out"
    assert main(command(out, "--samples.rows", "1")) == 0
    best = json.loads((out / "summary.json").read_text())["best"]
    told = [record.message for record in caplog.records if record.name == "qwen_lit.callbacks.report"]
    assert f"best         validation {best['val_loss']:.4f} at step {best['step']}" in told
    assert re.fullmatch(r"done in      \d:\d\d:\d\d", told[-5])
    assert told[-4].startswith("exported     step 10, the last")
    assert told[-3:] == [
        f"talk to it   qwen-lit chat '{out}'",
        f"curves       tensorboard --logdir '{out}/logs'",
        f"report       {out}/report.html",
    ]
    (question,) = {json.loads(line)["prompt"] for line in (out / "samples.jsonl").read_text("utf-8").splitlines()}
    asked = question.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0].split()
    assert any(line.startswith("sample 1 at step 5: " + asked[0]) for line in caplog.messages)


def test_attempts_from_one_step_keep_a_configuration_each(command, tmp_path):
    out, quick = tmp_path / "out", ["--export.merge", "false"]
    assert main(command(out, *quick, "--trainer.max_steps", "3")) == 0
    checkpoint = ["--ckpt_path", str(out / "checkpoints" / "step=00000003.ckpt")]
    for rate in ("0.003", "0.004"):
        options = ["--model.learning_rate", rate, "--trainer.max_steps", "4"]
        assert main(command(out, *quick, *options, *checkpoint)) == 0
    rates = {
        name: yaml.safe_load((out / f"{name}.yaml").read_text())["model"]["learning_rate"]
        for name in ("config-3", "config-3-2", "config")
    }
    assert rates == {"config-3": 0.0002, "config-3-2": 0.003, "config": 0.004}


def test_the_page_says_what_run_and_when_shows_turns_and_marks_the_best(run, model_folder):
    text = (run / "report.html").read_text(encoding="utf-8")
    summary = json.loads((run / "summary.json").read_text())
    day = summary["ended"][:10]
    assert f"<title>out: training report, {day}</title>" in text and f"<h1>out: {model_folder.name}</h1>" in text
    assert "&lt;|im_start|&gt;" not in text and '<dd class="asked">Say ' in text
    assert "class=best" in text and f"best, step {summary['best']['step']}" in text
    shares = summary["data"]["share_supervised"], summary["throughput"]["share_saving"]
    assert all(f"{share:.1%}" in text for share in shares)
