"""The package as it is built: it has all its modules and configurations, and writes those out."""

import tomllib
from pathlib import Path

import pytest
import yaml

from qwen_lit import shipped
from qwen_lit.cli import main
from qwen_lit.families.table import FAMILIES


def test_every_folder_of_the_package_and_the_configurations_are_built(monkeypatch):
    built = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {".".join(file.parent.parts) for file in Path("qwen_lit").rglob("__init__.py")}
    assert set(built["packages"]) == folders | {"qwen_lit.configs"}
    assert built["package-dir"] == {"qwen_lit.configs": "configs"}
    shipped_data = {file for pattern in built["package-data"]["qwen_lit"] for file in Path("qwen_lit").glob(pattern)}
    assert shipped_data >= set(Path("qwen_lit/templates").iterdir())


def test_the_configurations_are_written_out_and_a_file_that_is_there_stays(tmp_path, capsys):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "qwen7b.yaml").write_text("mine: 1\n")
    assert main(["configs", str(folder)]) == 0
    assert "qwen7b.yaml is there already" in capsys.readouterr().out
    names = {path.name for path in Path("configs").glob("*.yaml")}
    assert {path.name for path in folder.iterdir()} == names and (folder / "qwen7b.yaml").read_text() == "mine: 1\n"
    assert (folder / "demo.yaml").read_bytes() == Path("configs/demo.yaml").read_bytes()
    assert main(["configs", "/proc/nowhere"]) == 2
    assert "cannot write to /proc/nowhere" in capsys.readouterr().err


def test_an_installed_package_has_its_configurations_inside(tmp_path, monkeypatch):
    (tmp_path / "qwen_lit" / "configs").mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "qwen_lit" / "shipped.py"))
    assert shipped.configs() == tmp_path / "qwen_lit" / "configs"


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen3_5_9b", "qwen3_5"), ("qwen3_8_27b", "qwen3_5"), ("qwen3_30b_a3b", "qwen3_moe")]
)
def test_a_configuration_of_a_family_adapts_what_is_usual_in_it(name, kind):
    lora = yaml.safe_load((Path("configs") / f"{name}.yaml").read_text())["model"]["lora_config"]
    assert tuple(lora["target_modules"]) == FAMILIES[kind].targets
