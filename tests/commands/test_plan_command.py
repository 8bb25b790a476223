"""What plan prints where there is no GPU to measure on."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from transformers import Qwen2Config

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.checkpoint_io import step_files
from qwen_lit.cli import main
from qwen_lit.commands.plan import arithmetic, kept_bytes
from qwen_lit.commands.plan_text import _products, cards_of, speed_of
from qwen_lit.commands.plan_trial import StepTimer, products_told, trial
from qwen_lit.families.table import family_of
from qwen_lit.quantization import Held
from qwen_lit.run import Run

BIASED = ["--model.lora_config.lora_bias", "true", "--model.lora_config.target_modules", "[q_proj]"]
SLIDING = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}


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
def test_the_plan_tells_where_the_fast_engine_will_not_run_and_estimates_the_other(
    command, tmp_path, capsys, options, reason
):
    arguments = ["plan", *command(tmp_path / "out")[1:], *options]
    assert main([*arguments, "--json", "true"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["engine"].startswith("reference (") and reason in result["engine"] and result["plans"] == []
    assert round(sum(result["parts_bytes"].values()) / 2**30, 2) == result["estimated_peak_gib"]
    assert main(arguments) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert reason in text and "at once" not in text.split("disk")[0]
    assert f"estimated {result['estimated_peak_gib']:.2f} GiB" in text and "a card of 4 GiB has room" in text
    assert main([*arguments, "--memory_budget", "1MiB"]) == 1
    assert "which does not fit" in " ".join(capsys.readouterr().out.split())


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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--model.lora_config.trainable_token_indices", "[1, 2]"], "trainable_token_indices is set"),
        (
            ["--model.lora_config.lora_bias", "true", "--model.lora_config.target_modules", "[q_proj]"],
            "lora_bias is set",
        ),
    ],
)
def test_more_that_only_the_reference_engine_trains(command, tmp_path, capsys, options, reason):
    assert main(["plan", *command(tmp_path / "out")[1:], *options, "--json", "true"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert reason in result["engine"] and result["plans"] == []


@pytest.mark.parametrize(
    "key", [{"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, {"hidden_act": "gelu"}]
)
def test_a_base_that_only_the_reference_engine_trains(key, command, model_folder, tmp_path, capsys):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config | key))
    base = ["--model.model_name_or_path", str(folder), "--json", "true"]
    assert main(["plan", *command(tmp_path / "out")[1:], *base]) == 0
    assert json.loads(capsys.readouterr().out)["engine"].startswith("reference (")


def test_an_engine_that_cannot_be_had_is_refused_as_fit_refuses_it(command, tmp_path, capsys):
    fast = ["--model.engine", "fast", "--model.lora_config.use_dora", "true"]
    assert main(["plan", *command(tmp_path / "out")[1:], *fast]) == 2
    assert "model.engine is fast, but lora_config.use_dora is set; set it to auto." in capsys.readouterr().err


def explained(capsys, command, out, *options):
    assert main(["plan", *command(out)[1:], "--memory_budget", "1GiB", "--explain", "true", *options]) == 0
    return capsys.readouterr().out


def test_the_plan_is_explained_by_a_table_that_adds_up(command, tmp_path, capsys):
    told = json.loads(explained(capsys, command, tmp_path / "out", "--json", "true"))
    (plan,) = told["plans"]
    table = plan["explained"]
    assert round(table["estimate_bytes"] / 2**30, 2) == plan["estimated_peak_gib"]
    assert sum(table["parts_bytes"].values()) == table["estimate_bytes"]
    assert [op["name"] for op in table["layers"][0]["ops"]][:3] == ["input_layernorm", "qkv_rope", "attention"]
    text = explained(capsys, command, tmp_path / "out")
    assert all(len(line) <= 80 for line in text.splitlines())
    assert f"table       of a micro-batch of {table['tokens']:,} tokens" in text and "  sum " in text
    assert main(["plan", *command(tmp_path / "out")[1:], "--memory_budget", "1GiB"]) == 0
    assert "table " not in capsys.readouterr().out


def test_modules_that_are_not_quantised_are_planned_for_as_they_are_held(command, tmp_path, capsys):
    found = {}
    for name, skipped in (("none", "[lm_head]"), ("up_proj", "[up_proj, lm_head]")):
        keys = ["--model.quantization_config.llm_int8_skip_modules", skipped, "--json", "true"]
        found[name] = json.loads(explained(capsys, command, tmp_path / "out", *keys))["plans"][0]
    parts = {name: one["explained"]["parts_bytes"] for name, one in found.items()}
    # A matrix in bf16 takes 2 bytes a number instead of about half of one.
    assert parts["up_proj"]["weights"] > parts["none"]["weights"]
    # Weights of a layer are held dequantised as a whole or not at all.
    assert found["none"]["layers_held_in_bf16"] == 2 and found["up_proj"]["layers_held_in_bf16"] == 0


def test_a_trial_has_a_trainer_of_its_own_and_takes_the_largest_batches_first(command, tmp_path, capsys, monkeypatch):
    seen = {}

    class Tokens(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            seen.setdefault("tokens", []).append([one["tokens"] for one in batch])

    def tried(trainer, module, data, exporter, explained):
        before = dict(callbacks=list(trainer.callbacks), steps=trainer.max_steps, loggers=list(trainer.loggers))
        checkpoint = RunCheckpoint(Run(tmp_path / "trial"), 10**9)
        made = trial(trainer, [Tokens(), checkpoint], 2)
        made.fit(module, data.largest_first())
        seen["steps"], seen["files"] = made.global_step, step_files(checkpoint.run.checkpoints)
        after = dict(callbacks=list(trainer.callbacks), steps=trainer.max_steps, loggers=list(trainer.loggers))
        assert before == after and trainer.global_step == 0 and not data.heaviest_first and module.trainer is made
        return arithmetic(trainer, module, data, exporter, explained)

    monkeypatch.setattr("qwen_lit.commands.plan.arithmetic", tried)
    assert main(["plan", *command(tmp_path / "out")[1:], "--json", "true"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert seen["steps"] == 2 and len(seen["files"]) == 1 and not (tmp_path / "out").exists()
    tokens = [one for step in seen["tokens"] for one in step]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == told["heaviest_micro_batch_tokens"]


def test_a_trial_compares_the_gradient_of_products_in_8_bits_and_the_plan_prints_it(command, tmp_path, monkeypatch):
    seen = {}
    for name in ("synchronize", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)

    def tried(trainer, module, data, exporter, explained):
        timer = StepTimer()
        trial(trainer, [timer, RunCheckpoint(Run(tmp_path / "trial"), 10**9)], 2).fit(module, data.largest_first())
        seen.update(products_told(module, timer.fidelity))
        return arithmetic(trainer, module, data, exporter, explained)

    monkeypatch.setattr("qwen_lit.commands.plan.arithmetic", tried)
    fp8 = ["--model.engine", "fast", "--model.products", "fp8", "--model.products_floor", "0.5"]
    assert main(["plan", *command(tmp_path / "out")[1:], *fp8]) == 0
    assert (seen["told"], seen["floor"]) == ("fp8", 0.5) and 0.8 < seen["cosine"] < 0.99999 and seen["error"] > 0.001
    said = _products(seen)
    assert said.startswith(f"fp8: the gradient of a micro-batch has cosine {seen['cosine']:.4f} with that in bf16")
    assert said.endswith("the floor is 0.5") and "would go on in bf16" in _products(seen | {"floor": 0.99999})


def test_the_plan_says_how_much_an_adapter_reaches(command, tmp_path, capsys):
    lora = "--model.lora_config."
    only = [f"{lora}target_modules", "[q_proj, up_proj]", f"{lora}layers_to_transform", "[1]"]
    assert main(["plan", *command(tmp_path / "out")[1:], *only]) == 0
    assert "adapter     1 of 2 layers, 2 of 14 linears adapted\n" in capsys.readouterr().out


def test_a_vision_tower_in_the_files_is_counted_where_the_merged_model_is_written(command, model_folder, tmp_path):
    from qwen_lit.hub import stored_bytes

    folder = tmp_path / "indexed"
    folder.mkdir()
    assert stored_bytes(folder) == 0
    assert stored_bytes(model_folder) == (model_folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 77}, "weight_map": {}}')
    assert stored_bytes(folder) == 77


def test_the_advice_to_pack_is_a_command_that_is_typed_as_it_is(command, tmp_path, capsys):
    given = [*command(tmp_path / "out")[1:], "--data.packing", "false"]
    assert main(["plan", *given, "--memory_budget", "1GiB"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("qwen-lit fit"))
    end = next(number for number in range(at, len(lines)) if not lines[number].endswith("\\"))
    words = shlex.split("\n".join(lines[at : end + 1]).replace("\\\n", " "))
    assert words[:2] == ["qwen-lit", "fit"] and [words[words.index("--output_dir") + 1]] == [str(tmp_path / "out")]
    assert words[-6:-2] == ["--data.packing", "true", "--data.batch_size", "1"] and words.count("--data.packing") == 1
    assert "--memory_budget" not in words


def test_a_plan_on_several_cards_tells_the_speed_of_all_and_of_one():
    one = {"tokens_per_second": 100, "limit_tokens_per_second": 200, "cards": 1}
    two = one | {"cards": 2, "tokens_per_second_per_card": 50}
    assert (speed_of(one), cards_of(one)) == ("100 tokens/s", "this card")
    assert (speed_of(two), cards_of(two)) == ("100 tokens/s (50 a card)", "these 2 cards")


def test_the_file_that_keeps_the_base_counts_as_disk():
    config = Qwen2Config(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_key_value_heads=4)
    config.num_attention_heads = 28
    held = {
        f"model.layers.{number}.{one.weight}": Held("nf4", 64, True)
        for number, layer in enumerate(family_of(config).layers(config))
        for one in layer.linears
    }
    found = {
        (cache, device): kept_bytes(
            SimpleNamespace(config=config, settings=SimpleNamespace(base_cache=cache)), held, torch.device(device)
        )
        for cache in ("auto", "folder", None)
        for device in ("cuda", "cpu")
    }
    assert found["auto", "cuda"] == found["folder", "cpu"] == pytest.approx(3.37e9, rel=0.01)
    assert found["auto", "cpu"] == found[None, "cuda"] == 0
