"""``~`` is the home folder in every path that a user gives."""

import json
import shutil

import pytest
import torch
import yaml

from qwen_lit.cli import main
from qwen_lit.names import expanded


@pytest.fixture
def home(monkeypatch, tmp_path, model_folder, dataset):
    """A home folder with a model, rows and a configuration that names all of them, and another working folder."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    shutil.copytree(model_folder, home / "model")
    shutil.copy(dataset, home / "rows.jsonl")
    held_out = [{"instruction": f"What is {n} plus 7?", "output": f"It is {n + 7}. 好"} for n in range(5)]
    (home / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    config = {
        "output_dir": "~/out",
        "model": {
            "model_name_or_path": "~/model",
            "lora_config": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
        },
        "data": {
            "dataset_path": "~/rows.jsonl",
            "val_dataset_path": "~/held_out.jsonl",
            "cache_dir": "~/cache",
            "batch_size": 5,
            "max_length": 128,
        },
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 1,
            "enable_progress_bar": False,
            "callbacks": [
                {"class_path": "qwen_lit.callbacks.trace.Trace", "init_args": {"path": "~/trace.jsonl"}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "~/more"}},
            ],
        },
        "samples": {"rows": 0},
        "export": {"verdict_rows": 0, "smoke_rows": 0},
    }
    (home / "run.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(elsewhere)
    yield home
    assert not list(elsewhere.iterdir())


def test_a_run_and_all_that_follows_it_find_the_home_folder(home):
    given = ["--config", str(home / "run.yaml")]
    assert main(["inspect", *given, "--html", "~/page.html", "--row", "~/rows.jsonl:3", "--rows", "1"]) == 0
    assert (home / "page.html").is_file() and any((home / "cache").iterdir())
    assert main(["fit", *given]) == 0
    for name in ("lora_adapter/adapter_config.json", "final_model/model.safetensors", "checkpoints"):
        assert (home / "out" / name).exists()
    assert (home / "trace.jsonl").is_file() and any((home / "more").glob("*.ckpt"))
    (checkpoint,) = (home / "out" / "checkpoints").glob("step*.ckpt")
    one = f"~/out/checkpoints/{checkpoint.name}"
    (home / "ask.jsonl").write_text(json.dumps({"instruction": "What is 1 plus 1?"}) + "\n")
    asked = ["--source", "~/ask.jsonl", "--target", "~/answers.jsonl", "--ckpt_path", one, "--max_new_tokens", "2"]
    assert main(["predict", *given, *asked]) == 0
    assert "prediction" in json.loads((home / "answers.jsonl").read_text())
    shutil.rmtree(home / "out" / "final_model")
    assert main(["export", *given, "--ckpt_path", "~/out/lora_adapter"]) == 0
    assert (home / "out" / "final_model" / "config.json").is_file()
    assert main(["validate", *given, "--ckpt_path", one]) == 0
    begun = ["--model.init_adapter", "~/out/lora_adapter", "--output_dir", "~/second", "--export.merge", "false"]
    assert main(["fit", *given, *begun]) == 0
    assert (home / "second" / "lora_adapter" / "adapter_config.json").is_file()


def test_chat_finds_the_home_folder_and_the_base_in_it(home, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qwen_lit.commands.chat import parser, started
    from qwen_lit.commands.chat_model import choose, load

    base = AutoModelForCausalLM.from_pretrained(home / "model")
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.peft_config["default"].base_model_name_or_path = "~/model"
    adapter.save_pretrained(home / "adapter")
    choice, _ = choose("~/adapter", False, torch.device("cpu"))
    assert choice.folder == home / "adapter" and choice.base == str(home / "model")
    assert load(choice, torch.device("cpu"))[0].device.type == "cpu"
    monkeypatch.setattr("qwen_lit.gpu.check_gpu", lambda *args, **more: None)
    chat, line = started(parser().parse_args(["~/adapter", "--no-load_in_4bit"]))
    assert chat.command("/save ~/talk.jsonl") == "there is no answer to save yet"
    chat.messages.append({"role": "assistant", "content": "Hello."})
    assert chat.command("/save ~/talk.jsonl") == "saved to ~/talk.jsonl"
    assert (home / "talk.jsonl").is_file()


def test_commands_beside_a_run_find_the_home_folder(home):
    assert main(["configs", "~/configs"]) == 0
    assert (home / "configs" / "qwen7b.yaml").is_file()
    (home / "novel.txt").write_text("It was a dark night, and the wind blew. Nobody came. " * 40)
    sizes = ["--passage", "200", "--length", "200"]
    assert main(["data", "split", "~/novel.txt", *sizes]) == 0
    assert main(["data", "split", "~/novel.txt", *sizes, "--output", "~/more.jsonl"]) == 0
    assert (home / "novel.jsonl").read_text() == (home / "more.jsonl").read_text()
    (home / "peer.yaml").write_text("model_name_or_path: Qwen/Qwen2.5-7B-Instruct\nstage: sft\ndataset: alpaca\n")
    assert main(["convert", "~/peer.yaml", "--output", "~/ours.yaml"]) == 0
    assert (home / "ours.yaml").is_file()


def test_other_users_and_tildes_within_a_path_stay(home):
    assert expanded("~nobody-of-that-name/x") == "~nobody-of-that-name/x"
    assert expanded("a/~/b") == "a/~/b" and expanded("~/b") == str(home / "b") and expanded("~") == str(home)


def test_a_user_that_is_not_there_is_an_error_in_one_line(home, capsys):
    given = ["fit", "--config", str(home / "run.yaml"), "--model.model_name_or_path", "~nobody-of-that-name/model"]
    assert main(given) == 2
    told = capsys.readouterr().err
    assert "no such folder: ~nobody-of-that-name/model" in told and "Traceback" not in told
