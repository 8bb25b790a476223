"""The READMEs' commands run, or parse where they are heavy; their rows are rows; both languages say the same."""

import json
import re
import shlex
from pathlib import Path

import pytest

from qwen_lit.cli import main
from qwen_lit.data.records import parse_row

READMES = [Path("README.md"), Path("README.zh-CN.md")]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(READMES[0], "bash") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_one_that_works(command, capsys):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.MULTILINE)
    elif words[0] == "tensorboard":
        from tensorboard.main import run_main

        assert callable(run_main) and words[1] == "--logdir"
    else:
        assert words[:3] == ["python", "-m", "qwen_lit"]
        assert main([*words[3:], "--print_config"]) == 0
        assert "model_name_or_path" in capsys.readouterr().out


def test_both_languages_give_the_same_commands_and_rows():
    for language in ("bash", "json"):
        english, chinese = (blocks(path, language) for path in READMES)
        plain = [re.sub(r" +#.*", "", block) for block in english]
        assert plain and plain == [re.sub(r" +#.*", "", block) for block in chinese]


def test_the_rows_of_the_readme_are_rows():
    for line in "".join(blocks(READMES[0], "json")).splitlines():
        assert parse_row(json.loads(line), "README.md:1").messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_exit_code_and_output_is_named(path):
    text = path.read_text(encoding="utf-8")
    for word in ("130", "143", "lora_adapter/", "final_model/", "checkpoints/", "logs/", "config.yaml", "tensorboard"):
        assert word in text
