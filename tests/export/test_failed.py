"""An export that fails: what was trained stays, and the run says what is missing and how to make it."""

import errno
import json
import os
import shlex
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import yaml

from qwen_lit.cli import main
from qwen_lit.export import ExportError

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def run(arguments):
    return [
        *arguments,
        "--trainer.max_steps",
        "2",
        "--data.val_size",
        "5",
        "--export.smoke_rows",
        "0",
        "--samples.rows",
        "0",
    ]


def fail(error):
    def instead(*args, **kwargs):
        raise error

    return instead


def told(capsys):
    """The one line on what is missing, and the command that it ends with, as arguments."""
    text = capsys.readouterr().err
    (line,) = [one for one in text.splitlines() if one.startswith("error:")]
    assert "Traceback" not in text and "the run failed" not in text
    return line, shlex.split(line.partition("python -m qwen_lit ")[2])


def summary(out):
    assert (out / "report.html").is_file()
    return json.loads((out / "summary.json").read_text())


def test_a_disk_that_fills_while_training_leaves_adapter_report_and_the_command_that_exports_again(
    run, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "我的 out's"
    with monkeypatch.context() as patch:
        patch.setattr("qwen_lit.export.space.free_bytes", lambda folder: 2**40)
        patch.setattr("qwen_lit.export.merge.shutil.disk_usage", lambda path: Usage(1, 1, 0))
        assert main([*run, "--output_dir", str(out)]) == 1
    line, again = told(capsys)
    assert "not exported: final_model (" in line and "the disk has 0.0 GiB left" in line
    assert (out / "lora_adapter" / "adapter_model.safetensors").is_file() and not (out / "final_model").exists()
    found = summary(out)
    assert found["steps"] == 2 and found["verdict"]["rows"] == 5 and found["last"]["loss"] > 0
    assert list(found["export"]["missing"]) == ["final_model"]
    assert shlex.split(found["export"]["again"])[3:] == again
    assert "Not exported" in (out / "report.html").read_text("utf-8")
    assert again == ["export", "--config", str(out / "config.yaml")]
    assert main(again) == 0
    assert (out / "final_model" / "model.safetensors").is_file()


def test_each_part_that_fails_is_missing_alone(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert main(run) == 0 and summary(out)["export"] == {}
    capsys.readouterr()
    export = ["export", *run[1:], "--export.gguf", "f16", "--export.smoke_rows", "1"]
    for where, error, name in (
        ("measure", torch.OutOfMemoryError("CUDA out of memory\nmore lines"), "the verdict"),
        ("write_gguf", ExportError("tensor reads back wrong"), "model-f16.gguf"),
        ("try_prompts", MemoryError(), "the answers to trained prompts"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"qwen_lit.export.pipeline.{where}", fail(error))
            assert main(export) == 1
        line, again = told(capsys)
        reason = (str(error) or "MemoryError").splitlines()[0]
        assert f"not exported: {name} ({reason})" in line and again == ["export", "--config", str(out / "config.yaml")]
        assert (out / "final_model" / "model.safetensors").is_file()
        source = "." if name == "model-f16.gguf" else "./model-f16.gguf"
        assert f"\nFROM {source}\n" in (out / "final_model" / "Modelfile").read_text()
        assert (out / "final_model" / "model-f16.gguf").is_file() == (source != ".")


def test_an_adapter_that_cannot_be_written_is_exported_from_the_checkpoint(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        patch.setattr("qwen_lit.callbacks.export.commit_folder", fail(full))
        assert main(run) == 1
    line, again = told(capsys)
    assert "lora_adapter ([Errno 28] No space left on device)" in line
    assert list(summary(out)["export"]["missing"]) == ["lora_adapter"]
    assert again == ["export", "--config", str(out / "config.yaml"), "--ckpt_path", "last"]
    assert main(again) == 0
    assert (out / "lora_adapter" / "adapter_model.safetensors").is_file()
    assert (out / "final_model" / "model.safetensors").is_file()


LORA = "--model.lora_config."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--export.gguf", "q8_0"], "export.gguf needs the gguf package"),
        ([LORA + "trainable_token_indices", "[1,2]"], "trainable_token_indices: [1, 2] cannot be merged"),
        ([LORA + "lora_bias", "true"], "lora_bias on model.layers.0.self_attn.o_proj, which has no bias, cannot"),
    ],
    ids=["gguf", "tokens", "lora_bias"],
)
def test_what_cannot_be_exported_is_known_before_the_model_is_loaded(run, options, words, capsys, monkeypatch):
    monkeypatch.setattr("qwen_lit.callbacks.export.find_spec", lambda name: None)
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main([*run, *options]) == 2
    assert words in capsys.readouterr().err


def test_export_without_an_adapter_says_where_one_comes_from(run, tmp_path, capsys):
    assert main(["export", *run[1:]]) == 2
    assert f"no adapter in {tmp_path / 'out' / 'lora_adapter'}; run fit first" in capsys.readouterr().err


class Hub:
    """Stands in for the hub: it checks the card as the hub does, and keeps what is uploaded."""

    down = False
    kept: dict = {}

    def create_repo(self, name, exist_ok):
        assert exist_ok
        if Hub.down:
            raise ConnectionError("the hub is not reached\nat all")

    def upload_folder(self, repo_id, folder_path):
        folder = Path(folder_path)
        front = yaml.safe_load((folder / "README.md").read_text("utf-8").split("---\n")[1])
        base = front.get("base_model", "a/b")
        if base.count("/") != 1 or base.startswith("/"):
            raise ValueError(f'Invalid metadata in README.md.\n- "base_model" with value "{base}" is not valid.')
        Hub.kept[repo_id] = {path.name for path in folder.iterdir()}


def test_a_run_on_a_local_folder_can_be_pushed_and_a_hub_that_is_away_is_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("qwen_lit.export.push.HfApi", Hub)
    assert main([*run, "--export.merge", "false"]) == 0
    export = ["export", *run[1:], "--export.verdict_rows", "0", "--push_to_hub"]
    capsys.readouterr()
    assert main([*export, "me/taught"]) == 0
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= Hub.kept["me/taught"]
    monkeypatch.setattr(Hub, "down", True)
    assert main([*export, "me/other"]) == 1
    text = capsys.readouterr().err
    assert "error: push_to_hub: me/other was not uploaded (the hub is not reached at all)" in text
    assert "Traceback" not in text and "me/other" not in Hub.kept
    assert main([*export, "not a/name/at all"]) == 2
    assert main([*export, "me/other", "--export.merge", "false"]) == 2


def test_a_disk_without_room_for_the_report_is_one_line(run, tmp_path, capsys, monkeypatch):
    plain, full = os.replace, fail(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    monkeypatch.setattr(os, "replace", lambda a, b: (full if Path(b).name == "report.html" else plain)(a, b))
    assert main([*run, "--export.verdict_rows", "0"]) == 1
    line, _ = told(capsys)
    assert line == f"error: the report could not be written to {tmp_path / 'out'} (No space left on device)."
    assert (tmp_path / "out" / "lora_adapter" / "adapter_model.safetensors").is_file()
    assert not list((tmp_path / "out").glob("*.tmp"))
