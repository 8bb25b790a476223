"""A batch is an optimizer step: how it is cut into passes and at which precision changes nothing that is learnt."""

import json

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from qwen_lit import cli, hardware
from qwen_lit.callbacks.checkpoint_io import write_checkpoint
from qwen_lit.cli import main
from qwen_lit.data.batches import join
from qwen_lit.model import adapted as adapted_file
from qwen_lit.model import module as module_file
from qwen_lit.model.graphs import Graphs
from qwen_lit.model.module import QwenModule
from tests.model.test_recording import Recorder
from tests.runs import Gradients, Modes, adapter, same, scalars, stopping, trace


@pytest.fixture
def exact(monkeypatch):
    """Options of a run in float32 without dropout."""
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    return ["--model.quantization_config", "null", "--model.lora_config.lora_dropout", "0"]


@pytest.mark.parametrize(("at_once", "passes"), [(3, [3, 3, 2, 3, 3]), (5, [5, 3, 5, 1]), (8, [8, 6])])
def test_any_number_of_micro_batches_at_once_learns_what_one_by_one_does(
    command, tmp_path, monkeypatch, exact, at_once, passes
):
    made: list[int] = []
    monkeypatch.setattr(Gradients, "kept", [])
    monkeypatch.setattr(
        module_file, "join", lambda parts: (made.append(len(parts)) if torch.is_grad_enabled() else 0) or join(parts)
    )
    alone, together = tmp_path / "alone", tmp_path / "together"
    # Of 14 micro-batches an epoch the second step has six, and each step is validated.
    options = [*exact, "--model.engine", "fast", "--trainer.accumulate_grad_batches", "8", "--trainer.max_epochs", "1"]
    options += ["--trainer.limit_train_batches", "2", "--trainer.val_check_interval", "1"]
    options += ["--trainer.callbacks+=tests.runs.Gradients"]
    assert main(command(alone, *options)) == 0
    assert made == [1] * 14
    monkeypatch.setattr(QwenModule, "micro_batches_at_once", property(lambda self: at_once))
    assert main(command(together, *options)) == 0
    assert made[14:] == passes

    expected, found = trace(alone), trace(together)
    assert [line["rows"] for line in found] == [line["rows"] for line in expected] and len(found) == 2
    for line, other in zip(expected, found, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert scalars(alone)["val/loss"] == pytest.approx(scalars(together)["val/loss"], rel=1e-6)
    assert len(Gradients.kept) == 4
    for one, other in ((0, 2), (1, 3)):
        for name, gradient in Gradients.kept[one].items():
            assert torch.allclose(Gradients.kept[other][name], gradient, rtol=1e-4, atol=1e-6), name
    for name, weight in adapter(alone).items():
        assert torch.allclose(adapter(together)[name], weight, rtol=1e-4, atol=1e-6), name


def test_validation_counts_every_micro_batch_however_many_are_computed_at_once(command, tmp_path, monkeypatch, exact):
    counted, plain = [], QwenModule.on_validation_epoch_end

    def note(self):
        counted.append((self.validated.tolist(), int(self.data.val_rows.column("supervised").sum())))
        plain(self)

    monkeypatch.setattr(QwenModule, "on_validation_epoch_end", note)
    # Several steps of eight micro-batches, and a last one that is not full.
    options = [*exact, "--data.val_size", "30", "--data.packing", "false", "--data.batch_size", "1"]
    options += ["--data.num_workers", "0", "--model.engine", "fast", "--trainer.accumulate_grad_batches", "8"]
    for at_once in (1, 3, 8):
        monkeypatch.setattr(QwenModule, "micro_batches_at_once", property(lambda self, count=at_once: count))
        assert main(["validate", *command(tmp_path / "out", *options)[1:]]) == 0
    (first, held_out), *others = counted
    assert first[1] == held_out > 0 and len(others) == 2
    for found, _ in others:
        assert found[1] == held_out and found[0] == pytest.approx(first[0], rel=1e-6)


def test_a_run_that_goes_on_tells_the_planner_how_many_were_computed_at_once(command, tmp_path, monkeypatch, caplog):
    told = []
    plain = adapted_file.choose_engine
    monkeypatch.setattr(adapted_file, "choose_engine", lambda *given: told.append(given[3:]) or plain(*given))
    monkeypatch.setattr(QwenModule, "micro_batches_at_once", property(lambda self: 2))
    out, short = tmp_path / "out", ["--data.num_workers", "0", "--data.val_size", "0", "--export.merge", "false"]
    assert main(command(out, *short, "--trainer.max_steps", "1")) == 0
    assert main(command(out, *short, "--trainer.max_steps", "2", "--ckpt_path", "last")) == 0
    with caplog.at_level("WARNING"):
        changed = [*short, "--trainer.max_steps", "3", "--ckpt_path", "last", "--model.graphs", "off"]
        assert main(command(out, *changed)) == 0
    assert told == [(None, None), (2, 0), (2, None)]
    assert "model.graphs was auto until here, and is off from here on" in caplog.messages


def test_a_run_by_graphs_learns_what_one_without_does_and_is_resumed_bit_for_bit(
    command, tmp_path, monkeypatch, exact
):
    used: list[Recorder] = []

    def graphs(engine, plan):
        return Graphs(engine, 512, 100, lambda tokens: 1, lambda: used.append(Recorder()) or used[-1])

    options = [*exact[:2], "--model.engine", "fast", "--trainer.max_steps", "4", "--data.num_workers", "0"]
    options += ["--export.merge", "false", "--data.val_size", "0"]
    plain, whole, parts = (tmp_path / name for name in ("plain", "whole", "parts"))
    assert main(command(plain, *options)) == 0
    monkeypatch.setattr(adapted_file, "graphs_of", graphs)
    assert main(command(whole, *options)) == 0
    # Most shapes come more than once, and some not.
    assert used[0].runs
    panels = [json.loads((out / "summary.json").read_text())["throughput"] for out in (plain, whole)]
    assert panels[0]["fill"] == 1 and 0.1 < panels[1]["fill"] < 1
    for line, other in zip(trace(plain), trace(whole), strict=True):
        assert line["rows"] == other["rows"] and line["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert main(command(parts, *options, *stopping(3))) == 143
    assert main(command(parts, *options, "--ckpt_path", "last")) == 0
    assert same(whole, parts)


@pytest.mark.parametrize("engine", ["fast", "reference"])
def test_padding_is_computed_on_peft_s_path_alone_and_counted(command, tmp_path, exact, engine):
    padded = ["--data.packing", "false", "--data.batch_size", "4", "--trainer.max_steps", "2"]
    assert main(command(tmp_path / "out", *exact, *padded, "--model.engine", engine)) == 0
    panel = json.loads((tmp_path / "out" / "summary.json").read_text())["throughput"]
    assert panel["fill"] == 1 if engine == "fast" else 0.5 < panel["fill"] < 1


@pytest.mark.parametrize(("algorithm", "most"), [("value", 1e-4), ("norm", 0.01)])
def test_the_gradient_is_clipped_by_its_norm_or_by_each_value(command, tmp_path, monkeypatch, exact, algorithm, most):
    clipped = []
    plain = torch.optim.AdamW.step

    def step(self, closure):
        # It calls the hooks in which the module clips.
        closure()
        found = [p.grad.flatten().clone() for group in self.param_groups for p in group["params"]]
        clipped.append(torch.cat(found))
        return plain(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    options = [*exact, "--model.optimizer", "adamw", "--trainer.max_steps", "1"]
    options += ["--trainer.gradient_clip_algorithm", algorithm, "--trainer.gradient_clip_val", str(most)]
    assert main(command(tmp_path / "out", *options)) == 0
    (gradient,) = clipped
    found = gradient.abs().max() if algorithm == "value" else gradient.norm()
    assert float(found) == pytest.approx(most, rel=1e-3)
    assert scalars(tmp_path / "out")["train/grad_norm"][0] > 2 * most


def test_a_checkpoint_of_a_version_that_counted_micro_batches_is_refused_with_the_way_out(
    command, stopped, tmp_path, capsys, monkeypatch
):
    path = stopped / "checkpoints" / "step=00000004.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["settings"]["merge"] = checkpoint["settings"].pop("micro_batches_at_once")
    write_checkpoint(checkpoint, path, {"step": 4})
    with monkeypatch.context() as patch:
        patch.setattr(adapted_file, "load_frozen", lambda *_: pytest.fail("the model was loaded"))
        assert main(command(stopped, "--ckpt_path", "last")) == 2
    error = capsys.readouterr().err
    assert "an earlier version of qwen_lit wrote this checkpoint" in error and "set model.init_adapter" in error
    begun = command(tmp_path / "new", "--model.init_adapter", str(path), "--trainer.max_steps", "1")
    assert main(begun) == 0


def test_what_a_bf16_model_logs_is_not_rounded_to_bf16(command, tmp_path):
    options = ["--trainer.precision", "bf16-true", "--trainer.max_steps", "3", "--model.lr_scheduler", "constant"]
    options += ["--model.learning_rate", "0.0001001", "--model.warmup_ratio", "0"]
    assert main(command(tmp_path / "out", *options)) == 0
    assert scalars(tmp_path / "out")["train/lr"] == pytest.approx([0.0001001] * 3, rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**10, 2.0**80])
def test_a_scaled_fp16_loss_is_unscaled_before_it_is_judged_and_an_overflow_is_skipped(
    command, tmp_path, exact, monkeypatch, caplog, scale
):
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    options = [*exact, "--trainer.max_steps", "2"]
    if scale == 2.0**10:
        assert main(command(plain, *options)) == 0
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    monkeypatch.setattr(
        cli, "compute_in_float32", lambda trainer: setattr(trainer.strategy, "precision_plugin", plugin)
    )
    assert main(command(scaled, *options)) == 0
    right = scalars(scaled)
    if scale == 2.0**10:
        left = scalars(plain)
        assert right["train/skipped_steps"] == [0, 0] and scaler.get_scale() == scale
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-2)
        assert left["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=5e-2)
    else:
        assert right["train/skipped_steps"] == [1, 2] and scaler.get_scale() == scale / 4
        assert "the gradient is not finite; the step is skipped (" in caplog.text
        assert not any(weight.any() for name, weight in adapter(scaled).items() if "lora_B" in name)


def test_autocast_holds_for_the_forward_pass_alone(command, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: True)
    monkeypatch.setattr(Modes, "seen", {})
    options = ["--trainer.callbacks+=tests.runs.Modes", "--trainer.max_steps", "1", "--model.optimizer", "adamw"]
    assert main(command(tmp_path / "out", *options)) == 0
    assert Modes.seen == {"forward": True, "backward": False, "step": False}
