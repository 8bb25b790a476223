"""One function reads models, whoever asks."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.errors import UserError
from qwen_lit.model.load import empty_model, load_config, read_adapted, read_model

CPU = torch.device("cpu")


@pytest.fixture
def reads(monkeypatch):
    """What is read, and from which kinds of files."""
    real, found = AutoModelForCausalLM.from_pretrained, []

    def noted(folder, **options):
        found.append((str(folder), options["use_safetensors"]))
        return real(folder, **options)

    monkeypatch.setattr("qwen_lit.model.load.AutoModelForCausalLM.from_pretrained", noted)
    return found


def test_fit_its_smoke_test_predict_and_chat_read_safetensors_alone(arguments, model_folder, tmp_path, reads):
    short = [*arguments[1:], "--trainer.max_steps", "1", "--samples.rows", "0", "--export.verdict_rows", "0"]
    assert main(["fit", *short]) == 0
    out, base = tmp_path / "out", str(model_folder)
    assert reads == [(base, True), (str(out / "final_model"), True)]
    (tmp_path / "ask.jsonl").write_text(json.dumps({"instruction": "What is 1 plus 1?"}) + "\n")
    asked = ["--source", str(tmp_path / "ask.jsonl"), "--target", str(tmp_path / "answers.jsonl")]
    assert main(["predict", *short, *asked, "--max_new_tokens", "2"]) == 0
    assert reads[2:] == [(base, True)]
    assert main(["chat", str(out / "lora_adapter"), "--prompt", "Hi", "--max_new_tokens", "2"]) == 0
    assert reads[3:] == [(base, True)]


def test_pickled_weights_are_never_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        read_model(folder, CPU)


def test_a_model_is_read_in_the_dtype_of_the_device_or_the_one_that_is_given(model_folder, bf16):
    assert read_model(model_folder, CPU).dtype == torch.bfloat16
    assert read_model(model_folder, CPU, dtype=torch.float32).dtype == torch.float32


def test_an_empty_model_has_the_names_and_shapes_and_no_weights(model_folder):
    empty, model = empty_model(load_config(model_folder)), read_model(model_folder, CPU)
    assert {name: one.shape for name, one in empty.named_parameters()} == {
        name: one.shape for name, one in model.named_parameters()
    }
    assert {one.device.type for one in empty.parameters()} == {"meta"}


def test_an_adapter_that_lacks_weights_of_its_base_is_refused(model_folder, tmp_path):
    base = read_model(model_folder, CPU)
    adapted = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path)
    assert read_adapted(read_model(model_folder, CPU), tmp_path).training is False
    file = tmp_path / "adapter_model.safetensors"
    renamed = {name.replace(".layers.", ".blocks."): one for name, one in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"is not an adapter of this base \(Found missing adapter keys"):
        read_adapted(read_model(model_folder, CPU), tmp_path)
