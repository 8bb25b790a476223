"""What trackers get beside numbers, and that none of them ends a run."""

import json
from types import SimpleNamespace

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, SESSION_END_INFO_TAG, SESSION_START_INFO_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from qwen_lit.callbacks.facts import flat
from qwen_lit.callbacks.trackers import guard, log_samples, log_verdict
from qwen_lit.cli import main
from tests.runs import stopping

QUICK = ["--trainer.max_steps", "2", "--export.merge", "false"]


class Failing(CSVLogger):
    """A tracker whose server goes away."""

    def log_metrics(self, *given, **named):
        raise ConnectionError("the server\nis away")

    log_hyperparams = finalize = save = log_metrics


class Unready(CSVLogger):
    """A tracker that wants a login."""

    @property
    def experiment(self):
        raise RuntimeError("no key; log in first")


def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(command, tmp_path, caplog):
    logger = ["--trainer.logger=tests.test_trackers.Failing", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    assert main(command(tmp_path / "out", *QUICK, *logger)) == 0
    told = [message for message in caplog.messages if "Failing" in message]
    assert told == ["Failing has failed (the server is away); training goes on"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["steps"] == 2


def test_a_tracker_that_cannot_begin_is_refused_before_the_model_is_loaded(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *_: pytest.fail("the model was loaded"))
    logger = ["--trainer.logger=tests.test_trackers.Unready", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    assert main(command(tmp_path / "out", *QUICK, *logger)) == 2
    told = "error: trainer.logger: Unready cannot begin (no key; log in first); set it up, or leave it out.\n"
    assert capsys.readouterr().err == told


def test_a_guarded_logger_is_still_of_its_kind_and_does_its_work(tmp_path):
    logger = CSVLogger(tmp_path)
    guard(logger)
    logger.log_metrics({"loss": 1.5}, 3)
    logger.save()
    assert isinstance(logger, CSVLogger) and type(logger).__name__ == "CSVLogger"
    assert "1.5" in (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text()


def test_a_logger_gets_the_configuration_as_numbers_and_words(command, tmp_path):
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path / 'log'}"]
    assert main(command(tmp_path / "out", *QUICK, *logger, "--model.learning_rate", "3e-5")) == 0
    (file,) = (tmp_path / "log").rglob("hparams.yaml")
    found = yaml.safe_load(file.read_text())
    assert found["model.learning_rate"] == 3e-5 and found["model.lora_config.r"] == 4
    assert found["run.rows"] == 53 and found["data.packing"] is True and found["model.optimizer"] == "paged_adamw_8bit"
    assert found["run.target_modules"] == "k_proj, o_proj, q_proj, v_proj"


def test_nested_values_are_flat_and_what_is_not_set_is_left_out():
    given = {"a": {"b": 1e-5, "c": None, "d": {"e": [1, "x"], "f": False}}, "g": "", "h": {}}
    assert flat(given) == {"a.b": 1e-5, "a.d.e": "1, x", "a.d.f": False, "g": ""}


def plugin(folder) -> dict[str, HParamsPluginData]:
    events = EventAccumulator(str(folder))
    events.Reload()
    found = events.PluginTagToContent("hparams").items()
    return {tag: HParamsPluginData.FromString(content) for tag, content in found}


def test_tensorboard_compares_runs_by_what_they_were_trained_with_and_a_resume_adds_none(command, tmp_path):
    out, other = tmp_path / "out", ["--model.learning_rate", "3e-5"]
    assert main(command(out, *other, *stopping(4))) == 143
    assert SESSION_END_INFO_TAG not in plugin(out / "logs")
    assert main(command(out, *other, "--ckpt_path", "last")) == 0
    found = plugin(out / "logs")
    assert set(found) == {EXPERIMENT_TAG, SESSION_START_INFO_TAG, SESSION_END_INFO_TAG}
    values = found[SESSION_START_INFO_TAG].session_start_info.hparams
    assert values["learning_rate"].number_value == 3e-5 and values["r"].number_value == 4
    assert values["packing"].string_value == "true" and values["optimizer"].string_value == "paged_adamw_8bit"
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    tags = events.Tags()["scalars"]
    measured = [one.name.tag for one in found[EXPERIMENT_TAG].experiment.metric_infos]
    assert measured and set(measured) <= set(tags)
    assert {tag.split("/")[0] for tag in tags} == {"train", "val"}
    assert [event.step for event in events.Scalars("val/best_loss")] in ([5], [10])
    assert yaml.safe_load((out / "logs" / "hparams.yaml").read_text())["model.learning_rate"] == 3e-5


LINES = [
    {"step": step, "prompt": prompt, "answer": "a", "stopped": True, "wanted": None}
    for step in (0, 5)
    for prompt in ("p", "q")
]
VERDICT = {
    "adapter_loss": 1.5,
    "tokens": 9,
    "rows": 2,
    "best": "original",
    "merges": {"original": {"loss": 1.25, "kl": 0.5, "same_top": 0.75}},
}


class Calls:
    """Writes down what is called of it."""

    def __init__(self, *names: str, **values: object) -> None:
        self.calls: list[tuple] = []
        for name in names:
            setattr(self, name, lambda *given, name=name, **named: self.calls.append((name, given, named)))
        vars(self).update(values)


def test_answers_and_verdict_are_a_table_where_there_are_tables():
    wandb = Calls("log_table", "log_text", "log_metrics", "save")
    log_samples([wandb], LINES, 2)
    log_verdict([wandb], VERDICT, 6)
    (_, key, table), metrics, (_, other, verdict), _ = wandb.calls
    assert key == ("samples",) and table["step"] == 4 and len(table["data"]) == 4
    assert table["data"][3] == [5, "q", "a", True, None] and table["columns"][:2] == ["step", "question"]
    assert metrics[1] == (
        {
            "verdict/adapter_loss": 1.5,
            "verdict/original_loss": 1.25,
            "verdict/original_kl": 0.5,
            "verdict/original_same_top": 0.75,
        },
        5,
    )
    assert other == ("verdict",) and verdict["data"][1] == ["merge, original", 1.25, 0.5, 0.75]


def test_answers_and_verdict_are_files_where_there_are_files():
    client = Calls("log_text")
    mlflow = Calls("log_metrics", "save", experiment=client, run_id="7")
    log_samples([mlflow], LINES, 2)
    log_verdict([mlflow], VERDICT, 6)
    (_, samples, _), (_, verdict, _) = client.calls
    assert samples[0] == "7" and samples[2] == "samples.jsonl"
    assert [json.loads(line) for line in samples[1].splitlines()] == LINES
    assert verdict[2] == "verdict.json" and json.loads(verdict[1]) == VERDICT


def test_answers_are_texts_elsewhere_and_a_logger_of_numbers_alone_is_left_alone():
    swanlab = Calls("log_text")
    log_samples([swanlab, SimpleNamespace()], LINES, 2)
    assert [(given[0], named["step"]) for _, given, named in swanlab.calls] == [("sample/1", 4), ("sample/2", 4)]
    assert swanlab.calls[1][1][1] == ["**q**\n\na"]
