"""The output folder belongs to one run: another is refused or set aside, and nothing that was just written goes."""

import json
import os
import signal
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from qwen_lit.callbacks.checkpoint_io import step_of
from qwen_lit.cli import QwenCLI, main
from qwen_lit.errors import UserError
from qwen_lit.run import Run, training_config
from tests.runs import adapter, ended, forked, same, stopping, wait_for


def steps(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("step=*.ckpt"))


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def earlier(out: Path) -> list[Path]:
    return sorted(out.glob("earlier-*"))


@pytest.fixture(scope="module")
def done(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    assert main(command(out, "--samples.rows", "2")) == 0
    return out


def test_a_fresh_run_into_the_folder_of_another_is_refused_with_both_ways_on(command, done, tmp_path, capsys):
    before = content(done)
    assert main(command(done, "--model.learning_rate", "5e-3")) == 2
    said = capsys.readouterr().err
    assert f"{done} holds a run of 10 steps: add --ckpt_path last to go on with it, or give another" in said
    assert main(command(done, "--ckpt_path", str(tmp_path / "none.ckpt"))) == 2
    assert content(done) == before and not earlier(done)


@pytest.mark.parametrize("step", [9, 10])
def test_fewer_epochs_than_have_begun_are_refused(command, done, step, capsys):
    source, before = str(done / "checkpoints" / f"step={step:08d}.ckpt"), content(done / "checkpoints")
    assert main(command(done, "--ckpt_path", source, "--trainer.max_epochs", "1")) == 2
    assert "trainer.max_epochs is 1, but the checkpoint is at 2" in capsys.readouterr().err
    assert content(done / "checkpoints") == before


def test_a_checkpoint_of_another_folder_begins_in_a_fresh_one_and_is_refused_in_a_used_one(
    command, done, tmp_path, capsys
):
    new = tmp_path / "new"
    source = str(done / "checkpoints" / "step=00000009.ckpt")
    assert main(command(new, "--ckpt_path", source)) == 0
    assert steps(new) == ["step=00000010.ckpt"]
    left, right = adapter(done), adapter(new)
    assert all((left[name] == right[name]).all() for name in left)
    before = content(new)
    assert main(command(new, "--ckpt_path", source)) == 2
    assert "holds a run of 10 steps" in capsys.readouterr().err
    assert main(["export", *command(new)[1:], "--ckpt_path", source]) == 2
    assert "holds a run of 10 steps" in capsys.readouterr().err
    assert content(new) == before


def test_what_an_attempt_without_a_checkpoint_left_is_set_aside_whole(command, done, tmp_path, caplog):
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "logs").mkdir()
    for name in ("samples.jsonl", "logs/events.out.tfevents.1", "checkpoints/step=00000003.ckpt.tmp-9", "mine.txt"):
        (out / name).write_text('{"step": 99}\n')
    (out / "config.yaml").write_text("old: 1\n")
    assert main(command(out, "--ckpt_path", "last")) == 0
    (kept,) = earlier(out)
    assert set(content(kept)) == {
        "samples.jsonl",
        "logs/events.out.tfevents.1",
        "checkpoints/step=00000003.ckpt.tmp-9",
        "config.yaml",
    }
    assert (kept / "config.yaml").read_text() == "old: 1\n" and (out / "mine.txt").is_file()
    assert f"is set aside in {kept.name}" in caplog.text
    assert not (out / "samples.jsonl").exists()
    assert same(done, out)


def test_a_run_that_goes_back_sets_later_checkpoints_aside_and_keeps_what_it_writes(command, done, tmp_path, caplog):
    out, answering = tmp_path / "out", ["--samples.rows", "2"]
    assert main(command(out, *answering, "--checkpoint.keep", "20")) == 0
    best = step_of(out / "checkpoints" / "best.ckpt")
    source = str(out / "checkpoints" / "step=00000003.ckpt")
    assert main(command(out, *answering, "--ckpt_path", source, *stopping(4))) == 143
    (kept,) = earlier(out)
    assert {"step=00000006.ckpt", "step=00000009.ckpt", "step=00000010.ckpt"} <= {
        path.name for path in (kept / "checkpoints").iterdir()
    }
    assert (kept / "checkpoints" / "best.ckpt").is_file() == (best > 3)
    assert steps(out) == ["step=00000003.ckpt", "step=00000004.ckpt"]
    assert main(command(out, *answering, "--ckpt_path", "last")) == 0
    assert steps(out)[-2:] == ["step=00000009.ckpt", "step=00000010.ckpt"]
    left, right = adapter(done), adapter(out)
    assert all((left[name] == right[name]).all() for name in left)
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert len({(line["step"], line["prompt"]) for line in lines}) == len(lines)
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    seen = [one.step for one in events.Scalars("train/loss")]
    assert seen == sorted(set(seen)) and {1, 2, 3, 5, 9, 10} <= set(seen)


def test_best_is_a_checkpoint_wherever_last_is_one(command, done, tmp_path, capsys, caplog):
    best = step_of(done / "checkpoints" / "best.ckpt")
    for name in ("fit", "validate", "export", "predict"):
        source = ["--source", str(done / "samples.jsonl")] if name == "predict" else []
        assert main([name, *command(tmp_path / "none")[1:], "--ckpt_path", "best", *source]) == 2
        assert "there is no best.ckpt" in capsys.readouterr().err
    assert main(["validate", *command(done)[1:], "--ckpt_path", "best"]) == 0
    assert f"best.ckpt, step {best}" in caplog.text and "validate measures" in caplog.text


def test_fast_dev_run_writes_nothing(command, done, tmp_path):
    before = content(done)
    assert main(command(done, "--trainer.fast_dev_run", "true")) == 0
    after = {name: value for name, value in content(done).items() if name != "trace.jsonl"}
    assert after == {name: value for name, value in before.items() if name != "trace.jsonl"}


def test_a_foreign_final_model_is_refused_before_anything_is_trained(command, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "final_model").mkdir(parents=True)
    (out / "final_model" / "thesis.txt").write_text("mine")
    assert main(command(out, "--export.merge", "true")) == 2
    assert "final_model: not empty and not a model folder" in capsys.readouterr().err
    assert not (out / "logs").exists() and not (out / "checkpoints").exists()
    assert main(command(out, "--export.merge", "false", "--trainer.max_steps", "1")) == 0
    assert (out / "final_model" / "thesis.txt").read_text() == "mine"


def test_a_second_process_on_one_output_folder_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    pid = forked(command(out, "--trainer.max_epochs", "1000"))
    wait_for(out / "trace.jsonl")
    assert main(command(out)) == 2
    assert f"process {pid} already trains into" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    short = ["--trainer.max_epochs", "1000", "--trainer.max_time", "00:00:00:01"]
    assert main(command(out, "--ckpt_path", "last", *short)) == 0


def test_all_that_a_run_has_written_is_named_by_it(done):
    run = Run(done)
    folders = (run.checkpoints, run.adapter, run.logs)
    files = (run.best, run.step_checkpoint(10), run.samples, run.summary, run.report, run.config_file)
    assert all(path.is_dir() for path in folders) and all(path.is_file() for path in files)
    named = {path.name for path in (*folders, *files) if path.parent == done}
    assert {path.name for path in done.iterdir()} == {*named, ".lock", "trace.jsonl"}
    assert not run.merged.exists()
    assert run.yaml == "" and run.config == {} and run.checkpoint is None


def test_the_command_line_makes_one_run_and_gives_it_to_whoever_writes(command, done):
    cli = QwenCLI("validate", [*command(done)[1:], "--ckpt_path", "best"])
    run = cli.run
    assert run.given == tuple(command(done)[1:]) + ("--ckpt_path", "best")
    told = {"config": run.config, "yaml": run.yaml, "given": run.given, "started": run.started, "clock": run.clock}
    assert run == Run(done, done / "checkpoints" / "best.ckpt", **told)
    having = [one for one in (cli.model, *cli.trainer.callbacks) if isinstance(getattr(one, "run", None), Run)]
    assert len(having) >= 5 and all(one.run is run for one in having)
    # An adapter is used with what it was trained with.
    assert run.config == training_config(run.adapter)
    assert run.config["data"]["seed"] == run.config["seed_everything"] == 42


def test_the_configuration_of_a_run_is_the_same_in_its_file_in_its_results_and_as_it_is_parsed_again(done):
    run = Run(done)
    text = run.config_file.read_text("utf-8")
    again = QwenCLI("fit", ["--config", str(run.config_file), "--ckpt_path", str(run.step_checkpoint(10))])
    assert again.run.config == training_config(run.adapter) | {"ckpt_path": str(run.step_checkpoint(10))}
    assert again.run.yaml == text.replace("ckpt_path: null", f"ckpt_path: {run.step_checkpoint(10)}")
    assert json.loads(run.summary.read_text("utf-8"))["config"] == training_config(run.adapter)


def test_verify_resume_trains_by_the_configuration_of_fit_without_its_own_options(command, done, tmp_path):
    cli = QwenCLI("verify_resume", [*command(tmp_path)[1:], "--steps", "4"])
    assert "steps:" not in cli.run.yaml.replace("_steps:", "") and "ckpt_path" not in cli.run.yaml
    assert QwenCLI("fit", ["--config", str(write(tmp_path / "a.yaml", cli.run.yaml))]).run.output_dir == tmp_path


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_folder_is_locked_by_one_process_while_the_file_is_open(tmp_path):
    run = Run(tmp_path / "out")
    with run.lock() as file:
        # To open the file here once more, and close it, would give the lock up.
        pid = os.fork()
        if pid == 0:
            try:
                run.lock()
            except UserError as error:
                os._exit(7 if f"process {os.getppid()} already trains" in str(error) else 8)
            os._exit(9)
        assert ended(pid) == 7
        assert not file.closed
    run.lock().close()


def test_a_name_for_what_is_kept_is_always_a_free_one(tmp_path):
    run, names = Run(tmp_path), []
    for _ in range(3):
        path = run.config_until(4)
        names.append(path.name)
        path.write_text("")
    assert names == ["config-4.yaml", "config-4-2.yaml", "config-4-3.yaml"]
    assert {path.name for path in run.earlier_configs()} == set(names)
    assert len({run.earlier_folder() for _ in range(3)}) == 3


def test_validate_measures_a_checkpoint_that_init_adapter_names(command, done, capsys):
    asked = ["validate", *command(done)[1:]]
    assert main([*asked, "--ckpt_path", str(Run(done).best)]) == 0
    wanted = next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line)
    assert main([*asked, "--model.init_adapter", str(Run(done).best)]) == 0
    assert wanted in capsys.readouterr().out
