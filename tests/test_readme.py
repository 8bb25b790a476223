"""The READMEs' commands run, or parse where they are heavy; their rows are rows; both languages say the same."""

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from qwen_lit.chat import HELP
from qwen_lit.cli import main
from qwen_lit.data.records import parse_row

READMES = [Path("README.md"), Path("README.zh-CN.md")]


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks(READMES[0], "bash") for line in block.splitlines()]
    return [line for line in lines if line]


def talk(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """``chat`` with its own parser, on no model, to one who says nothing; a wrong option is SystemExit 2."""

    def silence(prompt: str) -> str:
        raise EOFError

    chat = SimpleNamespace(ask=lambda question: (one for one in [question]), answering=False, cut=False)
    monkeypatch.setattr("qwen_lit.chat.started", lambda given: (chat, "a model"))
    monkeypatch.setattr("builtins.input", silence)
    return main(["chat", *words])


@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_is_one_that_works(command, capsys, monkeypatch):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", Path("Makefile").read_text(), re.MULTILINE)
    elif words[0] in (".", "uv", "python3"):
        assert command.endswith(("activate", "install -e ."))
    elif words[0] == "tensorboard":
        from tensorboard.program import TensorBoard

        board = TensorBoard()
        board.configure([None, *words[1:]])
        assert board.flags.logdir == "output/qwen_qlora_model/logs"
    elif words[3] == "chat":
        assert words[:3] == ["python", "-m", "qwen_lit"]
        assert talk(words[4:], monkeypatch) == 0
    else:
        assert words[:3] == ["python", "-m", "qwen_lit"]
        assert main([*words[3:], "--print_config"]) == 0
        assert "model_name_or_path" in capsys.readouterr().out


def test_a_wrong_option_of_chat_is_refused(monkeypatch, capsys):
    lines = [shlex.split(line)[4:] for line in commands() if line.startswith("python -m qwen_lit chat")]
    assert lines
    for words in lines:
        with pytest.raises(SystemExit, match="2"):
            talk([*words, "--nonsense"], monkeypatch)
        assert "--nonsense" in capsys.readouterr().err


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_what_is_told_of_chat_is_what_it_knows(path):
    text = path.read_text(encoding="utf-8")
    for name in re.findall(r"/[a-z]+", HELP):
        assert f"`{name}" in text, name


@pytest.mark.parametrize("block", blocks(READMES[0], "yaml"), ids=lambda block: block.split(":")[0])
def test_every_yaml_of_the_readme_lies_over_a_configuration(block, tmp_path, capsys):
    over = tmp_path / "over.yaml"
    over.write_text(block, encoding="utf-8")
    assert main(["fit", "--config", "configs/qwen7b.yaml", "--config", str(over), "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert holds(printed, yaml.safe_load(block))


def holds(printed, given) -> bool:
    """Whether a printed configuration has all that was given; classes are printed with their module."""
    if isinstance(given, dict):
        return all(holds(printed[key], value) for key, value in given.items())
    if isinstance(given, list):
        return len(printed) == len(given) and all(map(holds, printed, given))
    return printed == given or (isinstance(given, str) and str(printed).endswith("." + given))


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_key_of_ours_is_in_the_table(path, capsys):
    assert main(["fit", "--config", "configs/qwen7b.yaml", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    text = path.read_text(encoding="utf-8")
    for section in ("model", "data", "checkpoint", "export", "samples"):
        for key in printed[section]:
            assert f"`{section}.{key}`" in text, key


def test_both_languages_give_the_same_commands_and_rows():
    for language in ("bash", "json", "yaml"):
        english, chinese = (blocks(path, language) for path in READMES)
        plain = [re.sub(r" +#.*", "", block) for block in english]
        assert plain and plain == [re.sub(r" +#.*", "", block) for block in chinese]


def test_the_rows_of_the_readme_are_rows():
    for line in "".join(blocks(READMES[0], "json")).splitlines():
        assert parse_row(json.loads(line), "README.md:1").messages[-1]["role"] == "assistant"


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_every_exit_code_and_output_is_named(path):
    text = path.read_text(encoding="utf-8")
    outputs = ("lora_adapter/", "final_model/", "checkpoints/", "logs/", "config.yaml", "summary.json", "report.html")
    for word in ("130", "143", "tensorboard", "samples.jsonl", *outputs):
        assert word in text
