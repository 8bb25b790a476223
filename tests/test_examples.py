"""Every example runs at toy size, with the tiny model as its base: its rows, its configuration, its scripts."""

import importlib.util
import os
import re
import shlex
import stat
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from qwen_lit.cli import main
from qwen_lit.signals import WATCHED

EXAMPLES = Path("examples")
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir())


@pytest.fixture
def toy(model_folder, tmp_path) -> list[str]:
    """What makes a run of any example a matter of seconds on a CPU."""
    return [
        "--model.model_name_or_path",
        str(model_folder),
        "--model.lora_config.r",
        "4",
        "--trainer.accelerator",
        "cpu",
        "--trainer.max_steps",
        "2",
        "--trainer.enable_progress_bar",
        "false",
        "--data.cache_dir",
        str(tmp_path / "cache"),
        "--samples.max_new_tokens",
        "2",
        "--export.smoke_rows",
        "0",
        "--export.verdict_rows",
        "2",
        "--trainer.log_every_n_steps",
        "1",
    ]


def over(base: str, path: Path) -> list[str]:
    return ["fit", "--config", f"configs/{base}.yaml", "--config", str(path)]


def recorded(script: Path, name: str, folder: Path, *options: str, **variables: str) -> list[list[str]]:
    """Run a script with a stub in the place of a program; the words of each call."""
    folder.mkdir()
    stub = folder / name
    stub.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "" >> "$CALLS"\nexit "${CODE:-0}"\n')
    stub.chmod(stub.stat().st_mode | stat.S_IXUSR)
    calls = folder / "calls"
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls)} | variables
    code = subprocess.run(["bash", str(script), *options], env=environment, capture_output=True).returncode
    assert code == int(variables.get("CODE", 0))
    return [call.split("\n") for call in calls.read_text().strip("\n").split("\n\n")]


def test_the_novel_trains_and_is_asked_to_write_on(toy, tmp_path):
    out = tmp_path / "out"
    assert (
        main(
            [*over("qwen3_8b", EXAMPLES / "novel/novel.yaml"), *toy, "--output_dir", str(out), "--data.val_size", "1"]
        )
        == 0
    )
    assert (out / "final_model" / "model.safetensors").is_file()
    assert "灯塔" in (out / "samples.jsonl").read_text(encoding="utf-8")


def test_the_novel_trains_as_raw_text(toy, tmp_path):
    out = tmp_path / "out"
    raw = ["--data.dataset_path", "examples/novel/novel.txt", "--data.val_size", "0", "--export.merge", "false"]
    assert main([*over("qwen3_8b", EXAMPLES / "novel/novel.yaml"), *toy, *raw, "--output_dir", str(out)]) == 0
    assert (out / "lora_adapter" / "adapter_model.safetensors").is_file()


def test_sharegpt_trains_with_another_logger_where_wandb_is_missing(toy, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    path, out = EXAMPLES / "sharegpt_wandb/wandb.yaml", tmp_path / "out"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    logger = config["trainer"]["logger"]
    logger["init_args"]["save_dir"] = str(tmp_path)
    if find_spec("wandb") is None:
        config["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    changed = tmp_path / "changed.yaml"
    changed.write_text(yaml.safe_dump(config), encoding="utf-8")
    assert main([*over("qwen7b", changed), *toy, "--output_dir", str(out), "--export.merge", "false"]) == 0
    assert (out / "lora_adapter" / "adapter_model.safetensors").is_file()


def test_the_logger_of_the_wandb_example_is_one_the_parser_knows(capsys):
    assert main([*over("qwen7b", EXAMPLES / "sharegpt_wandb/wandb.yaml"), "--print_config"]) == 0
    logger = yaml.safe_load(capsys.readouterr().out)["trainer"]["logger"]
    assert logger["class_path"].endswith("WandbLogger") and logger["init_args"]["project"] == "bicycle-shop"


def test_the_sweep_makes_a_run_of_each_pair_and_compares_them(toy, tmp_path, capsys):
    calls = recorded(EXAMPLES / "sweep/sweep.sh", "python", tmp_path / "stub", "--config", "configs/qwen0_5b.yaml")
    outputs = [call[call.index("--output_dir") + 1] for call in calls]
    assert outputs == [f"output/sweep/lr{lr}-r{r}" for lr in ("1e-4", "2e-4") for r in (8, 16)]
    for call in (calls[0], calls[3]):
        assert call[:3] == ["-m", "qwen_lit", "fit"]
        out = tmp_path / Path(call[call.index("--output_dir") + 1]).name
        small = [word for word in toy if word not in ("--model.lora_config.r", "4")]
        assert main([*call[2:], *small, "--output_dir", str(out)]) == 0
    spec = importlib.util.spec_from_file_location("compare", EXAMPLES / "sweep/compare.py")
    compare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(compare)
    capsys.readouterr()
    assert compare.main([str(path) for path in sorted(tmp_path.glob("lr*/summary.json"))]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3 and {line.split()[-1] for line in table[1:]} == {"lr1e-4-r8", "lr2e-4-r16"}
    assert {(line.split()[2], line.split()[3]) for line in table[1:]} == {("8", "16"), ("16", "32")}


def test_a_sweep_leaves_a_run_alone_that_is_done(tmp_path):
    done = tmp_path / "output/sweep/lr1e-4-r8"
    done.mkdir(parents=True)
    (done / "summary.json").write_text("{}")
    script = tmp_path / "sweep.sh"
    script.write_text(f"cd {tmp_path}\n" + (EXAMPLES / "sweep/sweep.sh").read_text())
    calls = recorded(script, "python", tmp_path / "stub")
    assert len(calls) == 3 and not any("output/sweep/lr1e-4-r8" in call for call in calls)


def test_the_slurm_job_trains_and_goes_back_into_the_queue_when_its_time_is_up(toy, tmp_path):
    script = EXAMPLES / "slurm/train.sbatch"
    slurm = {"SLURM_NNODES": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "7"}
    given = ["--config", "configs/qwen7b.yaml", "--data.dataset_path", "examples/slurm/rows.jsonl"]
    (call,) = recorded(script, "srun", tmp_path / "done", *given, **slurm)
    assert call[:4] == ["--kill-on-bad-exit=1", "python", "-m", "qwen_lit"]
    alone = ["--trainer.strategy", "auto", "--output_dir", str(tmp_path / "out"), "--export.merge", "false"]
    assert main([*call[4:], *toy, *alone]) == 0
    (tmp_path / "queue").mkdir()
    requeue = tmp_path / "queue" / "scontrol"
    requeue.write_text('#!/bin/sh\necho "$@" > "$0.asked"\n')
    requeue.chmod(0o755)
    path = f"{tmp_path / 'stopped'}:{requeue.parent}:{os.environ['PATH']}"
    recorded(script, "srun", tmp_path / "stopped", *given, **slurm, CODE="143", PATH=path)
    assert (requeue.parent / "scontrol.asked").read_text() == "requeue 7\n"


def test_a_signal_of_the_slurm_job_is_one_that_a_run_saves_on():
    name = re.search(r"--signal=(SIG\w+)@", (EXAMPLES / "slurm/train.sbatch").read_text())[1]
    assert name in {one.name for one in WATCHED}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_every_command_of_an_examples_readme_parses(folder, capsys):
    text = (folder / "README.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert lines
    for words in map(shlex.split, lines):
        for word in words:
            if word.startswith(("examples/", "configs/")):
                assert Path(word).is_file(), word
        if words[:3] == ["python", "-m", "qwen_lit"] and words[3] != "chat" and "output/" not in " ".join(words):
            assert main([*words[3:], "--print_config"]) == 0
    for linked in re.findall(r"\]\(([^)]+)\)", text):
        assert (folder / linked).exists(), linked


def test_every_example_is_in_the_table():
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for folder in FOLDERS:
        assert f"({folder.name}/README.md)" in text
