"""What goes wrong on a long run: each fault is survived or refused, and never costs what was trained."""

import errno
import json
from pathlib import Path

import pytest
import torch

from qwen_lit.callbacks import checkpoint_io as store
from qwen_lit.callbacks.checkpoint_io import last_checkpoint, step_files
from qwen_lit.cli import main
from qwen_lit.errors import UserError
from tests.runs import WORKERS, adapter, doing, no_space, same, trace


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_its_rows_named(command, tmp_path, what, caplog):
    out = tmp_path / "out"
    poison = [
        "--trainer.callbacks+=tests.runs.Poison",
        "--trainer.callbacks.steps=[4]",
        f"--trainer.callbacks.what={what}",
    ]
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
    assert main(command(out, *WORKERS, *doing(6, "kill_workers"))) == 1
    assert "resume it with --ckpt_path last" in capsys.readouterr().err
    kept = int(last_checkpoint(out / "checkpoints").stem[-8:])
    (out / "trace.jsonl").write_text("".join(json.dumps(line) + "\n" for line in trace(out)[:kept]))
    assert main(command(out, *WORKERS, "--ckpt_path", "last")) == 0
    assert same(whole, out)


def test_a_data_file_that_vanishes_does_not_disturb_the_run_under_way(command, whole, tmp_path, capsys):
    out, arguments = tmp_path / "out", command(tmp_path / "out", *WORKERS)
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
    from qwen_lit.checkpoints import find_checkpoint
    from qwen_lit.run import Run

    with pytest.raises(UserError, match="no such file"):
        find_checkpoint("nowhere.ckpt", Run(Path(".")))


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
