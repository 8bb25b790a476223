"""What is kept of the machine and of the user's project."""

import subprocess

import torch

from qwen_lit.environment import DRIVER, git, hardware, versions


def test_a_project_under_git_is_named_by_its_commit_and_whether_it_has_changed(tmp_path):
    def run(*words):
        return subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True, text=True).stdout

    assert git(tmp_path) is None
    run("init", "-q")
    assert git(tmp_path) is None, "without a commit"
    file = tmp_path / "config.yaml"
    file.write_text("a: 1\n")
    run("add", "config.yaml")
    run("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "begin")
    commit = run("rev-parse", "HEAD").strip()
    (tmp_path / "output").mkdir()
    assert git(tmp_path / "output") == {"commit": commit, "dirty": False}
    file.write_text("a: 2\n")
    assert git(tmp_path) == {"commit": commit, "dirty": True}


def test_a_machine_without_git_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git(tmp_path) is None


def test_the_processor_and_the_versions_have_names():
    found = hardware(torch.device("cpu"), 2)
    assert found["type"] == "cpu" and found["count"] == 2 and found["name"]
    assert versions()["torch"] == torch.__version__ and versions()["qwen_lit"]


def test_the_driver_is_read_from_the_kernel_s_own_words():
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.183.01  Release Build",
    ):
        assert DRIVER.search(text)[1] == "535.183.01"
