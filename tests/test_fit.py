"""The main job on a tiny model: fit, resume, export."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from qwen_lit.callbacks.checkpoint_io import last_checkpoint
from qwen_lit.cli import main


def losses(folder: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for file in sorted((folder / "logs").glob("events*")):
        events = EventAccumulator(str(file))
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("train/loss")}
    return found


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "lora_adapter" / "adapter_model.safetensors")


def merge_error(out: Path, model_folder: Path) -> float:
    """Largest difference of logits between base + adapter and the merged model, loaded by plain libraries."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, out / "lora_adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(out / "final_model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "final_model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float((adapted(ids).logits - merged(ids).logits).abs().max())


def test_fit_leaves_an_adapter_and_a_merged_model_that_plain_libraries_load(arguments, tmp_path, model_folder):
    assert main(arguments) == 0
    out = tmp_path / "out"
    assert merge_error(out, model_folder) < 0.02
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["model"]["lora_config"]["r"] == 4 and config["trainer"]["accumulate_grad_batches"] == 3
    told = json.loads((out / "final_model" / "training_config.json").read_text())
    assert told["seed_everything"] == config["seed_everything"] == 42


@pytest.mark.parametrize("name", ["inspect", "plan", "validate", "fit"])
def test_the_configuration_that_a_run_leaves_is_one_for_every_command(whole, name, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text((whole / "config.yaml").read_text().replace("ckpt_path: null", "ckpt_path: last"))
    options = ["--trainer.limit_val_batches", "1"] if name == "validate" else []
    assert main([name, "--config", str(config), *options]) == 0, capsys.readouterr().err


def test_two_runs_with_one_seed_are_equal_and_a_resumed_one_equals_them(arguments, tmp_path):
    out = tmp_path / "out"
    assert main(arguments) == 0
    whole, whole_adapter = losses(out), adapter(out)
    assert len(whole) == 6
    shutil.move(out, tmp_path / "first")

    assert main([*arguments, "--trainer.limit_train_batches", "1.0"]) == 0
    assert losses(out) == whole
    steps = sorted((out / "checkpoints").glob("step=*.ckpt"))
    assert [path.name for path in steps] == ["step=00000004.ckpt", "step=00000006.ckpt"]
    steps[-1].write_bytes(steps[-1].read_bytes()[:1000])
    shutil.rmtree(out / "lora_adapter")
    shutil.rmtree(out / "logs")

    assert main([*arguments, "--ckpt_path", "last"]) == 0
    assert (out / "checkpoints" / "step=00000006.ckpt.corrupt").is_file()
    resumed = losses(out)
    assert resumed == {step: whole[step] for step in list(whole)[4:]}
    for name, tensor in adapter(out).items():
        assert torch.equal(tensor, whole_adapter[name]), name


def test_a_checkpoint_holds_the_adapter_alone_and_no_code(arguments, tmp_path):
    assert main([*arguments, "--trainer.max_steps", "2"]) == 0
    path = last_checkpoint(tmp_path / "out" / "checkpoints")
    state = torch.load(path, weights_only=True)["state_dict"]
    assert state and all("lora_" in name for name in state)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.lora_config.use_rslora", "true", "--model.lora_plus_ratio", "4"],
        ["--model.lora_config.use_dora", "true", "--model.neftune_noise_alpha", "5"],
        ["--model.quantization_config", "null", "--model.lr_scheduler", "linear"],
        ["--model.lora_config.init_lora_weights", "pissa", "--model.quantization_config", "null"],
        ["--data.packing", "true", "--data.max_length", "128", "--data.num_workers", "1"],
    ],
)
def test_every_variant_trains_and_exports_a_merge_that_answers_as_its_adapter(
    arguments, options, tmp_path, model_folder
):
    assert main([*arguments, *options, "--trainer.max_steps", "4", "--model.learning_rate", "0.002"]) == 0
    assert merge_error(tmp_path / "out", model_folder) < 0.02
    assert any(tensor.abs().max() > 1e-4 for name, tensor in adapter(tmp_path / "out").items() if "lora_B" in name)
