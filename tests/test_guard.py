"""Runs with products in 8 bits: refused where they cannot be had, guarded, and remembered by the run."""

import json
import logging

import pytest
import torch

from qwen_lit.checkpoints import trained_at
from qwen_lit.cli import main
from qwen_lit.model import adapted as adapted_file
from qwen_lit.model.products import ProductsInUse
from tests.runs import adapter, doing, scalars, trace

FP8 = ["--model.engine", "fast", "--model.products", "fp8", "--data.num_workers", "0", "--data.val_size", "0"]
EVERY = "--model.products_check_every"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.quantization_config", "null"], "the base is held in bf16, and 8-bit products are made from 4-bit"),
        (["--model.quantization_config", "{load_in_8bit: true, load_in_4bit: false}"], "the base is held in int8"),
        (["--model.engine", "reference"], "model.engine is reference, and the reference engine computes"),
        (
            ["--model.engine", "auto"],
            "there is no CUDA device, and the reference engine computes its products in bf16",
        ),
        (["--model.lora_config.use_dora", "true"], "lora_config.use_dora is set, and the reference engine"),
        (
            ["--model.products_floor", "1"],
            "model.products_floor is 1.0; it must be a cosine of at least 0 and below 1",
        ),
        (["--model.products_check_every", "-1"], "model.products_check_every is -1; it must be at least 0"),
    ],
)
def test_products_that_a_run_cannot_have_are_refused_before_the_base_is_loaded(
    command, tmp_path, options, words, capsys, monkeypatch
):
    monkeypatch.setattr(adapted_file, "load_frozen", lambda *_: pytest.fail("the base was loaded"))
    assert main(command(tmp_path / "out", *FP8, *options)) == 2
    error = capsys.readouterr().err
    assert words in error and ("model.products to bf16" in error or "must be" in error)


NOISY = ["--model.neftune_noise_alpha", "5", "--trainer.max_steps", "3"]


@pytest.fixture(scope="module")
def checked(command, tmp_path_factory):
    """Three steps with dropout and NEFTune, checked before each of them."""
    out = tmp_path_factory.mktemp("checked") / "out"
    assert main(command(out, *FP8, *NOISY, EVERY, "1", "--model.products_floor", "0")) == 0
    return out


def test_the_guard_changes_no_number_that_is_trained_and_shows_what_it_sees(command, checked, tmp_path):
    assert main(command(tmp_path / "out", *FP8, *NOISY, EVERY, "0")) == 0
    assert trace(checked) == trace(tmp_path / "out")
    left, right = adapter(checked), adapter(tmp_path / "out")
    assert all(torch.equal(left[name], value) for name, value in right.items())
    seen = scalars(checked)
    assert len(seen["train/products_cosine"]) == len(seen["train/products_error"]) == 3
    assert all(0.8 < one < 0.99999 for one in seen["train/products_cosine"])
    assert all(0.001 < one < 0.6 for one in seen["train/products_error"])
    assert "train/products_cosine" not in scalars(tmp_path / "out")


def test_a_run_tells_its_products_and_may_not_change_them(command, checked, capsys):
    run = json.loads((checked / "summary.json").read_text())["run"]
    assert run["products"].startswith("fp8; at step 3 the gradient had cosine 0.")
    for text in ((checked / "report.html").read_text("utf-8"), (checked / "lora_adapter" / "README.md").read_text()):
        assert run["products"] in text
    again = command(checked, *FP8, *NOISY, "--ckpt_path", "last")
    assert main([*again, "--model.products", "bf16"]) == 2
    assert "model.products: fp8 in the checkpoint, bf16 now" in capsys.readouterr().err


def test_a_run_of_before_the_key_has_bf16(command, stopped, capsys):
    path = next((stopped / "checkpoints").glob("step=*4.ckpt"))
    held = torch.load(path, weights_only=True)
    del held["settings"]["config"]["model"]["products"]
    torch.save(held, path)
    path.with_suffix(".json").unlink()
    assert main(command(stopped, "--model.engine", "fast", "--model.products", "fp8", "--ckpt_path", str(path))) == 2
    assert "model.products: bf16 in the checkpoint, fp8 now" in capsys.readouterr().err


def test_below_the_floor_a_run_goes_on_in_bf16_says_so_once_and_stays_there(command, tmp_path, caplog):
    out, used = tmp_path / "out", [*FP8, EVERY, "1", "--model.products_floor", "0.5"]
    spoiled = [*doing(2, "spoil_products"), "--trainer.max_steps", "3"]
    assert main(command(out, *used, *spoiled)) == 0
    said = [line.getMessage() for line in caplog.records if "below model.products_floor" in line.getMessage()]
    assert len(said) == 1 and "from step 2 on products are in bf16" in said[0]
    assert len(scalars(out)["train/products_cosine"]) == 2
    told = json.loads((out / "summary.json").read_text())["run"]["products"]
    assert told.startswith("fp8 before step 2, bf16 from there on: the gradient had cosine") and "0.5" in told
    assert told in (out / "lora_adapter" / "README.md").read_text()

    caplog.clear()
    assert main(command(out, *used, "--trainer.max_steps", "4", "--ckpt_path", "last")) == 0
    assert "products   fp8 before step 2" in caplog.text and "below model.products_floor" not in caplog.text
    assert len(scalars(out)["train/products_cosine"]) == 2
    newest = max((out / "checkpoints").glob("step=*.ckpt"))
    kept = torch.load(newest, weights_only=True)["settings"]["products"]
    assert (kept["asked"], kept["used"], kept["since"]) == ("fp8", "bf16", 2)
    # An export from the checkpoint tells it too.
    assert trained_at(newest)["products"] == told


def test_a_device_that_refuses_is_said_in_one_line_and_trains_what_bf16_does(command, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("qwen_lit.planner.choice.refusal", lambda passes, device: "its sums are wrong")
    caplog.set_level(logging.INFO)
    assert main(command(tmp_path / "out", *FP8, EVERY, "1", "--trainer.max_steps", "1")) == 0
    said = [line.getMessage() for line in caplog.records if "is not used" in line.getMessage()]
    assert said[0] == "model.products: fp8 is not used: its sums are wrong; products are in bf16"
    assert len([line for line in said if line.startswith("model.products")]) == 1
    assert "train/products_cosine" not in scalars(tmp_path / "out")
    plain = [*FP8, "--model.products", "bf16", "--trainer.max_steps", "1"]
    assert main(command(tmp_path / "plain", *plain)) == 0
    assert trace(tmp_path / "out") == trace(tmp_path / "plain")


def test_what_a_run_goes_on_with_is_what_its_checkpoint_says():
    began = ProductsInUse.of("fp8", None)
    left = began.left("too far off", 401)
    assert ProductsInUse.of("fp8", left.plain()) == left and left.products.name == "bf16"
    # validate takes what its own configuration asks for.
    assert ProductsInUse.of("int8", left.plain()) == ProductsInUse("int8", "int8")
    assert ProductsInUse.of("bf16", None).told is None
    assert str(began.left("no fp8 here")) == "bf16; fp8 is not used: no fp8 here"
