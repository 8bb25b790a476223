"""Lightning's own callbacks and loggers from the YAML: each works, or is refused by name before anything is loaded."""

import csv
import importlib.util
import json
import warnings
from pathlib import Path

import lightning.pytorch.callbacks as shipped
import pytest
import torch
from safetensors.torch import load_file

from qwen_lit.callbacks import accepted
from qwen_lit.callbacks.checkpoint_io import step_files
from qwen_lit.cli import main
from tests.runs import adapter, doing, same, scalars, trace


def callback(name: str, **options: object) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{key}={value}" for key, value in options.items())]


@pytest.fixture
def unloaded(monkeypatch):
    """No test that asks for this loads a model."""
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *_: pytest.fail("the model was loaded"))


NEEDED = {
    "StochasticWeightAveraging": {"swa_lrs": 0.1},
    "GradientAccumulationScheduler": {"scheduling": "{0: 2}"},
    "ModelPruning": {"pruning_fn": "l1_unstructured"},
    "OnExceptionCheckpoint": {"dirpath": "x"},
}


@pytest.mark.parametrize("name", [*accepted.REFUSED, "EMAWeightAveraging"])
def test_what_cannot_work_is_refused_by_name_with_the_remedy(arguments, name, capsys, unloaded):
    assert main([*arguments, *callback(name, **NEEDED.get(name, {}))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: trainer.callbacks: {name} does not work here: ") and error.count("\n") == 1


WORKING = ["DeviceStatsMonitor", "LambdaCallback", "LearningRateMonitor", "ModelSummary", "RichModelSummary", "Timer"]


def test_every_callback_that_lightning_ships_is_accounted_for():
    bases = {"Callback", "Checkpoint", "ProgressBar"}
    tried = {"EarlyStopping", "ModelCheckpoint", "RichProgressBar", "TQDMProgressBar", "ThroughputMonitor"}
    assert set(shipped.__all__) == {*accepted.REFUSED, "EMAWeightAveraging", *WORKING, *tried, *bases}


def test_the_others_work_together(command, tmp_path):
    out = tmp_path / "out"
    several = [option for name in WORKING for option in callback(name)]
    several += callback("ThroughputMonitor", batch_size_fn="tests.test_callbacks.documents")
    several += callback("RichProgressBar")
    options = ["--trainer.enable_progress_bar", "true", "--trainer.profiler", "simple"]
    assert main(command(out, *several, *options, "--trainer.max_steps", "2")) == 0
    assert len(trace(out)) == 2 and (out / "report.html").is_file()


def documents(step) -> int:
    return sum(len(one["cu_seqlens"]) - 1 for one in step)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (callback("EarlyStopping", monitor="val_loss"), "EarlyStopping monitors val_loss, which is never logged"),
        (callback("EarlyStopping", monitor="val/loss"), "but no rows are held out; set data.val_size"),
        (callback("ModelCheckpoint", monitor="val/loss"), "ModelCheckpoint monitors val/loss, but no rows"),
        (
            [
                *callback("EarlyStopping", monitor="val/loss"),
                "--data.val_size",
                "5",
                "--trainer.check_val_every_n_epoch",
                "3",
            ],
            "nothing is validated",
        ),
        (
            [
                *callback("EarlyStopping", monitor="val/loss"),
                "--data.val_size",
                "5",
                "--trainer.limit_val_batches",
                "0",
            ],
            "trainer.limit_val_batches is 0",
        ),
        (callback("ModelCheckpoint", save_on_exception="true"), "in the middle of an optimizer step"),
        (callback("RichProgressBar"), "RichProgressBar and trainer.enable_progress_bar: false"),
        ([*callback("LearningRateMonitor"), "--trainer.logger", "false"], "LearningRateMonitor needs a logger"),
        (["--trainer.enable_checkpointing", "false"], "raise checkpoint.every_n_train_steps"),
        (["--trainer.barebones", "true"], "trainer.barebones"),
        (["--trainer.use_distributed_sampler", "true"], "must be false"),
        (["--trainer.strategy", "fsdp"], "trainer.strategy is fsdp"),
        (["--trainer.plugins", "AsyncCheckpointIO"], "AsyncCheckpointIO would take the place"),
        (["--trainer.gradient_clip_algorithm", "most"], "gradient_clip_algorithm"),
    ],
)
def test_what_would_die_or_deceive_later_is_told_before_the_model_is_loaded(
    arguments, options, words, capsys, unloaded
):
    assert main([*arguments, *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_a_monitor_of_rows_that_a_share_of_few_does_not_hold_out_is_refused(arguments, tmp_path, capsys, unloaded):
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"instruction": f"{n}", "output": "a"}) + "\n" for n in range(5)))
    few = ["--data.dataset_path", str(path), "--data.val_size", "0.000001"]
    assert main([*arguments, *callback("EarlyStopping", monitor="val/loss"), *few]) == 2
    assert "EarlyStopping monitors val/loss, but data.val_size holds out no row" in capsys.readouterr().err


PACKAGES = [
    ("logger", "WandbLogger", "wandb"),
    ("logger", "MLFlowLogger", "mlflow"),
    ("logger", "CometLogger", "comet-ml"),
    ("callbacks", "RichModelSummary", "rich"),
]


@pytest.mark.parametrize(("key", "name", "package"), PACKAGES)
def test_a_package_that_is_absent_is_named_with_the_command_that_brings_it(
    arguments, key, name, package, capsys, monkeypatch, unloaded
):
    monkeypatch.setattr(accepted, "find_spec", lambda name: None)
    given = callback(name) if key == "callbacks" else [f"--trainer.logger=lightning.pytorch.loggers.{name}"]
    assert main([*arguments, *given]) == 2
    told = f"error: trainer.{key}: {name} needs the package {package}; pip install {package}\n"
    assert capsys.readouterr().err == told


def test_a_user_s_own_callback_may_log_what_early_stopping_monitors(arguments, tmp_path):
    own = callback("tests.test_callbacks.LogsItsOwn")
    options = callback("EarlyStopping", monitor="own", patience=1)
    assert main([*arguments, *own, *options, "--trainer.max_epochs", "5", "--export.merge", "false"]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 6


class LogsItsOwn(shipped.Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("own", 1.0)


def test_a_model_checkpoint_links_removes_and_is_gone_on_from_and_exported(command, whole, tmp_path):
    out = tmp_path / "out"
    mine = callback(
        "ModelCheckpoint", monitor="val/loss", mode="max", save_top_k=1, save_last="link", filename="at-{step}"
    )
    assert main(command(out, *mine, "--trainer.max_epochs", "1")) == 0
    folder = out / "model_checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["at-step=5.ckpt", "at-step=5.json", "last.ckpt"]
    assert (folder / "last.ckpt").resolve() == (folder / "at-step=5.ckpt").resolve()
    assert json.loads((folder / "at-step=5.json").read_text())["step"] == 5

    for path in (out / "trace.jsonl", folder / "at-step=5.json"):
        path.rename(path.with_suffix(".kept"))
    assert main(command(out, "--ckpt_path", str(folder / "last.ckpt"))) == 0
    assert [line["rows"] for line in trace(out)] == [line["rows"] for line in trace(whole)][5:]

    exported = tmp_path / "exported"
    assert main(["export", *command(exported)[1:], "--ckpt_path", str(folder / "at-step=5.ckpt")]) == 0
    state = torch.load(folder / "at-step=5.ckpt", weights_only=True)["state_dict"]
    written = load_file(exported / "lora_adapter" / "adapter_model.safetensors")
    kept = {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in state.items()}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in written.items())


def test_a_model_checkpoint_beside_the_run_s_own_changes_nothing_and_keeps_its_files(command, whole, tmp_path):
    beside = tmp_path / "beside"
    mine = callback("ModelCheckpoint", every_n_train_steps=2, save_top_k=-1, filename="{step}", save_last="true")
    assert main(command(beside, *mine)) == 0
    assert same(whole, beside)
    names = sorted(path.name for path in (beside / "model_checkpoints").glob("*.ckpt"))
    assert names == ["last.ckpt", *(f"step={n}.ckpt" for n in (10, 2, 4, 6, 8))]


def test_a_model_checkpoint_by_the_clock_is_gone_on_from_as_if_nothing_had_been(command, tmp_path):
    out = tmp_path / "out"
    mine = callback("ModelCheckpoint", train_time_interval="0:00:00.000001", save_top_k="-1", filename="{step}")
    assert main(command(out, *mine)) == 0
    expected, kept = trace(out), adapter(out)
    (out / "trace.jsonl").unlink()
    assert main(command(out, "--ckpt_path", str(out / "model_checkpoints" / "step=3.ckpt"))) == 0
    assert trace(out) == expected[3:]
    assert all(torch.equal(weight, kept[name]) for name, weight in adapter(out).items())


def test_a_model_checkpoint_saves_the_steps_it_is_asked_for_and_warns_of_nothing(command, tmp_path):
    mine = callback("ModelCheckpoint", every_n_train_steps=5, monitor="val/loss", save_top_k="-1", filename="{step}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Using ModelCheckpoint with manual optimization")
        assert main(command(tmp_path / "out", *mine, "--trainer.val_check_interval", "5")) == 0
    # Each waits for the validation after its step, by which it is compared.
    for step in (5, 10):
        loss = scalars(tmp_path / "out")["val/loss"][step // 5 - 1]
        file = tmp_path / "out" / "model_checkpoints" / f"step={step}.ckpt"
        (state,) = [v for k, v in torch.load(file, weights_only=True)["callbacks"].items() if "ModelCheckpoint" in k]
        assert float(state["current_score"]) == pytest.approx(loss)


def test_a_monitor_of_the_learning_rate_logs_that_of_every_step(command, tmp_path):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    monitor = callback("LearningRateMonitor", logging_interval="step")
    assert main(command(tmp_path / "out", *logger, *monitor, "--trainer.max_steps", "4")) == 0
    with next((tmp_path / "log").rglob("metrics.csv")).open() as file:
        lines = list(csv.DictReader(file))
    rates = [{int(one["step"]): float(one[name]) for one in lines if one[name]} for name in ("lr", "train/lr")]
    assert len(rates[0]) == 4 and rates[0] == pytest.approx(rates[1])


def test_a_timer_ends_a_run_after_a_whole_step(command, tmp_path):
    timer = callback("Timer", duration="00:01:00:00", interval="step")
    assert main(command(tmp_path / "out", *timer, *doing(2, "use_up_the_time"))) == 0
    assert len(trace(tmp_path / "out")) == 2


UNVALIDATED = ["--data.val_size", "0", "--data.num_workers", "0", "--checkpoint.every_n_train_steps", "100"]


def test_a_run_that_is_ended_within_an_epoch_without_validation_goes_on_at_its_next_row(command, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    timer = callback("Timer", duration="00:01:00:00", interval="step")
    assert main(command(whole, *UNVALIDATED)) == 0
    assert main(command(out, *UNVALIDATED, *timer, *doing(2, "use_up_the_time"))) == 0
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000002.ckpt"]
    assert main(command(out, *UNVALIDATED, "--ckpt_path", "last")) == 0
    assert same(whole, out)


def test_a_run_that_may_not_end_yet_is_saved_when_it_does_and_not_before(command, tmp_path):
    out, timer = tmp_path / "out", callback("Timer", duration="00:01:00:00", interval="step")
    least = ["--trainer.min_epochs", "1", *UNVALIDATED]
    assert main(command(out, *least, *timer, *doing(2, "use_up_the_time"))) == 0
    # An epoch has six steps.
    assert len(trace(out)) == 6
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000006.ckpt"]


def test_a_run_that_early_stopping_has_ended_stays_ended_until_its_patience_is_raised(command, tmp_path, caplog):
    out = tmp_path / "out"

    def patient(patience: int) -> list[str]:
        monitor = callback("EarlyStopping", monitor="val/loss", min_delta=100, patience=patience)
        return command(out, "--trainer.max_epochs", "9", "--trainer.profiler", "simple", *monitor)

    assert main(patient(1)) == 0
    assert len(trace(out)) == json.loads((out / "summary.json").read_text())["steps"] == 10
    kept = adapter(out)
    assert main([*patient(1), "--ckpt_path", "last"]) == 0
    assert len(trace(out)) == 10 and all(torch.equal(one, kept[name]) for name, one in adapter(out).items())
    assert "early stopping by val/loss has ended this run already" in caplog.text
    assert "nothing was trained" in caplog.text
    assert main([*patient(2), "--ckpt_path", "last"]) == 0
    assert len(trace(out)) == 15


LOGGERS = {"CSVLogger": None, "TensorBoardLogger": None, "WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
INSTALLED = [name for name, package in LOGGERS.items() if package is None or importlib.util.find_spec(package)]


@pytest.mark.parametrize("name", INSTALLED)
def test_a_logger_gets_the_last_step_wherever_the_interval_falls(command, tmp_path, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = [f"--trainer.logger=lightning.pytorch.loggers.{name}", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    options = ["--trainer.max_steps", "2", "--trainer.log_every_n_steps", "10"]
    assert main(command(tmp_path / "out", *logger, *options)) == 0
    if name == "CSVLogger":
        text = next(Path(tmp_path / "log").rglob("metrics.csv")).read_text().splitlines()
        last = dict(zip(text[0].split(","), text[-1].split(","), strict=True))
        assert float(last["train/loss"]) == pytest.approx(trace(tmp_path / "out")[-1]["loss"])


def test_a_file_of_weights_alone_is_no_run_to_go_on_with(command, tmp_path, capsys):
    out = tmp_path / "out"
    mine = callback("ModelCheckpoint", save_weights_only="true", filename="weights")
    quick = ["--trainer.max_epochs", "1"]
    assert main(command(out, *quick, *mine)) == 0
    path = str(out / "model_checkpoints" / "weights.ckpt")
    assert main(command(out, *quick, "--ckpt_path", path)) == 2
    assert "was saved with save_weights_only" in capsys.readouterr().err
