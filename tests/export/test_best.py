"""What is exported of a run whose best validation is not its last."""

import json
import shlex
from pathlib import Path

import pytest
import torch

from qwen_lit.callbacks.as_trained import holding
from qwen_lit.cli import main
from tests.runs import adapter, doing

BEST = ["--export.checkpoint", "best"]
WORSE = doing(7, "worsen_validation")
"""Of the validations at steps 5 and 10 the first is the best."""


def state(path: Path) -> dict[str, torch.Tensor]:
    found = torch.load(path, weights_only=True)["state_dict"]
    return {name.removeprefix("model.").replace(".default", ""): tensor for name, tensor in found.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def run(command, tmp_path_factory):
    """A run that has exported its best step."""
    out = tmp_path_factory.mktemp("best") / "out"
    assert main(command(out, *WORSE, *BEST, "--export.merge", "true", "--export.smoke_rows", "1")) == 0
    return out


def test_the_best_step_is_exported_measured_and_named_everywhere(run):
    assert equal(adapter(run), state(run / "checkpoints" / "best.ckpt"))
    summary = json.loads((run / "summary.json").read_text())
    best = summary["best"]
    assert best["step"] == 5 and best["val_loss"] < summary["last"]["val_loss"] and summary["last"]["step"] == 10
    assert summary["exported"] == {"checkpoint": "best", **best}
    assert json.loads((run / "lora_adapter" / "trained_at.json").read_text()) == summary["exported"]
    # Both measure the adapter on the same six rows.
    assert summary["verdict"]["adapter_loss"] == pytest.approx(best["val_loss"], abs=0.002)
    told = f"optimizer step 5, the best of the run by validation loss; validation loss {best['val_loss']:.4f}"
    for folder in ("final_model", "lora_adapter"):
        assert told in (run / folder / "README.md").read_text("utf-8")
    page = (run / "report.html").read_text("utf-8")
    assert f"5, validation loss {best['val_loss']:.4f}" in page and "step 5, the best" in page


def test_exporting_the_best_leaves_the_run_at_its_last_step(run, command, tmp_path):
    last = tmp_path / "last"
    assert main(command(last, *WORSE)) == 0
    name = "checkpoints/step=00000010.ckpt"
    assert equal(state(run / name), state(last / name)) and equal(adapter(last), state(last / name))
    assert json.loads((last / "summary.json").read_text())["exported"]["checkpoint"] == "last"
    assert main(["export", *command(last)[1:], *BEST]) == 0
    assert equal(adapter(last), state(last / "checkpoints" / "best.ckpt"))
    # As it is, where nothing else is asked for.
    assert main(["export", *command(last)[1:], "--export.merge", "true"]) == 0
    assert "optimizer step 5, the best" in (last / "final_model" / "README.md").read_text("utf-8")


def test_an_adapter_of_the_best_step_needs_no_checkpoint_to_be_exported_again(run, command, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "lora_adapter").symlink_to(run / "lora_adapter")
    assert main(["export", *command(out)[1:], *BEST]) == 0
    (out / "lora_adapter").unlink()
    assert main(["export", *command(out)[1:], *BEST]) == 2
    assert "export.checkpoint: there is no best.ckpt in" in capsys.readouterr().err


def test_weights_that_are_lent_are_given_back_bit_for_bit():
    module = torch.nn.Linear(3, 2)
    own = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {name: torch.full_like(tensor, 7.0) for name, tensor in own.items()}
    with pytest.raises(OSError), holding(module, other):
        assert equal(dict(module.state_dict()), other)
        raise OSError
    assert equal(dict(module.state_dict()), own)
    with holding(module, None):
        assert equal(dict(module.state_dict()), own)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--data.val_size", "0"], "no rows are held out; set data.val_size or data.val_dataset_path, or export."),
        (["--trainer.limit_val_batches", "0"], "trainer.limit_val_batches is 0; leave it out, or export.checkpoint"),
        (["--trainer.check_val_every_n_epoch", "3"], "nothing is validated; lower the first, or export.checkpoint"),
        (["--data.val_size", "1e-18", "--data.dataset_path", "few.jsonl"], "data.val_size holds out no row"),
    ],
)
def test_the_best_of_no_validation_is_refused_before_anything_loads(
    command, tmp_path, capsys, monkeypatch, options, words
):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(json.dumps({"instruction": f"{n}", "output": "a"}) + "\n" for n in range(3)))
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *_: pytest.fail("the model was loaded"))
    options = [str(few) if one == few.name else one for one in options]
    assert main(command(tmp_path / "out", *BEST, *options)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: export.checkpoint is best, but ") and words in error


@pytest.mark.parametrize(
    ("does", "reason"),
    [("remove_file", "is not there"), ("damage_file", "is damaged"), ("", "no validation has come")],
)
def test_a_best_checkpoint_that_is_lost_leaves_the_last_adapter_and_the_command_that_exports_it(
    command, tmp_path, capsys, does, reason
):
    out = tmp_path / "out"
    options = doing(8, does, str(out / "checkpoints" / "best.ckpt")) if does else ["--trainer.max_steps", "3"]
    run = command(out, *WORSE * bool(does), *options, *BEST, "--export.merge", "true", "--export.smoke_rows", "0")
    assert main(run) == 1
    (line,) = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error:")]
    assert "not exported: the best checkpoint (" in line and reason in line and "lora_adapter/ is of the last" in line
    last = max((out / "checkpoints").glob("step=*.ckpt"))
    assert equal(adapter(out), state(last)) and not (out / "final_model").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exported"]["checkpoint"] == "last" and "the best checkpoint" in summary["export"]["missing"]
    assert main(shlex.split(line.partition("python -m qwen_lit ")[2])) == 0
    assert (out / "final_model" / "model.safetensors").is_file()
