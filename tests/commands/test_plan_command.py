"""What plan prints where there is no GPU to measure on."""

import json

import pytest

from qwen_lit.cli import main


def test_without_a_gpu_the_plan_is_arithmetic_and_says_so(command, tmp_path, capsys):
    arguments = command(tmp_path / "out")[1:]
    assert main(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "no GPU is seen" in text and " 8.00 GiB" in text and "10 optimizer steps" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert main(["plan", *arguments, "--memory_budget", "1GiB", "--json", "true"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["measured"] is False and result["plans"][0]["budget_gib"] == 1.0 and result["steps"] == 10
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model.lora_config.use_dora", "true"], "lora_config.use_dora is set"),
        (["--model.lora_config.modules_to_save", "[lm_head]"], "lora_config.modules_to_save is set"),
        (["--model.lora_config.bias", "lora_only"], "is trained too"),
        (["--model.engine", "reference"], "as model.engine says"),
        (["--model.quantization_config", "{load_in_8bit: true, load_in_4bit: false}"], "is held in int8"),
        (["--model.quantization_config.llm_int8_skip_modules", "[q_proj]"], "lm_head is held in nf4"),
        (["--model.lora_config.target_modules", "[q_proj, lm_head]"], "lm_head has an adapter"),
    ],
)
def test_the_plan_tells_where_the_fast_engine_will_not_run_and_estimates_nothing_for_the_other(
    command, tmp_path, capsys, options, reason
):
    arguments = ["plan", *command(tmp_path / "out")[1:], *options]
    assert main([*arguments, "--json", "true"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["engine"].startswith("reference (") and reason in result["engine"] and result["plans"] == []
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert reason in text and "at once" not in text.split("disk")[0] and "has no arithmetic" in text


def test_a_limit_in_optimizer_steps_keeps_no_micro_batches_apart(command, tmp_path, capsys):
    options = ["--trainer.accumulate_grad_batches", "5", "--trainer.limit_train_batches", "2", "--json", "true"]
    assert main(["plan", *command(tmp_path / "out")[1:], *options, "--trainer.val_check_interval", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {plan["micro_batches_at_once"] for plan in result["plans"]} == {5}
    # 14 micro-batches an epoch, of which 10 are trained in 2 steps.
    assert result["steps"] == 4 and result["steps_per_epoch"] == 2 and result["epochs"] == 2
    assert result["tokens_per_step"] == round(result["tokens_per_epoch"] * 10 / 14 / 2)


def test_a_budget_that_nothing_fits_is_said_with_exit_code_1(command, tmp_path, capsys):
    assert main(["plan", *command(tmp_path / "out")[1:], "--memory_budget", "100MiB"]) == 1
    assert "does not fit" in capsys.readouterr().out
