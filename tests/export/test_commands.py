"""The commands of the cards: they stand in one folder, find what they name there, and call the model by one name."""

import json
import shlex
from pathlib import Path

import pytest

from qwen_lit.export.card import AdapterFacts, ModelCardFacts, finish_adapter, model_card
from qwen_lit.export.commands import served_name
from tests.export.test_card import adapter, commands

BASE = "Qwen/Qwen2.5-7B"


def card_of(folder, base=BASE, output_dir="output/tea", **told):
    config = {"model": {"model_name_or_path": base}, "output_dir": str(output_dir)}
    return model_card(ModelCardFacts(config=config, adapter=AdapterFacts.read(folder), **told))


def test_the_merged_model_and_the_adapter_are_served_from_the_folder_of_the_card_under_one_name(tmp_path):
    folder = adapter(tmp_path / "lora_adapter", rank=48)
    card = card_of(folder, gguf="model-q4_k_m.gguf", adapter_path="/else where/lora")
    sglang = ["python", "-m", "sglang.launch_server", "--model-path"]
    lines = commands(card)
    ask = lines.pop(6)
    assert lines == [
        ["qwen-lit", "chat", "."],
        ["vllm", "serve", ".", "--served-model-name", "tea"],
        [*sglang, ".", "--served-model-name", "tea"],
        ["ollama", "create", "tea", "-f", "Modelfile"],
        ["ollama", "run", "tea"],
        ["llama-server", "-m", "model-q4_k_m.gguf", "--alias", "tea", "--jinja"],
        ["vllm", "serve", BASE, "--enable-lora", "--max-lora-rank", "64", "--lora-modules", "tea=/else where/lora"],
        [*sglang, BASE, "--served-model-name", "base", "--enable-lora", "--lora-paths", "tea=/else where/lora"],
    ]
    assert ask[:2] == ["curl", "http://localhost:8000/v1/chat/completions"]
    assert json.loads(ask[-1])["model"] == "tea" and "requests call the model base:tea" in card
    assert "llama-server -m" not in card_of(folder)


def test_the_request_in_python_is_python_and_names_the_model(tmp_path):
    code = card_of(adapter(tmp_path / "lora_adapter")).split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")
    assert 'model="tea"' in code


@pytest.mark.parametrize("name", ["tea", "我的 小说's"])
def test_every_path_in_the_commands_is_found_from_the_folder_of_the_card(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    out, base = Path("output") / name, Path("my models") / "基座"
    (out / "final_model").mkdir(parents=True)
    for file in ("config.json", "Modelfile", "model-q8_0.gguf"):
        (out / "final_model" / file).touch()
    base.mkdir(parents=True)
    (base / "config.json").touch()
    folder = adapter(out / "lora_adapter")
    finish_adapter(folder, str(base), {"output_dir": str(out)})
    merged = card_of(folder, str(base), out, gguf="model-q8_0.gguf")
    for card, place in ((merged, out / "final_model"), ((folder / "README.md").read_text("utf-8"), folder)):
        monkeypatch.chdir(tmp_path / place)
        found = []
        for line in commands(card):
            keys = ("serve", "chat", "--model-path", "-f", "-m", "--lora-modules", "--lora-paths")
            found += [line[line.index(key) + 1].split("=")[-1] for key in keys if key in line[:-1]]
        found = [one for one in found if one != "sglang.launch_server"]
        assert found and [one for one in found if not Path(one).exists()] == []
        assert any((Path(one) / "adapter_config.json").is_file() for one in found)
        assert str((tmp_path / base).resolve()) in found
        monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("output_dir", "base", "name"),
    [
        ("output/demo", BASE, "demo"),
        ("~/runs/my novel (2)/", BASE, "my-novel-2"),
        ("output/小说", BASE, "Qwen2.5-7B-tuned"),
        ("output/小说 v2", BASE, "v2"),
        ("output", "/models/千问 7B", "7B-tuned"),
        (None, "/models/千问", "tuned"),
        ("output/小说s", BASE, "Qwen2.5-7B-tuned"),
        ("output/2026", BASE, "Qwen2.5-7B-tuned"),
    ],
)
def test_the_name_is_one_that_every_server_takes(output_dir, base, name):
    assert served_name({"output_dir": output_dir}, base) == name == shlex.quote(name)


def test_an_adapter_that_no_server_takes_is_talked_to_in_the_terminal_alone(tmp_path):
    folder = adapter(tmp_path / "lora_adapter", use_dora=True)
    finish_adapter(folder, BASE, {})
    text = (folder / "README.md").read_text("utf-8")
    assert "qwen-lit chat ." in text and "serve the merged model" in text and "curl" not in text
