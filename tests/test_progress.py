"""What takes long says how far it is, and what is short says nothing."""

import logging

import pytest

from qwen_lit import progress
from qwen_lit.cli import main
from qwen_lit.progress import Progress, through


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where a test lets them."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_after_two_seconds_and_then_every_ten(clock, caplog):
    caplog.set_level(logging.INFO)
    with Progress("preparing rows", 100e6, "B") as shown:
        for _ in range(25):
            clock[0] += 1
            shown.advance(2e6, rows=100)
    assert [record.message for record in caplog.records] == [
        "preparing rows: 4%, 4.0 MB of 100.0 MB, 200 rows (100/s), 0:00:48 left",
        "preparing rows: 24%, 24.0 MB of 100.0 MB, 1,200 rows (100/s), 0:00:38 left",
        "preparing rows: 44%, 44.0 MB of 100.0 MB, 2,200 rows (100/s), 0:00:28 left",
    ]


def test_what_is_short_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    for _ in through(range(1000), "short", "steps"):
        clock[0] += 0.001
    assert not caplog.records


def test_a_preparation_ends_at_the_whole_of_its_files(model_folder, dataset, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.0)
    caplog.set_level(logging.INFO)
    inspect = [
        "inspect",
        "--config",
        "configs/qwen7b.yaml",
        "--model.model_name_or_path",
        str(model_folder),
        "--data.dataset_path",
        str(dataset),
        "--data.cache_dir",
        str(tmp_path),
        "--trainer.accelerator",
        "cpu",
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main(inspect) == 0
    assert any(line.startswith("preparing rows: 100%, 25 rows") for line in caplog.messages)
    assert any(line.startswith("reading rows.jsonl: 100%") for line in caplog.messages)
