"""The migration tables of the documentation name keys that each trainer, and ``fit``, really has."""

import re
from pathlib import Path

import pytest
import yaml

from qwen_lit.cli import main
from qwen_lit.convert.draft import Draft
from qwen_lit.convert.kinds import PEERS, SHARED

PAGES = sorted(Path("docs").glob("migration*.md"))


def rows(page: Path) -> list[list[list[str]]]:
    """Of each row under a head of the five trainers, the keys of each cell."""
    found, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        inside = "LLaMA-Factory" in cells or (inside and bool(cells))
        if inside and "LLaMA-Factory" not in cells and not line.startswith("|--"):
            found.append([re.findall(r"`([^`]+)`", cell) for cell in cells])
    return found


def reads(peer, key: str) -> bool:
    """Whether a peer's own conversion takes a key up."""
    for value in (True, 1, "x", ["x"], {"a": 1}):
        draft = Draft(Path("x"), peer.name, {key: value})
        try:
            peer.read(draft)
        except Exception:
            # What it makes of the value is not asked here.
            pass
        if key not in draft.given:
            return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_of_the_table_is_one_of_its_trainer(page, capsys):
    assert main(["fit", "--config", "configs/qwen7b.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    table = rows(page)
    assert len(table) > 30
    for cells in table:
        assert len(cells) == len(PEERS) + 1, cells
        for peer, cell in zip(PEERS, cells, strict=False):
            for key in (one.partition(":")[0] for one in cell):
                assert key in SHARED or peer.knows(key) or reads(peer, key), (peer.name, key)
        for key in (one.partition(": ")[0] for one in cells[-1]):
            place = printed
            for part in key.split("."):
                assert isinstance(place, dict) and part in place, key
                place = place[part]


def test_both_languages_have_the_same_tables():
    tables = [rows(page) for page in PAGES]
    assert all(table == tables[0] for table in tables)
