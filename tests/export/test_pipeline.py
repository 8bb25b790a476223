"""The whole export: from a run, from its checkpoint, from its adapter."""

import json

import pytest
import torch
from safetensors.torch import load_file

from qwen_lit.callbacks.checkpoint_io import last_checkpoint
from qwen_lit.cli import main


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--model.lora_config.use_dora", "true"],
        ["--model.lora_config.modules_to_save", "[lm_head]"],
        ["--model.lora_config.target_modules", "[q_proj,lm_head]"],
    ],
    ids=["lora", "dora", "modules_to_save", "head"],
)
def test_an_export_from_a_checkpoint_is_the_one_of_the_run(arguments, tmp_path, options, caplog):
    out = tmp_path / "out"
    run = [*arguments, *options, "--data.val_size", "5", "--export.gguf", "f16", "--model.learning_rate", "0.005"]
    run += ["--export.merge_base", "auto"]
    assert main(run) == 0
    assert "does the merged model answer as trained? 5 held-out rows" in caplog.text
    summary = json.loads((out / "summary.json").read_text())
    # The validation at the end of training has measured the adapter on the same rows.
    assert summary["verdict"]["adapter_loss"] == pytest.approx(summary["last"]["val_loss"], abs=0.002)
    first = {path.name: path.read_bytes() for path in (out / "final_model").iterdir()}
    adapter = load_file(out / "lora_adapter" / "adapter_model.safetensors")
    assert {"model.safetensors", "model-f16.gguf", "README.md", "Modelfile", "training_config.json"} <= set(first)
    again = ["export", *run[1:], "--ckpt_path", "last"]
    assert main(again) == 0
    second = {path.name: path.read_bytes() for path in (out / "final_model").iterdir()}
    assert first["model.safetensors"] == second["model.safetensors"]
    from_checkpoint = load_file(out / "lora_adapter" / "adapter_model.safetensors")
    assert sorted(adapter) == sorted(from_checkpoint)
    assert all(torch.equal(adapter[name], from_checkpoint[name]) for name in adapter)
    card = (out / "final_model" / "README.md").read_text()
    assert ("weights as they were trained on" in card) == (summary["verdict"]["best"] == "dequantized")
    assert main(["export", *run[1:], "--export.merge_base", "original"]) == 0
    assert "weights as they were trained on" not in (out / "final_model" / "README.md").read_text()


def test_an_adapter_whose_base_was_changed_is_exported_by_fit_alone(arguments, tmp_path, capsys):
    run = [*arguments, "--model.lora_config.init_lora_weights", "pissa", "--model.quantization_config", "null"]
    assert main([*run, "--trainer.max_steps", "2"]) == 0
    assert main(["export", *run[1:], "--ckpt_path", "last"]) == 1
    assert "run fit --ckpt_path last" in capsys.readouterr().err


def test_the_verdict_stands_in_the_log_the_card_and_tensorboard(arguments, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main([*arguments, "--data.val_size", "4"]) == 0
    out = tmp_path / "out"
    card = (out / "final_model" / "README.md").read_text()
    assert "Does it answer as trained?" in card and "adapter on its base" in card and "trained prompts ended" in card
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    assert "verdict/dequantized_kl" in events.Tags()["scalars"]
    config = json.loads((out / "final_model" / "training_config.json").read_text())
    assert config["model"]["lora_config"]["r"] == 4


def test_the_same_export_again_needs_no_training(arguments, tmp_path, model_folder):
    out, learning = tmp_path / "out", ["--model.learning_rate", "0.005"]
    assert main([*arguments, *learning, "--trainer.max_steps", "2", "--export.merge", "false"]) == 0
    adapter = load_file(out / "lora_adapter" / "adapter_model.safetensors")
    checkpoint = last_checkpoint(out / "checkpoints")
    assert main(["export", *arguments[1:], "--ckpt_path", str(checkpoint)]) == 0
    merged, base = (load_file(folder / "model.safetensors") for folder in (out / "final_model", model_folder))
    name = "model.layers.1.self_attn.q_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    config = json.loads((out / "lora_adapter" / "adapter_config.json").read_text())
    wanted = base[f"{name}.weight"].float() + config["lora_alpha"] / config["r"] * (b @ a)
    assert torch.equal(merged[f"{name}.weight"], wanted.to(torch.bfloat16))
    assert not torch.equal(merged[f"{name}.weight"], base[f"{name}.weight"])
