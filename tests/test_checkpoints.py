"""Checkpoints that are damaged, late, on a full disk or of another run never cost what was trained."""

import json
import os
from pathlib import Path

import pytest
import torch

from qwen_lit.callbacks import checkpoint_io as store
from qwen_lit.callbacks.checkpoint_io import is_whole, last_checkpoint, manifest_of, step_files
from qwen_lit.cli import main
from tests.runs import no_space, same, trace


@pytest.mark.parametrize("damage", ["torn", "empty", "altered", "zeroed"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_used(command, whole, stopped, damage, caplog):
    newest = stopped / "checkpoints" / "step=00000004.ckpt"
    content = newest.read_bytes()
    middle = len(content) // 2
    changed = {
        "torn": content[:middle],
        "empty": b"",
        "altered": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "zeroed": bytes(len(content)),
    }
    newest.write_bytes(changed[damage])
    (stopped / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace(stopped)[:3]))
    assert main(command(stopped, "--ckpt_path", "last")) == 0
    assert "step=00000004.ckpt is damaged" in caplog.text and "next is step=00000003.ckpt" in caplog.text
    assert newest.with_name("step=00000004.ckpt.corrupt").is_file()
    assert same(whole, stopped)


def test_when_no_checkpoint_is_whole_the_run_does_not_start_afresh(command, stopped, capsys):
    for path in step_files(stopped / "checkpoints"):
        path.write_bytes(b"")
    for _ in range(2):
        assert main(command(stopped, "--ckpt_path", "last")) == 2
        assert "no checkpoint in" in capsys.readouterr().err


def test_the_newest_checkpoint_is_the_one_of_the_latest_step_whatever_the_clock_says(stopped):
    folder = stopped / "checkpoints"
    for path in step_files(folder):
        seconds = 2e9 - 1e6 * int(path.stem[-8:])
        os.utime(path, (seconds, seconds))
    assert last_checkpoint(folder).name == "step=00000004.ckpt"


def test_a_manifest_tells_step_digest_data_and_configuration(stopped):
    manifest = json.loads(manifest_of(stopped / "checkpoints" / "step=00000004.ckpt").read_text())
    assert manifest["step"] == 4 and len(manifest["sha256"]) == 64
    assert manifest["data"]["data.dataset_path"].startswith("53 rows, ")
    assert manifest["config"]["model.lora_config.r"] == 4


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(command, stopped, tmp_path, capsys):
    evidence = tmp_path / "executed"
    torch.save({"state_dict": Payload(evidence)}, stopped / "checkpoints" / "step=00000099.ckpt")
    assert is_whole(stopped / "checkpoints" / "step=00000099.ckpt")
    assert main(command(stopped, "--ckpt_path", "last")) == 2
    assert not evidence.exists()
    assert "nothing of it was run" in capsys.readouterr().err


def test_a_full_disk_at_a_checkpoint_keeps_the_old_ones_and_is_tried_again(
    command, whole, tmp_path, monkeypatch, caplog
):
    out, plain, calls = tmp_path / "out", torch.save, []

    def save(*arguments):
        calls.append(1)
        return no_space() if len(calls) in (2, 3) else plain(*arguments)

    monkeypatch.setattr(store.torch, "save", save)
    assert main(command(out)) == 0
    assert "No space left on device" in caplog.text and "training goes on" in caplog.text
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000010.ckpt", "step=00000009.ckpt"]
    assert same(whole, out) and not list((out / "checkpoints").glob("*.tmp-*"))


def test_when_the_last_checkpoint_cannot_be_written_the_adapter_is_and_the_command_fails(
    command, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    monkeypatch.setattr(store.torch, "save", no_space)
    assert main(command(out)) == 1
    assert "the last checkpoint, step 10, could not be written" in capsys.readouterr().err
    assert same(whole, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--seed_everything", "43"], "seed_everything: 42 in the checkpoint, 43 now"),
        (["--model.lora_config.r", "8"], "model.lora_config.r: 4 in the checkpoint, 8 now"),
        (["--model.lora_config.target_modules", "[q_proj]"], "model.lora_config.target_modules"),
        (["--data.batch_size", "2"], "data.batch_size: 1 in the checkpoint, 2 now"),
        (["--data.max_length", "340"], "data.max_length: 352 in the checkpoint, 340 now"),
        (["--model.quantization_config.bnb_4bit_quant_type", "fp4"], "quant_type: nf4 in the checkpoint, fp4 now"),
        (["--model.quantization_config", "null"], "load_in_4bit: True in the checkpoint, None now"),
        (["--trainer.precision", "32-true"], "trainer.precision: bf16-mixed in the checkpoint, 32-true now"),
        (["--trainer.limit_train_batches", "4"], "trainer.limit_train_batches: None in the checkpoint, 4 now"),
        (["--model.adam_beta2", "0.95"], "model.adam_beta2: 0.999 in the checkpoint, 0.95 now"),
        (["--model.lora_plus_ratio", "4"], "model.lora_plus_ratio: 1.0 in the checkpoint, 4.0 now"),
        (["--model.kept", "int8"], "model.kept: bf16 in the checkpoint, int8 now"),
        (["--trainer.max_steps", "2"], "trainer.max_steps is 2, but the checkpoint is at"),
        (["--trainer.accumulate_grad_batches", "2"], "trainer.accumulate_grad_batches: 3 in the checkpoint, 2 now"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_difference(command, stopped, change, words, capsys):
    assert main(command(stopped, "--ckpt_path", "last", *change)) == 2
    assert words in capsys.readouterr().err


def test_changed_data_is_refused_with_the_difference(command, stopped, tmp_path, capsys):
    arguments = command(stopped, "--ckpt_path", "last")
    path = Path(arguments[arguments.index("--data.dataset_path") + 1])
    changed = tmp_path / "changed.jsonl"
    changed.write_text(path.read_text().replace("It is 7.", "It is 9.", 1))
    assert main([*arguments, "--data.dataset_path", str(changed)]) == 2
    assert "data.dataset_path: 53 rows" in capsys.readouterr().err
    same_rows = tmp_path / "elsewhere.jsonl"
    same_rows.write_text(path.read_text())
    assert main([*arguments, "--data.dataset_path", str(same_rows)]) == 0
