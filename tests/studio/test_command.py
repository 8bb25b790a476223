"""The command, and a conversation with a program."""

import asyncio
import io
import json

import pytest

from qwen_lit.commands import chat
from qwen_lit.errors import UserError
from qwen_lit.studio import command
from qwen_lit.studio.chats import Talk


def test_without_nicegui_it_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([]) == 2
    assert "pip install 'qwen_lit[studio]'" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--folder", "missing"], ["--port", "99999"], ["--host", "203.0.113.1"]], ids=str)
def test_what_cannot_be_served_is_said(options, monkeypatch, capsys):
    monkeypatch.setattr(command, "find_spec", lambda name: True)
    assert command.main(options) == 2
    assert options[1] in capsys.readouterr().err


def test_a_program_converses_in_lines(model_folder, monkeypatch, capsys):
    lines = ['{"ask": "What is 1 plus 2?"}', "no JSON", '{"command": "/reset"}', '{"command": "/quit"}', "never read"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    assert chat.main([str(model_folder), "--json", "--greedy", "--max_new_tokens=4"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert said[0]["thinks"] is False and str(model_folder) in said[0]["ready"]
    kinds = [next(iter(one)) for one in said[1:]]
    assert kinds == ["piece"] * (len(said) - 4) + ["end", "error", "said"] and "piece" in kinds
    assert said[-3]["end"] == {"cut": True, "stopped": False}


def test_a_model_that_is_not_there_is_said(tmp_path):
    async def start():
        await Talk(tmp_path / "missing").start()

    with pytest.raises(UserError, match="no such folder"):
        asyncio.run(start())
