"""What an adapter was trained with is what it is exported, asked, measured and trained on with."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qwen_lit.callbacks.checkpoint_io import last_checkpoint
from qwen_lit.cli import main
from tests.runs import adapter
from tests.test_run import content


@pytest.fixture(scope="module")
def arguments_of(model_folder, dataset):
    def make(out: Path, *options: str) -> list[str]:
        return [
            "fit",
            "--config",
            "configs/qwen7b.yaml",
            "--output_dir",
            str(out),
            "--data.val_size",
            "5",
            "--model.model_name_or_path",
            str(model_folder),
            "--data.dataset_path",
            str(dataset),
            "--data.batch_size",
            "3",
            "--trainer.accelerator",
            "cpu",
            "--trainer.max_epochs",
            "1",
            "--trainer.accumulate_grad_batches",
            "3",
            "--trainer.enable_progress_bar",
            "false",
            "--model.lora_config.r",
            "4",
            "--model.lora_config.lora_alpha",
            "8",
            "--model.learning_rate",
            "0.005",
            "--model.quantization_config.bnb_4bit_use_double_quant",
            "false",
            *options,
        ]

    return make


OTHER = [
    "--model.lora_config.r",
    "8",
    "--model.lora_config.lora_alpha",
    "640",
    "--model.lora_config.use_rslora",
    "true",
    "--model.quantization_config",
    "null",
]


@pytest.fixture(scope="module")
def run(arguments_of, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert main(arguments_of(out)) == 0
    return out


@pytest.mark.parametrize("source", ["last", "best", "adapter"])
def test_an_export_takes_the_settings_from_what_was_trained_and_tells_the_difference(
    run, arguments_of, source, caplog, tmp_path
):
    path = {"last": "last", "best": "best", "adapter": str(run / "lora_adapter")}[source]
    wanted = content(run / "final_model")["model.safetensors"]
    config = json.loads((run / "lora_adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert main(["export", *arguments_of(run)[1:], *OTHER, "--ckpt_path", path]) == 0
    assert "model.lora_config.lora_alpha: trained with 8, the configuration says 640" in caplog.text
    assert "model.quantization_config.load_in_4bit: trained with True" in caplog.text
    assert content(run / "final_model")["model.safetensors"] == wanted
    again = json.loads((run / "lora_adapter" / "adapter_config.json").read_text())
    assert (again["r"], again["lora_alpha"], again["use_rslora"]) == (4, 8, False)
    card = (run / "final_model" / "README.md").read_text()
    assert "r=4, alpha=8" in card and "--max-lora-rank 8" in card


def test_predict_and_validate_use_what_was_trained_and_write_nothing_of_the_run(
    run, arguments_of, tmp_path, caplog, capsys
):
    source = tmp_path / "questions.jsonl"
    source.write_text(json.dumps({"instruction": "What is 1 plus 2?"}) + "\n")
    before, answers, losses = content(run), [], []
    for number, options in enumerate([[], ["--ckpt_path", "last"], ["--ckpt_path", "last", *OTHER]]):
        target = str(tmp_path / f"answers{number}.jsonl")
        more = ["--source", str(source), "--target", target, "--max_new_tokens", "8"]
        assert main(["predict", *arguments_of(run)[1:], *options, *more]) == 0
        answers.append(Path(target).read_text())
    assert answers[0] == answers[1] == answers[2]
    capsys.readouterr()
    for options in (["last"], ["last", *OTHER], [str(run / "lora_adapter"), *OTHER]):
        assert main(["validate", *arguments_of(run)[1:], "--ckpt_path", *options]) == 0
        losses.append(next(line for line in capsys.readouterr().out.splitlines() if "val/loss" in line))
    assert len(set(losses)) == 1
    assert main(["validate", *arguments_of(run)[1:]]) == 0
    assert "val/loss" in (said := capsys.readouterr().out) and losses[0] not in said
    assert "validate measures the base" in caplog.text
    assert content(run) == before
    assert main(["validate", *arguments_of(run)[1:], "--data.val_size", "0"]) == 2
    assert "set data.val_size" in capsys.readouterr().err


def test_another_base_is_told_or_refused(run, arguments_of, tmp_path, model_folder, caplog, capsys):
    import shutil

    moved, other = shutil.copytree(model_folder, tmp_path / "moved"), shutil.copytree(model_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    from safetensors.torch import save_file

    save_file({name: tensor + 1 for name, tensor in weights.items()}, other / "model.safetensors", {"format": "pt"})
    fit = arguments_of(run)
    for base, code in ((moved, 0), (other, 2)):
        assert main([*fit, "--ckpt_path", "last", "--model.model_name_or_path", str(base)]) == code
    assert "model.model_name_or_path:" in capsys.readouterr().err
    assert main(["export", *fit[1:], "--model.model_name_or_path", str(other), "--ckpt_path", "last"]) == 0
    assert f", not on {other}; " in caplog.text
    new = arguments_of(tmp_path / "new", "--model.init_adapter", str(run), "--model.model_name_or_path", str(other))
    assert main(new) == 2
    assert "start from an adapter of the same base" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        [],
        [
            "--model.lora_config.use_dora",
            "true",
            "--model.lora_config.modules_to_save",
            "[lm_head]",
            "--model.lora_config.rank_pattern",
            "{q_proj: 2}",
        ],
    ],
)
def test_a_new_run_starts_from_an_adapter_with_a_fresh_schedule(arguments_of, tmp_path, options, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(arguments_of(first, *options, "--export.merge", "false")) == 0
    still = ["--model.learning_rate", "1e-30", "--export.merge", "false"]
    for start in (first / "lora_adapter", last_checkpoint(first / "checkpoints")):
        out = tmp_path / f"from-{start.name}"
        assert main(arguments_of(out, *still, *options, "--model.init_adapter", str(start))) == 0
        assert all(torch.equal(tensor, adapter(first)[name]) for name, tensor in adapter(out).items())
    more = ["--model.init_adapter", str(first / "lora_adapter"), *options]
    assert main(arguments_of(second, *more)) == 0
    config = json.loads((second / "lora_adapter" / "training_config.json").read_text())
    assert config["model"]["init_adapter"] == str(first / "lora_adapter")
    summary = json.loads((second / "summary.json").read_text())
    assert summary["run"]["init_adapter"] == str(first / "lora_adapter") and summary["resumed_at"] == []
    assert f"trained on from `{first / 'lora_adapter'}`" in (second / "final_model" / "README.md").read_text()
    assert not all(torch.equal(tensor, adapter(first)[name]) for name, tensor in adapter(second).items())
    (first / "lora_adapter").rename(tmp_path / "gone")
    trained = adapter(second)
    assert main(arguments_of(second, *more, "--ckpt_path", "last")) == 0
    assert all(torch.equal(tensor, trained[name]) for name, tensor in adapter(second).items())


def test_an_adapter_that_cannot_be_started_from_is_refused(run, arguments_of, tmp_path, capsys):
    start = ["--model.init_adapter", str(run / "lora_adapter")]
    for options, words in (
        ([*start, "--model.lora_config.r", "16"], "model.lora_config.r is 16, but the adapter"),
        ([*start, "--model.lora_config.target_modules", "[q_proj]"], "target_modules"),
        (["--model.init_adapter", str(tmp_path / "no")], "does not exist"),
        (["--model.init_adapter", str(tmp_path)], "is no adapter folder"),
        (["--ckpt_path", str(run / "lora_adapter")], "set model.init_adapter"),
        (["--ckpt_path", str(run)], "is a folder without an adapter"),
    ):
        assert main(arguments_of(tmp_path / "out", *options)) == 2
        assert words in capsys.readouterr().err
    assert main(arguments_of(tmp_path / "out", *start, "--model.lora_config.r", "8", "--trainer.max_steps", "1")) == 0
    assert json.loads((tmp_path / "out" / "lora_adapter" / "adapter_config.json").read_text())["r"] == 4


def test_chat_holds_the_base_as_the_run_did(run, tmp_path):
    from qwen_lit.commands.chat_model import choose, load
    from qwen_lit.quantization import loaded_weights

    def held(quantize):
        choice, _ = choose(str(run / "lora_adapter"), quantize, torch.device("cpu"))
        return {str(one) for one in loaded_weights(load(choice, torch.device("cpu"))[0]).values()}

    assert held(None) == {"nf4"} and held(False) == set()


def test_the_users_own_files_stay_in_an_export_that_is_made_again(run, arguments_of, caplog):
    model = run / "final_model"
    (model / "notes.txt").write_text("mine")
    (model / "model-q4_k_m.gguf").write_bytes(b"GGUF mine")
    (model / "runs").mkdir()
    (model / "runs" / "one.txt").write_text("mine too")
    (model / "Modelfile").write_text("FROM ./model-q4_k_m.gguf\n")
    (model / "README.md").write_text("my card\n")
    for _ in range(2):
        assert main(["export", *arguments_of(run)[1:]]) == 0
        there = content(model)
        assert there["notes.txt"] == b"mine" and there["model-q4_k_m.gguf"] == b"GGUF mine"
        assert there["runs/one.txt"] == b"mine too" and there["README.md"] == b"my card\n"
        assert there["Modelfile"] == b"FROM ./model-q4_k_m.gguf\n"
        assert b"TEMPLATE" in there["Modelfile.new"] and b"trained prompts ended" in there["README.md.new"]
        assert not [name for name in there if name.endswith(".new.new")]
    assert "Modelfile (the new one is Modelfile.new)" in caplog.text
