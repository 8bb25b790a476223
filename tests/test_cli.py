"""Every shipped configuration parses; every bad input is one clear line and exit code 2."""

import json
import re
from pathlib import Path

import pytest

from qwen_lit.cli import main

CONFIGS = sorted(path for path in Path("configs").glob("*.yaml") if path.name != "small_card.yaml")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_parses(path, capsys):
    assert main(["fit", "--config", str(path), "--config", "configs/small_card.yaml", "--print_config"]) == 0
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
    assert "not a Qwen2" in capsys.readouterr().err


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
    from inspect import signature

    from qwen_lit.callbacks.checkpoint import RunCheckpoint
    from qwen_lit.callbacks.export import Export
    from qwen_lit.data.datamodule import QwenDataModule
    from qwen_lit.model.module import QwenModule

    assert main(["fit", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    sections = {"model": QwenModule, "data": QwenDataModule, "checkpoint": RunCheckpoint, "export": Export}
    linked = {"data.seed", "checkpoint.output_dir", "export.output_dir"}
    for section, owner in sections.items():
        for name in list(signature(owner.__init__).parameters)[1:]:
            key = f"{section}.{name}"
            if key in linked or name in ("lora_config", "quantization_config"):
                continue
            described = re.search(rf"^ +{name}: (.{{10,20}})", owner.__init__.__doc__, re.MULTILINE)
            assert described, key
            assert f"--{key}" in text and described[1] in text, key


def test_an_export_of_the_last_checkpoint_where_there_is_none_is_refused(arguments, capsys):
    assert main(["export", *arguments[1:], "--ckpt_path", "last"]) == 2
    assert "there is no checkpoint in" in capsys.readouterr().err
