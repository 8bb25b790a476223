"""Wrong keys are told all at once, each in a line with its place and the key that was meant."""

import os
import signal
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback

from qwen_lit import front, help
from qwen_lit.cli import QwenCLI, main
from qwen_lit.errors import UserError
from qwen_lit.keys import ALIASES, REMOVED, nearest, wrong_keys
from qwen_lit.model.resume import compare

QWEN7B = str(Path("configs/qwen7b.yaml").absolute())
KEYS = help.keys_of(help.load(), "fit")


def told(args: list[str], capsys) -> list[str]:
    assert main(["fit", "--config", QWEN7B, *args]) == 2
    return capsys.readouterr().err.splitlines()


def test_those_of_the_command_line_and_of_every_file_are_told_together(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(
        "lora_rank: 8\nmodel: {lr: 1e-4, lora_config: {rank: 4, r: 4}, quantization_config: {load_in_3bit: true}}\n"
        "data: {cutoff_len: 512, packing: true}\ntrainer: {max_epoch: 2}\n"
    )
    Path("lora.yaml").write_text("r: 4\nalpha: 8\n")
    args = ["--config=run.yaml", "--model.lora_config", "lora.yaml", "--data", "{batch: 3}", "--model.lr", "1e-4"]
    assert told(args, capsys) == [
        "error: run.yaml: there is no key lora_rank; did you mean model.lora_config.r?",
        "error: run.yaml: there is no key model.lr; did you mean model.learning_rate?",
        "error: run.yaml: there is no key model.lora_config.rank; did you mean model.lora_config.r?",
        "error: run.yaml: there is no key model.quantization_config.load_in_3bit; "
        "did you mean model.quantization_config.load_in_8bit?",
        "error: run.yaml: there is no key data.cutoff_len; did you mean data.max_length?",
        "error: run.yaml: there is no key trainer.max_epoch; did you mean trainer.max_epochs?",
        "error: lora.yaml: there is no key model.lora_config.alpha; did you mean model.lora_config.lora_alpha?",
        "error: there is no key data.batch; did you mean data.batch_size?",
        "error: there is no key model.lr; did you mean model.learning_rate?",
    ]


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("learning_rate", "model.learning_rate"),
        ("model.max_length", "data.max_length"),
        ("data.dataset_pth", "data.dataset_path"),
        ("trainer.num_train_epochs", "trainer.max_epochs"),
        ("per_device_train_batch_size", "data.batch_size"),
        ("trainer.seed", "seed_everything"),
        ("gradient_accumulation_steps", "trainer.accumulate_grad_batches"),
        ("outputdir", "output_dir"),
        ("model.lora_alpha", "model.lora_config.lora_alpha"),
        ("zzz", None),
    ],
)
def test_the_nearest_key_is_named(key, meant):
    assert nearest(key, KEYS) == meant


def test_every_name_of_another_trainer_leads_to_a_key_of_ours():
    for name, key in ALIASES.items():
        assert key in KEYS or any(one.startswith(key + ".") for one in KEYS), name
        assert name not in {one.rpartition(".")[2] for one in KEYS}, name


@pytest.mark.parametrize("key", REMOVED)
def test_a_key_that_once_was_is_told_with_what_does_its_work(key, tmp_path, capsys):
    assert key not in KEYS
    section, _, last = key.rpartition(".")
    (tmp_path / "run.yaml").write_text(f"{section}:\n  {last}: true\n")
    lines = told(["--config", str(tmp_path / "run.yaml"), f"--{key}", "false"], capsys)
    text = f"there is no key {key} any more, leave it out: {REMOVED[key]}"
    assert lines == [f"error: {tmp_path}/run.yaml: {text}", f"error: {text}"]


@pytest.mark.parametrize(("value", "told"), [(True, True), (False, False)])
def test_a_resumed_run_that_set_it_is_told_and_not_refused(value, told, caplog):
    compare({"config": {"model": {"shard_base": value, "engine": "auto"}}}, {"model": {"engine": "auto"}}, None)
    assert ("model.shard_base was True until here, and there is no such key any more: " in caplog.text) == told


def test_part_of_a_key_is_no_key(capsys):
    assert told(["--data.pack", "true"], capsys) == ["error: there is no key data.pack; did you mean data.packing?"]


@pytest.mark.parametrize(
    "args",
    [
        ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/loss"],
        ["--trainer.callbacks.init_args.monitor", "x", "--trainer.logger.init_args.save_dir=y"],
        ["--data.fields.instruction", "question", "--data.dataset_path+=a", "--samples.prompts+", "-- what?"],
        ["--print_config=comments", "--trainer.callbacks.help=EarlyStopping", "--model.learning_rate"],
        ["--model.learning_rate", "1", "--model.learning_rate=2", "--model.quantization_config", "null"],
        ["--config", "no.yaml", "--data", "no.yaml", "--model", "{", "--model.lora_config.runtime_config", "{}"],
    ],
)
def test_what_the_parser_understands_is_left_to_it(args):
    assert wrong_keys(args, KEYS, KEYS) == []


def test_a_list_that_a_file_adds_to_is_its_key_and_a_name_too_long_for_a_file_no_crash(tmp_path):
    (tmp_path / "more.yaml").write_text("trainer:\n  callbacks+:\n  - class_path: EarlyStopping\n")
    assert not wrong_keys(["--config", str(tmp_path / "more.yaml")], KEYS, KEYS)
    assert not wrong_keys(["--config", "a" * 300, "--data", "/" + "a" * 300 + ".yaml"], KEYS, KEYS)


def test_what_comes_through_a_pipe_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert wrong_keys(["--config", str(tmp_path / "pipe.yaml")], KEYS, KEYS) == []


def test_keys_of_a_library_of_another_version_are_judged_by_the_one_that_is_installed(monkeypatch, capsys):
    monkeypatch.setattr(front, "version", lambda package: "0.0")
    assert not {"trainer.max_epochs", "model.lora_config.r"} & front.known_keys(help.load(), "fit")
    assert told(["--trainer.max_epoch", "3", "--trainer.devises=1", "--model.lora_config.rank=3"], capsys) == [
        "error: there is no key trainer.max_epoch; did you mean trainer.max_epochs?",
        "error: there is no key trainer.devises; did you mean trainer.devices?",
        "error: there is no key model.lora_config.rank; did you mean model.lora_config.r?",
    ]


def test_a_new_key_of_such_a_library_is_taken(monkeypatch, capsys):
    def stop(self) -> None:
        raise UserError("parsed")

    monkeypatch.setattr(front, "version", lambda package: "0.0")
    monkeypatch.setattr(QwenCLI, "before_instantiate_classes", stop)
    keys = [key for key in KEYS if key not in ("trainer.max_epochs", "model.lora_config.r")]
    monkeypatch.setattr(help, "keys_of", lambda *_: keys)
    assert told(["--trainer.max_epochs", "3", "--model.lora_config.r", "3"], capsys) == ["error: parsed"]


class Signalled(Callback):
    """Its default is no plain value."""

    def __init__(self, step: int = 1, signum: int = signal.SIGTERM) -> None: ...


def test_an_argument_that_no_configuration_file_can_hold_is_the_user_s_to_change(arguments, capsys):
    assert main([*arguments, f"--trainer.callbacks+={__name__}.Signalled", "--trainer.callbacks.step=2"]) == 2
    error = capsys.readouterr().err
    assert "error: configuration: config.yaml cannot hold it" in error and "<Signals.SIGTERM: 15>" in error
    assert "Traceback" not in error
