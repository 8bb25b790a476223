"""While fit trains every row is compared with the tokenizer's own; nothing is exported from one that is not."""

from pathlib import Path

import pytest

from qwen_lit.callbacks import proof
from qwen_lit.cli import main
from qwen_lit.data.datamodule import QwenDataModule
from qwen_lit.data.prepare import PROVED
from qwen_lit.data.prove import Prover
from tests.data.test_prove import Endless, running, spoil
from tests.runs import stopping
from tests.test_distributed import TWO, run


@pytest.fixture
def fit(command, tmp_path, monkeypatch) -> list[str]:
    """``fit`` that exports, on rows that are prepared and not yet proven."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = command(
        tmp_path / "out", "--export.merge", "true", "--export.verdict_rows", "2", "--samples.rows", "0"
    )
    main(["inspect", *arguments[1:]])
    for mark in (tmp_path / "cache").rglob(PROVED):
        mark.unlink()
    return arguments


@pytest.fixture
def started(monkeypatch) -> list[Prover]:
    """The processes that a run has started."""
    provers: list[Prover] = []

    class Kept(Prover):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            provers.append(self)

    monkeypatch.setattr(proof, "Prover", Kept)
    return provers


def marks(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache").rglob(PROVED)))


def exported(tmp_path: Path) -> bool:
    return any((tmp_path / "out" / name).exists() for name in ("final_model", "lora_adapter"))


def spoil_one(tmp_path: Path) -> None:
    (prepared,) = (tmp_path / "cache").rglob("rows.arrow")
    spoil(prepared.parent, lambda rows: rows[6]["input_ids"].__setitem__(-3, 5))


def test_a_row_that_differs_stops_the_training_with_the_row_and_the_difference(fit, tmp_path, capsys):
    spoil_one(tmp_path)
    assert main([*fit, "--trainer.max_epochs", "100000"]) == 2
    text = capsys.readouterr().err
    assert "error: " in text and "rows.jsonl:7: the prepared token ids differ" in text
    assert "\n    prepared, from " in text and "\n    apply_chat_template, from " in text and "Traceback" not in text
    assert not exported(tmp_path) and not marks(tmp_path)


def test_a_validation_row_that_differs_stops_the_run_before_the_export(fit, tmp_path, capsys, dataset):
    other = tmp_path / "others.jsonl"
    other.write_bytes(dataset.read_bytes())
    options = ["--data.val_size", "0", "--data.val_dataset_path", str(other)]
    main(["inspect", *fit[1:], *options])
    for prepared in (tmp_path / "cache").rglob("rows.arrow"):
        if "others.jsonl" in prepared.read_bytes().decode("latin-1"):
            spoil(prepared.parent, lambda rows: rows[0]["spans"].__setitem__(0, 3))
    assert main([*fit, *options]) == 2
    text = capsys.readouterr().err
    assert "others.jsonl:1: " in text and "the trained ranges [begin, end) of the tokens differ" in text
    assert not exported(tmp_path)


def test_inspect_shows_the_difference_too(fit, tmp_path, capsys):
    spoil_one(tmp_path)
    assert main(["inspect", *fit[1:]]) == 2
    assert "\n    apply_chat_template, from " in capsys.readouterr().err


def test_rows_are_proven_once_and_the_export_waits_for_it(fit, tmp_path, started, monkeypatch, caplog):
    seen = []

    def done(self):
        if not seen:
            return False
        assert not exported(tmp_path)
        return Prover.done(self)

    monkeypatch.setattr(proof.Prover, "done", done)
    monkeypatch.setattr(proof.Prover, "wait", lambda self, seconds: seen.append(1) or Prover.wait(self, seconds))
    assert main([*fit, "--trainer.max_steps", "2"]) == 0
    assert "waiting until every row is compared" in caplog.text and "every row's token ids are" in caplog.text
    assert len(started) == marks(tmp_path) == 1 and seen
    assert (tmp_path / "out" / "final_model" / "config.json").is_file()
    assert main([*fit, "--ckpt_path", "last"]) == 0
    assert len(started) == 1


def killing(times: int, started: list[Prover]) -> type[Prover]:
    """A process that is killed as soon as it is started, the first so many times."""

    class Killed(proof.Prover):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            if len(started) <= times:
                self.process.kill()

    return Killed


def test_a_process_that_is_killed_once_begins_again_at_the_end(fit, tmp_path, started, monkeypatch, caplog):
    monkeypatch.setattr(proof, "Prover", killing(1, started))
    assert main(fit) == 0
    assert "has ended with code -9 (out of memory?); it begins again when training is done" in caplog.text
    assert len(started) == 2 and marks(tmp_path) == 1 and exported(tmp_path)


def test_a_process_that_is_killed_twice_is_not_taken_as_proof(fit, tmp_path, started, monkeypatch, capsys):
    monkeypatch.setattr(proof, "Prover", killing(2, started))
    assert main(fit) == 1
    text = capsys.readouterr().err
    assert "error: the process that compares every row has ended with code -9" in text and "--ckpt_path last" in text
    assert len(started) == 2 and not marks(tmp_path) and not exported(tmp_path)
    assert main([*fit, "--ckpt_path", "last"]) == 0
    assert marks(tmp_path) == 1 and exported(tmp_path)


def test_a_run_that_is_stopped_stops_it_at_once(fit, started, monkeypatch):
    monkeypatch.setattr(QwenDataModule, "unproven", lambda self: {Endless(): None})
    assert main([*fit, *stopping(2)]) == 143
    assert len(started) == 1 and not running(started[0].process.pid)


def test_a_trial_of_one_batch_proves_nothing(fit, tmp_path, started):
    assert main([*fit, "--trainer.fast_dev_run", "true"]) == 0
    assert not started and not marks(tmp_path)


@pytest.mark.parametrize("prepared", ["good", "spoiled"])
def test_two_ranks_are_proven_once_and_stop_together(fit, tmp_path, prepared):
    if prepared == "spoiled":
        spoil_one(tmp_path)
    code, text = run([*fit, *TWO])
    if prepared == "good":
        assert code == 0, text
        assert text.count("every row's token ids are the chat template's own") == marks(tmp_path) == 1
        assert exported(tmp_path)
    else:
        assert code == 2, text
        assert text.count("rows.jsonl:7: the prepared token ids differ") == 2 and "Traceback" not in text
        assert not exported(tmp_path)
