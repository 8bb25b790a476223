"""A folder of its own for each conversion."""

from pathlib import Path

import pytest

from tests.convert import examples


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """The working directory, with every example and the register of datasets in it."""
    monkeypatch.chdir(tmp_path)
    for name, (text, _) in examples.EVERY.items():
        Path(name).write_text(text, encoding="utf-8")
    Path("data").mkdir()
    Path("data/dataset_info.json").write_text(examples.REGISTER, encoding="utf-8")
