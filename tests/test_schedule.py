"""How long a run is: its steps are counted before it begins, its rate never stands at 0, and it has an end."""

import json
import math
import re

import pytest
import torch

from qwen_lit.cli import main
from qwen_lit.model.schedules import schedule
from tests.runs import WORKERS, begun, same, trace


def lines(caplog) -> str:
    return "\n".join(record.message for record in caplog.records)


def rates(out) -> list[float]:
    return [point[1] for point in json.loads((out / "summary.json").read_text())["history"]["lr"]]


def cosine(total: int, warmup: int, peak: float = 2e-4) -> list[float]:
    """The schedule in its own words."""
    rising = [peak * n / warmup for n in range(warmup)]
    return rising + [peak * (1 + math.cos(math.pi * n / (total - warmup))) / 2 for n in range(total - warmup)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--trainer.max_epochs", "-1"], "set trainer.max_steps"),
        (["--trainer.max_epochs", "null", "--trainer.max_time", "00:00:00:09"], "model.lr_scheduler: constant"),
        (["--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:09"], "trainer.max_time is 00:00:00:09"),
        (["--trainer.max_steps", "0"], "trainer.max_steps is 0"),
        (["--trainer.max_epochs", "0"], "trainer.max_epochs is 0"),
        (["--trainer.limit_train_batches", "0"], "trainer.limit_train_batches is 0"),
        (["--trainer.limit_train_batches", "0.0"], "trainer.limit_train_batches is 0"),
        (["--trainer.limit_train_batches", "0.1"], "0.1 of 3 optimizer steps, which is none"),
        (["--trainer.val_check_interval", "0"], "trainer.val_check_interval is 0, but it counts the optimizer steps"),
        (["--trainer.val_check_interval", "10"], "an epoch has 3 optimizer steps"),
        (["--trainer.min_steps", "7"], "trainer.min_steps is 7, but the run has 6 optimizer steps"),
        (["--trainer.min_epochs", "3"], "trainer.min_epochs is 3, above trainer.max_epochs 2"),
        (["--trainer.accumulate_grad_batches", "0"], "it must be at least 1"),
        (
            ["--trainer.limit_val_batches", "0.4", "--data.val_size", "5"],
            "trainer.limit_val_batches is 0.4 of 1 validation batch, each of up to 3 micro-batches, which is none",
        ),
        (
            ["--trainer.overfit_batches", "0.4", "--data.val_size", "5"],
            "trainer.overfit_batches is 0.4 of 1 validation batch",
        ),
    ],
)
def test_a_run_that_could_not_end_or_would_train_nothing_is_refused_before_the_model_is_loaded(
    arguments, options, words, capsys, monkeypatch
):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *_: pytest.fail("the model was loaded"))
    assert main([*arguments, *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "steps", "told"),
    [
        (["--trainer.max_epochs", "null"], 9, "9 optimizer steps, 3 epochs of 3"),
        (["--trainer.max_epochs", "null", "--trainer.max_steps", "4"], 4, "4 optimizer steps, 1.33 epochs of 3"),
        (["--trainer.max_epochs", "-1", "--trainer.max_steps", "2"], 2, "2 optimizer steps, 0.667 epochs of 3"),
        (["--trainer.max_steps", "3"], 3, "3 optimizer steps, 1 epoch of 3"),
        (["--trainer.limit_train_batches", "1"], 2, "2 optimizer steps, 2 epochs of 1"),
        (["--trainer.limit_train_batches", "1.0"], 6, "6 optimizer steps, 2 epochs of 3"),
        (["--trainer.limit_train_batches", "0.67"], 4, "4 optimizer steps, 2 epochs of 2"),
        (["--trainer.overfit_batches", "2"], 4, "4 optimizer steps, 2 epochs of 2"),
        (["--trainer.accumulate_grad_batches", "2"], 10, "10 optimizer steps, 2 epochs of 5"),
        (["--trainer.reload_dataloaders_every_n_epochs", "1"], 6, "6 optimizer steps, 2 epochs of 3"),
    ],
)
def test_the_steps_that_are_told_are_those_that_are_made_and_the_rate_falls_over_all_of_them(
    arguments, options, steps, told, tmp_path, caplog
):
    assert main([*arguments, *options, "--export.merge", "false"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == summary["run"]["steps"] == steps and begun(tmp_path / "out")["run"].startswith(told)
    warmup = max(1, math.ceil(0.03 * steps))
    assert rates(tmp_path / "out") == pytest.approx(cosine(steps, warmup), rel=1e-6)
    assert min(rates(tmp_path / "out")[1:]) > 0
    assert "nothing was trained" not in caplog.text


def test_overfitting_sees_the_same_batches_in_every_epoch(command, tmp_path):
    out = tmp_path / "out"
    assert main(command(out, "--trainer.overfit_batches", "1", "--trainer.max_epochs", "3")) == 0
    rows = [line["rows"] for line in trace(out)]
    assert len(rows) == 3 and rows[0] == rows[1] == rows[2]


def test_a_run_in_slots_of_time_is_the_run_that_was_left_alone(command, whole, tmp_path, caplog):
    slots, made, many = tmp_path / "slots", 0, []
    while made < 10:
        stop = [
            "--trainer.callbacks+=tests.runs.Do",
            f"--trainer.callbacks.step={made + 3}",
            "--trainer.callbacks.name=use_up_the_time",
        ]
        options = ["--trainer.max_time", "01:00:00:00", "--ckpt_path", "last", *stop]
        assert main(command(slots, *WORKERS, *options)) == 0
        many.append(len(trace(slots)) - made)
        made = len(trace(slots))
    assert many == [3, 3, 3, 1]
    assert same(whole, slots) and rates(slots) == rates(whole)
    run = begun(slots)["run"]
    assert run.startswith("10 optimizer steps, 2 epochs of 5, at most 1 day, 0:00:00 (the schedule is that of all")
    caplog.clear()
    assert main(command(slots, "--ckpt_path", "last")) == 0
    assert "nothing was trained: step 10 is made, and trainer.max_epochs is 2; raise it to go on" in lines(caplog)


def test_without_a_known_end_the_rate_is_constant_and_no_time_is_guessed(command, tmp_path, caplog):
    out = tmp_path / "out"
    endless = [
        "--trainer.max_epochs",
        "null",
        "--trainer.max_time",
        "01:00:00:00",
        "--model.lr_scheduler",
        "constant_with_warmup",
        "--model.warmup_ratio",
        "0.4",
        "--trainer.enable_progress_bar",
        "true",
        "--trainer.callbacks+=tests.runs.Do",
        "--trainer.callbacks.step=7",
        "--trainer.callbacks.name=use_up_the_time",
    ]
    assert main(command(out, *endless)) == 0
    assert len(trace(out)) == 7 and rates(out) == pytest.approx([0, 1e-4] + [2e-4] * 5)
    assert "no known end, at most 1 day, 0:00:00" in begun(out)["run"]
    assert "-1 day" not in caplog.text and " left" not in caplog.text


@pytest.mark.parametrize(
    ("first", "then", "steps"),
    [
        (["--trainer.max_steps", "4"], ["--trainer.max_steps", "9"], 9),
        (["--trainer.max_epochs", "1"], ["--trainer.max_epochs", "3"], 15),
        (["--trainer.max_steps", "4"], ["--trainer.max_epochs", "1"], 5),
    ],
)
def test_a_limit_that_is_changed_on_resume_gives_the_rest_a_rate_and_is_told(
    command, tmp_path, caplog, first, then, steps
):
    out = tmp_path / "out"
    assert main(command(out, *first)) == 0
    done = len(trace(out))
    assert main(command(out, *then, "--ckpt_path", "last")) == 0
    assert len(trace(out)) == steps
    assert f"the run had {done} optimizer steps until here, and has {steps} from here on" in caplog.text
    assert rates(out)[done:] == pytest.approx(cosine(steps, 1)[done:], rel=1e-6)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (2, 1), (16, 1), (17, 1), (40, 2), (100, 3), (200, 6)])
def test_a_share_of_warmup_is_rounded_up_and_never_the_whole_run(total, warmup):
    from types import SimpleNamespace

    from qwen_lit.model.duration import warmup_steps

    progress = SimpleNamespace(current=SimpleNamespace(ready=0, processed=0))
    loop = SimpleNamespace(epoch_progress=progress, epoch_loop=SimpleNamespace(batch_progress=progress))
    trainer = SimpleNamespace(
        max_epochs=1,
        max_steps=-1,
        micro_batches_per_step=1,
        limit_train_batches=1.0,
        world_size=1,
        global_step=0,
        fit_loop=loop,
    )
    data = SimpleNamespace(micro_batches=lambda ranks: total)
    assert warmup_steps(0.03, trainer, data) == warmup
    assert warmup_steps(0.0, trainer, data) == 0
    factors = [schedule("cosine", warmup, total)(step) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors[1:]) and factors[0] == (0 if warmup else 1)


def test_every_shown_step_tells_how_much_is_left_and_a_resume_tells_none_twice(command, tmp_path, caplog):
    out, bar = tmp_path / "out", ["--trainer.enable_progress_bar", "true"]
    assert main(command(out, *bar, "--trainer.max_steps", "5")) == 0
    assert main(command(out, *bar, "--trainer.log_every_n_steps", "4", "--ckpt_path", "last")) == 0
    shown = [record.message for record in caplog.records if re.match(r"step \d", record.message)]
    whole = re.compile(r"step (\d+) of (\d+)  loss \d\.\d+  .* left")
    told = [match.groups() for line in shown if (match := whole.fullmatch(line))]
    assert len(shown) == len(told)
    assert told == [(str(n), "5") for n in range(1, 6)] + [("8", "10"), ("10", "10")]


def test_a_skipped_step_shows_no_loss_of_another(command, tmp_path, caplog):
    out = tmp_path / "out"
    poison = ["--trainer.callbacks+=tests.runs.Poison", "--trainer.callbacks.steps=[2]"]
    bar = ["--trainer.enable_progress_bar", "true", "--trainer.max_steps", "3"]
    assert main(command(out, *bar, *poison)) == 0
    assert "step 2 of 3  loss none, skipped" in caplog.text
    history = json.loads((out / "summary.json").read_text())["history"]
    assert [point[0] for point in history["loss"]] == [1, 3]
    assert torch.tensor(history["loss"]).isfinite().all()
