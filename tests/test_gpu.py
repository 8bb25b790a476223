"""Why a GPU goes unused, from machines that are made of files."""

from pathlib import Path

import pytest
import torch

from qwen_lit import gpu
from qwen_lit.cli import main
from qwen_lit.errors import UserError

MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build\nGCC version: 12.3.0\n"
CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without a GPU, and what puts one in: files, what nvidia-smi prints, and torch's build."""
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    gpu.gpu_problem.cache_clear()

    def put(files=(), smi=None, cuda="13.0"):
        for name in files:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            content = {"version": MODULE, "vendor": "0x10de\n", "class": "0x030200\n"}.get(path.name, "")
            path.write_text(content)
        if smi is not None:
            program(tmp_path / "bin/nvidia-smi", smi)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        return gpu.gpu_problem()

    put.root = tmp_path
    yield put
    gpu.gpu_problem.cache_clear()


def program(path: Path, says: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)


DRIVER, NODE = "proc/driver/nvidia/version", "dev/nvidia0"
CARD = ["sys/bus/pci/devices/0000:01:00.0/vendor", "sys/bus/pci/devices/0000:01:00.0/class"]


@pytest.mark.parametrize(
    ("there", "words"),
    [
        ({"files": [DRIVER, NODE]}, ["driver 550.54.15", "for CUDA 13.0 needs driver 580 or newer", gpu.PAGE]),
        ({"smi": "535.183.01", "cuda": "12.6"}, ["driver 535.183.01", "needs driver 560 or newer"]),
        ({"files": [DRIVER, NODE], "cuda": None}, ["driver 550.54.15", "is built without CUDA", gpu.PAGE]),
        ({"files": [DRIVER], "cuda": "12.4"}, ["no /dev/nvidia0", "--gpus all"]),
        ({"files": CARD}, ["no driver is loaded; install one of 580 or newer"]),
        (
            {"files": [NODE], "smi": "Failed to initialize NVML: Driver/library version mismatch"},
            ["cannot use it (nvidia-smi: Failed to initialize NVML: Driver/library version mismatch)"],
        ),
        ({"files": [DRIVER, NODE], "cuda": "12.4"}, ["cannot use it; see that nvidia-smi works"]),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_told_with_its_driver_and_the_remedy(machine, there, words):
    problem = machine(**there)
    assert problem is not None and "\n" not in problem
    for word in words:
        assert word in problem


def test_windows_is_told_to_renew_its_own_driver(machine):
    program(machine.root / "usr/lib/wsl/lib/nvidia-smi", "551.86")
    problem = machine(["dev/dxg"])
    assert problem is not None and "driver 551.86" in problem and "install a newer driver in Windows" in problem


def test_a_gpu_that_is_hidden_is_told_as_hidden(machine, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    problem = machine([DRIVER, NODE], cuda="12.4")
    assert problem is not None and "CUDA_VISIBLE_DEVICES='-1' hides it" in problem


def test_no_gpu_is_no_problem(machine):
    card = machine.root / "sys/bus/pci/devices/0000:02:00.0"
    card.mkdir(parents=True)
    (card / "vendor").write_text("0x8086\n")
    (card / "class").write_text("0x030000\n")
    assert machine() is None


def test_a_version_of_cuda_between_two_that_are_known_needs_the_driver_of_the_lower():
    versions = ("13.1", "13.0", "12.9", "12.8", "12.6", "12.1", "11.8", "10.2")
    assert [gpu.needed_driver(one) for one in versions] == [580, 580, 570, 570, 560, 530, 520, None]


def test_asking_for_a_gpu_that_cannot_be_used_says_why(machine, arguments, capsys):
    machine([DRIVER, NODE])
    assert main([*arguments, "--trainer.accelerator", "gpu"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: trainer.accelerator is gpu, but a GPU is there (driver 550.54.15)")
    assert "set it to auto" not in told and told.count("\n") == 1


def test_a_gpu_that_goes_unused_is_told_once_and_not_to_inspect(machine, arguments, caplog):
    machine([DRIVER, NODE])
    gpu.check_gpu("auto", warn=False)
    gpu.check_gpu("cpu", warn=True)
    assert not caplog.messages
    gpu.check_gpu("auto", warn=True)
    assert caplog.messages == [f"no GPU is used: {gpu.gpu_problem()}"]


def test_a_gpu_that_torch_has_no_code_for_is_refused_and_one_that_emulates_bf16_told(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GeForce")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120", "compute_120"])
    own = {"is": (6, 1)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: own["is"])
    with pytest.raises(UserError, match=r"GeForce \(compute capability 6.1\) is older than .* \(7.5 and newer\)"):
        gpu.check_device(CUDA)
    own["is"] = (7, 5)
    gpu.check_device(CUDA)
    assert "no instructions for bf16" in caplog.text
    caplog.clear()
    own["is"] = (12, 0)
    gpu.check_device(CUDA)
    gpu.check_device(CPU)
    assert not caplog.messages


def test_a_large_model_is_trained_on_the_cpu_only_where_that_is_asked_for(machine, arguments, monkeypatch, capsys):
    machine([DRIVER, NODE])
    monkeypatch.setattr("qwen_lit.cli.count_parameters", lambda config: 7_600_000_000)
    monkeypatch.setattr("qwen_lit.model.module.QwenModule.fetch_weights", lambda module: pytest.fail("it goes on"))
    at = arguments.index("--trainer.accelerator")
    auto = [*arguments[:at], *arguments[at + 2 :]]
    for command in (auto, ["verify-resume", *auto[1:]]):
        assert main(command) == 2
        told = capsys.readouterr().err
        error = next(line for line in told.splitlines() if line.startswith("error: "))
        assert "7.6 billion parameters" in error and "driver 580 or newer" in error and "accelerator: cpu" in error
    gpu.check_size(7_600_000_000, CPU, "cpu")
    gpu.check_size(7_600_000_000, CUDA, "auto")
    gpu.check_size(10**9, CPU, "auto")


def test_parameters_are_counted_from_the_shapes(model_folder):
    from transformers import AutoConfig, AutoModelForCausalLM

    from qwen_lit.model.load import count_parameters

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    assert count_parameters(AutoConfig.from_pretrained(model_folder)) == sum(p.numel() for p in model.parameters())


def test_the_first_driver_with_a_working_tool_is_taken(machine):
    machine([DRIVER])
    assert gpu.loaded_driver() == "550.54.15"
    program(machine.root / "bin/nvidia-smi", "560.35.03\n560.35.03")
    assert gpu.smi() == ("560.35.03", "")


def test_a_tool_that_hangs_is_left_alone(machine, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.1)
    path = machine.root / "bin/nvidia-smi"
    program(path, "")
    path.write_text("#!/bin/sh\nexec /bin/sleep 5\n")
    assert gpu.smi() == ("", "nvidia-smi: TimeoutExpired")
