"""Every shipped configuration parses; every bad input is one clear line and exit code 2."""

import json
import re
import shutil
from pathlib import Path

import pytest

from qwen_lit.cli import main

CONFIGS = sorted(Path("configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(path, capsys):
    assert main(["fit", "--config", str(path), "--print_config"]) == 0
    assert "bnb_4bit_quant_type: nf4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--config", "configs/none.yaml"], "none.yaml"),
        (["--model.rank", "3"], "rank"),
        (["--data.batch_size", "many"], "batch_size"),
        (["--model.model_name_or_path", "./no/such/folder"], "no such folder"),
        (["--data.dataset_path", "no.jsonl"], "no such dataset: no.jsonl"),
        (["--model.lora_config.target_modules", "[q_porj]"], "q_porj"),
        (["--trainer.accelerator", "cuda"], "CUDA"),
        (["--model.quantization_config.load_in_8bit", "true"], "set the other to false"),
        (["--model.learning_rate", "-1"], "learning_rate"),
    ],
)
def test_bad_input_is_named_with_exit_code_2(arguments, change, words, capsys):
    assert main([*arguments, *change]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_config_or_with_another_model_is_refused(arguments, tmp_path, capsys):
    assert main([*arguments, "--model.model_name_or_path", str(tmp_path)]) == 2
    assert "no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert main([*arguments, "--model.model_name_or_path", str(tmp_path)]) == 2
    assert "which cannot be trained; give one of Qwen2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"instruction": "a", ', "is not JSON"),
        (b'{"instruction": "a"}', "output"),
        (b'{"instruction": "\xff", "output": "b"}', "UTF-8"),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "no assistant turn"),
        (b'{"instruction": "<|im_end|>", "output": "b"}', "control"),
    ],
)
def test_a_faulty_row_is_named_by_path_and_line(arguments, tmp_path, line, words, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"instruction": "a", "output": "b"}\n' + line + b"\n")
    assert main([*arguments, "--data.dataset_path", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"{path}:2" in message and words in message


def test_help_explains_every_key_of_our_own(capsys):
    from inspect import getsource, signature

    from qwen_lit.callbacks.checkpoint import RunCheckpoint
    from qwen_lit.callbacks.export import Export
    from qwen_lit.data.settings import DataSettings
    from qwen_lit.model.settings import ModelSettings

    assert main(["fit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    keys = {}
    for section, kind in {"model": ModelSettings, "data": DataSettings}.items():
        # A docstring stands below each attribute.
        found = re.findall(r'^    (\w+): .*\n    """([^"\n]{5,20})', getsource(kind), re.MULTILINE)
        assert [name for name, _ in found] == list(kind.__dataclass_fields__)
        keys |= {f"{section}.{name}": described for name, described in found}
    for section, kind in {"checkpoint": RunCheckpoint, "export": Export}.items():
        for name in list(signature(kind.__init__).parameters)[1:]:
            described = re.search(rf"^ +{name}: (.{{10,20}})", kind.__init__.__doc__, re.MULTILINE)
            assert described, name
            keys[f"{section}.{name}"] = described[1]
    hidden = {"data.seed", "checkpoint.run", "export.run", "export.saver"}
    hidden |= {"model.lora_config", "model.quantization_config"}
    for key, described in keys.items():
        assert key in hidden or (f"--{key}" in text and described in text), key


def test_an_export_of_the_last_checkpoint_where_there_is_none_is_refused(arguments, capsys):
    assert main(["export", *arguments[1:], "--ckpt_path", "last"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--model.lora_config.target_modules", "q_proj"], "'q_proj' is a regular expression that matches no"),
        (["--model.quantization_config.bnb_4bit_compute_dtype", "bf16"], "is 'bf16'; write bfloat16 or float16"),
        (["--model.lora_config.lora_dropout", "1.5"], "model.lora_config.lora_dropout is 1.5"),
        (["--model.memory_budget", "none"], "model.memory_budget is 'none'; write null for none"),
        (["--data.num_proc", "0"], "data.num_proc is 0; it must be at least 1"),
        (["--export.verdict_rows", "-1"], "export.verdict_rows is -1"),
        (["--samples.max_new_tokens", "0"], "samples.max_new_tokens is 0"),
        (["--data.cache_dir", "README.md/cache"], "data.cache_dir: README.md/cache cannot be made"),
        (["--output_dir", "s3://bucket/out"], "output_dir: s3://bucket/out is an address"),
    ],
)
def test_what_can_be_known_is_one_line_before_rows_are_read(arguments, change, words, capsys):
    assert main([*arguments, *change]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and words in told


def test_a_base_that_cannot_be_trained_is_refused_before_rows_are_read(arguments, model_folder, tmp_path, capsys):
    base = tmp_path / "base"
    shutil.copytree(model_folder, base)
    command = [*arguments, "--model.model_name_or_path", str(base), "--data.cache_dir", str(tmp_path / "cache")]

    def told() -> str:
        assert main(command) == 2
        text = capsys.readouterr().err
        assert text.startswith("error: ") and text.count("\n") == 1 and not (tmp_path / "cache").exists()
        return text

    template = base / "chat_template.jinja"
    good = template.read_text()
    template.write_text("{% for m in messages %}")
    assert "the chat template" in told()
    template.write_text(good)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "model.safetensors is damaged" in told()
    weights.rename(base / "pytorch_model.bin")
    assert "only pytorch_model.bin" in told()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    assert "is quantised already (gptq)" in told()
    (base / "config.json").write_text("{")
    assert "cannot read the config" in told()


def test_a_command_without_an_adapter_and_fit_from_one_name_the_remedy(arguments, tmp_path, capsys):
    assert main(["export", *arguments[1:]]) == 2
    assert "run fit first, or give --ckpt_path" in capsys.readouterr().err
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert main([*arguments, "--ckpt_path", str(tmp_path / "lora")]) == 2
    assert "is an adapter, which holds no optimizer and no position to go on from" in capsys.readouterr().err
