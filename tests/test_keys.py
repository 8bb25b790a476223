"""Keys whose value shows in what a command leaves or says, each with another value than its default."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.data import encoding

SHAPE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 8, "num_attention_heads": 16,
         "num_key_value_heads": 8, "vocab_size": 50_000, "layer_types": ["full_attention"] * 8}  # fmt: skip


def test_samples_verdict_smoke_test_and_checkpoints_are_as_many_as_asked(arguments, tmp_path, caplog):
    options = [
        "--trainer.max_steps", "4", "--data.val_size", "6", "--samples.prompts", '["Who are you?", "好?"]',
        "--samples.max_new_tokens", "3", "--export.verdict_rows", "2", "--export.smoke_rows", "1",
        "--checkpoint.every_n_train_steps", "1", "--checkpoint.keep", "3",
    ]  # fmt: skip
    assert main([*arguments, *options]) == 0
    out = tmp_path / "out"
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]
    assert [line["prompt"].count("Who are you?") for line in lines[:2]] == [1, 0] and "好?" in lines[1]["prompt"]
    assert len(lines) % 2 == 0 and all(len(line["answer"]) <= 3 * 8 for line in lines)
    assert json.loads((out / "summary.json").read_text())["verdict"]["rows"] == 2
    assert " of 1 trained prompts" in caplog.text
    kept = sorted(path.name for path in (out / "checkpoints").glob("step=*.ckpt"))
    assert kept == [f"step={step:08d}.ckpt" for step in (2, 3, 4)]


@pytest.fixture
def plan(model_folder, dataset, tmp_path, capsys):
    """``plan --json`` for a model of half a gigabyte, of which only the shapes are read."""
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | SHAPE))

    def run(*options):
        capsys.readouterr()
        code = main(
            ["plan", "--config", "configs/qwen7b.yaml", "--model.model_name_or_path", str(folder), "--json", "true",
             "--data.dataset_path", str(dataset), "--trainer.accelerator", "cpu", "--model.optimizer", "adamw",
             "--model.lora_config.r", "64", *options]
        )  # fmt: skip
        return code, json.loads(capsys.readouterr().out)

    run.folder = folder
    return run


def test_a_plan_tells_disk_memory_and_advice_by_the_shapes(plan):
    code, told = plan("--checkpoint.keep", "4", "--memory_budget", "8GiB")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(plan.folder))
    count, largest = (of(p.numel() for p in model.parameters()) for of in (sum, max))
    # r x (inputs + outputs) of q, k, v and o; AdamW keeps two more numbers of 4 bytes for each.
    trained = 64 * 8 * (2 * (1024 + 1024) + 2 * (1024 + 512))
    assert code == 0 and told["checkpoint_mb"] == round(12 * trained / 1e6, 1)
    assert told["export_gb"] == round(2 * count / 1e9, 2)
    assert told["disk_gb"] == round((5 * 12 * trained + 4 * trained + 2 * count) / 1e9, 2)
    assert told["export_ram_gib"] >= round((2 * largest + 4 * trained) / 2**30, 2) + 0.6
    assert [one["budget_gib"] for one in told["plans"]] == [8.0]
    # Half of the weights, their gradients and AdamW's two numbers.
    advice = "\n".join(told["advice"])
    assert f"lora_config.r 32 takes {8 * trained / 2**30:.2f} GiB less" in advice and "data.packing: true" in advice
    _, packed = plan("--data.packing", "true", "--memory_budget", "8GiB")
    assert "data.packing" not in "\n".join(packed["advice"])


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_processes_tokenise_as_asked(count, model_folder, dataset, tmp_path, monkeypatch):
    asked, plain = [], encoding.in_order
    monkeypatch.setattr(encoding, "in_order", lambda *given: asked.append(given[2]) or plain(*given))
    inspect = ["inspect", "--config", "configs/qwen7b.yaml", "--model.model_name_or_path", str(model_folder),
               "--data.dataset_path", str(dataset), "--trainer.accelerator", "cpu", "--data.num_proc", str(count),
               "--data.cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main(inspect) == 0
    assert asked == [count] * (count > 1) and list((tmp_path / "cache").glob("*/rows.arrow"))
