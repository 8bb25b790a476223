"""What goes wrong on a long run: each fault is survived or refused, and never costs what was trained."""

import errno
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from qwen_lit.callbacks import store
from qwen_lit.callbacks.store import is_whole, last_checkpoint, manifest_of, step_files
from qwen_lit.cli import main
from qwen_lit.errors import UserError
from tests.runs import SLOW, adapter, doing, same, stopping, trace


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(out)) == 0
    return out


@pytest.fixture
def stopped(command, tmp_path) -> Path:
    """A run with checkpoints at steps 3 and 4."""
    out = tmp_path / "out"
    assert main(command(out, *stopping(4))) == 143
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000004.ckpt", "step=00000003.ckpt"]
    return out


def forked(arguments: list[str]) -> int:
    """Start a command in a child that shares this process's imports; returns its pid."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        torch.set_num_threads(1)
        os._exit(main(arguments))
    return pid


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def no_space(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


# checkpoints


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


# signals


def test_a_second_ctrl_c_ends_the_process_at_once(command, tmp_path):
    out = tmp_path / "out"
    pid = forked(command(out, "--trainer.max_epochs", "1000"))
    wait_for(out / "trace.jsonl")
    os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130


def test_sigterm_to_the_whole_process_group_leaves_the_data_workers_to_the_run(command, whole, tmp_path):
    out = tmp_path / "out"
    pid = forked(command(out, *SLOW))
    wait_for(out / "trace.jsonl")
    os.killpg(pid, signal.SIGTERM)
    assert ended(pid) == 143 and 1 <= len(trace(out)) < len(trace(whole))
    assert main(command(out, "--ckpt_path", "last")) == 0
    assert same(whole, out)


def test_sigterm_before_training_has_begun_exits_143(command, tmp_path, monkeypatch):
    from qwen_lit.model.module import QwenModule

    monkeypatch.setattr(QwenModule, "configure_model", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    assert main(command(tmp_path / "out")) == 143


def test_a_signal_during_the_export_loses_nothing(command, whole, tmp_path, monkeypatch):
    from qwen_lit.export import pipeline as export

    out, plain = tmp_path / "out", export.merge_adapter
    monkeypatch.setattr(export, "merge_adapter", lambda *a, **k: os.kill(os.getpid(), signal.SIGTERM))
    assert main([*command(out), "--export.merge", "true"]) == 143
    monkeypatch.setattr(export, "merge_adapter", plain)
    assert main([*command(out), "--export.merge", "true", "--ckpt_path", "last"]) == 0
    assert same(whole, out) and (out / "final_model" / "config.json").is_file()


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.1)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.timeout(600)
def test_a_run_killed_at_random_moments_ends_with_the_same_adapter(command, whole, tmp_path):
    out, draw, kills = tmp_path / "out", random.Random(1), 0
    options = ["--export.merge", "true", "--checkpoint.every_n_train_steps", "1", "--ckpt_path", "last"]
    while kills < 6:
        pid = forked([*command(out), *options])
        time.sleep(draw.uniform(1.0, 4.5))
        os.killpg(pid, signal.SIGKILL)
        kills += ended(pid) == -signal.SIGKILL
    assert ended(forked([*command(out), *options])) == 0
    left, right = adapter(whole), adapter(out)
    assert all(torch.equal(left[name], right[name]) for name in left)
    # A step that was trained again after a kill was trained on the same rows.
    steps = {line["step"]: line for line in trace(out)}
    assert all(line == steps[line["step"]] for line in trace(out)) and list(steps.values()) == trace(whole)


# numbers


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(command, tmp_path, what, caplog):
    out = tmp_path / "out"
    poison = ["--trainer.callbacks+=tests.runs.Poison", "--trainer.callbacks.steps=[4]",
              f"--trainer.callbacks.what={what}"]  # fmt: skip
    assert main(command(out, *poison, "--checkpoint.every_n_train_steps", "1", "--checkpoint.keep", "20")) == 0
    assert f"the {what} is not finite; the step is skipped (" in caplog.text and "rows.jsonl:" in caplog.text
    files = [out / "checkpoints" / f"step={step:08d}.ckpt" for step in (3, 4, 5)]
    states = [torch.load(file, weights_only=True)["state_dict"] for file in files]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert any(not torch.equal(states[1][name], states[2][name]) for name in states[0])


def test_too_many_such_steps_in_a_row_stop_the_run_with_the_last_good_state(command, tmp_path, capsys):
    out = tmp_path / "out"
    poison = ["--trainer.callbacks+=tests.runs.Poison", "--trainer.callbacks.steps=[5,6,7,8,9]"]
    assert main(command(out, *poison, "--model.max_skipped_steps", "3")) == 1
    assert "3 optimizer steps in a row" in capsys.readouterr().err
    state = torch.load(last_checkpoint(out / "checkpoints"), weights_only=True)["state_dict"]
    assert all(tensor.isfinite().all() for tensor in state.values())


def test_an_adapter_that_is_not_finite_is_never_saved(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command(out, *doing(4, "spoil_adapter"))) == 1
    assert "the adapter is not finite at step" in capsys.readouterr().err
    assert [path.name for path in step_files(out / "checkpoints")] == ["step=00000003.ckpt"]


# another run


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


def test_a_second_process_on_one_output_folder_is_refused(command, tmp_path, capsys):
    out = tmp_path / "out"
    pid = forked(command(out, "--trainer.max_epochs", "1000"))
    wait_for(out / "trace.jsonl")
    assert main(command(out)) == 2
    assert f"process {pid} already trains into" in capsys.readouterr().err
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    short = ["--trainer.max_epochs", "1000", "--trainer.max_time", "00:00:00:01"]
    assert main(command(out, "--ckpt_path", "last", *short)) == 0


# files


def test_an_output_folder_that_cannot_be_written_is_refused_before_any_weights_load(command, capsys):
    assert main(command(Path("/proc/qwen_lit"))) == 2
    assert "output_dir: cannot write to /proc/qwen_lit" in capsys.readouterr().err


def test_an_index_that_names_a_file_outside_the_model_folder_is_refused(command, tmp_path, model_folder, capsys):
    import shutil

    folder = shutil.copytree(model_folder, tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../../secret.safetensors"}}')
    assert main([*command(tmp_path / "out"), "--model.model_name_or_path", str(folder)]) == 2
    assert "'../../secret.safetensors', outside its folder" in capsys.readouterr().err


def test_killed_workers_end_the_run_which_then_resumes(command, whole, tmp_path, capsys):
    out = tmp_path / "out"
    # As the second epoch begins: later its last batches can all be there already.
    assert main(command(out, *doing(6, "kill_workers"))) == 1
    assert "go on with --ckpt_path last" in capsys.readouterr().err
    kept = int(last_checkpoint(out / "checkpoints").stem[-8:])
    (out / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace(out)[:kept]))
    assert main(command(out, "--ckpt_path", "last")) == 0
    assert same(whole, out)


def test_a_data_file_that_vanishes_does_not_disturb_the_run_under_way(command, whole, tmp_path, capsys):
    out, arguments = tmp_path / "out", command(tmp_path / "out")
    copy = tmp_path / "rows.jsonl"
    copy.write_text(Path(arguments[arguments.index("--data.dataset_path") + 1]).read_text())
    assert main([*arguments, "--data.dataset_path", str(copy), *doing(2, "remove_file", str(copy))]) == 0
    assert same(whole, out)
    assert main([*arguments, "--data.dataset_path", str(copy), "--ckpt_path", "last"]) == 2
    assert "no such dataset" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [0, 20])
def test_tensorboard_without_a_disk_is_a_warning(command, whole, tmp_path, monkeypatch, caplog, lines):
    from tensorboard.summary.writer.record_writer import RecordWriter

    out, plain, calls = tmp_path / "out", RecordWriter.write, []

    def write(self, data):
        calls.append(1)
        return plain(self, data) if len(calls) <= lines else no_space()

    monkeypatch.setattr(RecordWriter, "write", write)
    assert main(command(out)) == 0
    assert caplog.text.count("TensorBoard cannot write to") == 1
    assert same(whole, out)


def test_a_logs_folder_that_cannot_be_made_is_a_warning(command, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "logs").write_text("in the way")
    assert main(command(out, "--trainer.max_steps", "1")) == 0
    assert "TensorBoard cannot write to" in caplog.text


def test_a_full_disk_at_the_export_keeps_adapter_and_checkpoint(command, tmp_path, monkeypatch, capsys):
    from qwen_lit.export.folder import ShardWriter

    out, plain = tmp_path / "out", ShardWriter.write
    monkeypatch.setattr(ShardWriter, "write", no_space)
    assert main([*command(out), "--export.merge", "true"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert adapter(out) and not (out / "final_model").exists()
    monkeypatch.setattr(ShardWriter, "write", plain)
    assert main([*command(out), "--export.merge", "true", "--ckpt_path", "last"]) == 0
    assert (out / "final_model" / "config.json").is_file()


def test_the_levers_are_named_when_the_gpu_memory_is_full(command, tmp_path, monkeypatch, capsys):
    from qwen_lit.model.module import QwenModule

    def full(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(QwenModule, "loss_sum", full)
    assert main(command(tmp_path / "out")) == 1
    message = capsys.readouterr().err
    levers = ["data.batch_size 1", "gradient_checkpointing True", "memory_budget None", "data.max_length 352"]
    places = [message.index(lever) for lever in [*levers, "model.lora_config.r 4"]]
    assert places == sorted(places)


def test_a_checkpoint_file_that_is_named_must_exist():
    from qwen_lit.run import find_checkpoint

    with pytest.raises(UserError, match="no such file"):
        find_checkpoint("nowhere.ckpt", Path("."))


@pytest.mark.parametrize("room", [0, 64, 1000])
def test_a_disk_that_fills_anywhere_in_a_checkpoint_is_the_error_that_is_raised(tmp_path, monkeypatch, room):
    class Full(store._Digested):
        left = room

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(store, "_Digested", Full)
    with pytest.raises(OSError, match="No space left"):
        store.write_checkpoint({"state_dict": {"a": torch.zeros(4000)}}, tmp_path / "step=1.ckpt", {"step": 1})
    assert not list(tmp_path.iterdir())
