"""What ends a command becomes one line and an exit code."""

import json
import signal

import pytest
import torch
from jsonargparse import Namespace

from qwen_lit.cli import COMMANDS, main
from qwen_lit.errors import RunError, UserError
from qwen_lit.export import ExportError
from qwen_lit.failures import exit_code
from qwen_lit.parsing import split_command
from qwen_lit.signals import WATCHED, Interrupted, Interrupts

CONFIG = Namespace(
    data=Namespace(batch_size=4, max_length=352),
    trainer=Namespace(accumulate_grad_batches=3),
    model=Namespace(gradient_checkpointing=True, memory_budget="7GiB", engine="auto", lora_config=Namespace(r=16)),
)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("no such file: a"), 2, "error: no such file: a\n"),
        (RunError("the adapter is not finite"), 1, "error: the adapter is not finite\n"),
        (ExportError("no tensors"), 1, "error: no tensors\n"),
        (Interrupted(2), 130, ""),
        (Interrupted(15), 143, ""),
        (SystemExit(None), 0, ""),
        (SystemExit(3), 3, ""),
        (SystemExit("no"), 1, ""),
    ],
)
def test_what_is_known_is_one_line_without_a_traceback(error, code, words, capsys):
    assert exit_code(error, "fit") == code
    assert capsys.readouterr().err == words


def test_what_is_not_known_comes_with_its_traceback_and_says_whether_the_run_goes_on(capsys):
    assert exit_code(KeyError("r"), "plan") == 1
    told = capsys.readouterr().err
    assert told.startswith("KeyError") and told.endswith("error: plan failed: KeyError: 'r'\n")
    assert exit_code(KeyError("r"), "fit", lambda: True) == 1
    assert "its checkpoints are whole, resume it with --ckpt_path last" in capsys.readouterr().err


def test_memory_that_runs_out_names_the_levers_with_their_values_once_they_are_known(capsys):
    assert exit_code(torch.OutOfMemoryError("full"), "fit", config=CONFIG) == 1
    told = capsys.readouterr().err
    levers = ["data.batch_size 4", "accumulate_grad_batches 3", "memory_budget 7GiB", "model.engine auto"]
    assert all(words in told for words in [*levers, "lora_config.r 16"])
    assert "Traceback" not in told
    assert exit_code(torch.OutOfMemoryError("full"), "fit") == 1
    assert "fit failed: OutOfMemoryError: full" in capsys.readouterr().err


def test_what_is_nobodys_to_handle_goes_on():
    with pytest.raises(KeyboardInterrupt):
        exit_code(KeyboardInterrupt(), "fit")


def test_a_configuration_of_several_commands_may_stand_before_the_command(tmp_path, capsys):
    path = tmp_path / "all.yaml"
    path.write_text(json.dumps({"fit": {"output_dir": "a"}, "inspect": {"output_dir": "b"}}))
    before = ["--config", str(path)]
    for name, folder in (("fit", "a"), ("inspect", "b")):
        command, options = split_command([*before, name, "--data.batch_size", "3"], COMMANDS)
        assert command == name and options[2:] == ["--data.batch_size", "3"]
        assert options[0] == "--config" and json.loads(options[1]) == {"output_dir": folder}
    # Its first section says which command, where the command line does not; of another one nothing is taken.
    assert split_command(before, COMMANDS)[0] == "fit"
    assert split_command([*before, "plan"], COMMANDS) == ("plan", [])
    assert split_command(["fit", *before], COMMANDS) == ("fit", before)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--config", "configs/qwen7b.yaml"], "no command is given; put one of fit, validate, inspect"),
        (["--config", "configs/none.yaml", "fit"], "configs/none.yaml: cannot be read (No such file"),
        (["--config", "LICENSE", "fit"], "LICENSE: cannot be read (mapping values"),
        (["--seed_everything", "3", "fit"], "--seed_everything stands before the command; put it after."),
        (["--config"], "expected one argument"),
    ],
)
def test_what_stands_before_the_command_and_is_no_such_configuration_is_refused(given, words, capsys):
    assert main(given) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and words in told


@pytest.fixture
def handlers():
    """Puts the handlers of this process back."""
    before = {number: signal.getsignal(number) for number in WATCHED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_wait_while_they_are_deferred_and_one_of_another_rank_counts_where_none_has_come(handlers):
    interrupts = Interrupts()
    interrupts.defer()
    signal.raise_signal(signal.SIGTERM)
    interrupts.note(2)
    interrupts.release()
    with pytest.raises(Interrupted) as stop:
        interrupts.check()
    assert stop.value.exit_code == 143
    interrupts.reset()
    interrupts.check()
    interrupts.note(2)
    with pytest.raises(Interrupted) as stop:
        interrupts.check()
    assert stop.value.exit_code == 130
