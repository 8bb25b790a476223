"""Why torch cannot use a GPU that is there, found without torch."""

import logging
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from qwen_lit.errors import UserError

log = logging.getLogger(__name__)
ROOT = Path("/")
"""Where /proc, /dev, /sys and /usr are looked for."""
DRIVERS = {(13, 0): 580, (12, 8): 570, (12, 6): 560, (12, 4): 550, (12, 1): 530, (11, 8): 520}
"""The oldest Linux driver of a CUDA toolkit, from its release notes; a version between two needs that of the lower."""
PAGE = "https://pytorch.org/get-started/locally"
NVIDIA = "0x10de"
DISPLAY = ("0x0300", "0x0302")
"""PCI's vendor, and its classes of graphics cards with and without a screen."""
LARGEST_ON_CPU = 10**9
"""Parameters of a model above which it is not trained on a CPU unless that is asked for."""
PATIENCE = 10.0
"""Seconds for nvidia-smi, which a broken driver can hold for ever."""


def needed_driver(cuda: str) -> int | None:
    """The oldest driver for a version of CUDA, such as "13.0"; None where that is not known."""
    major, minor = (int(part) for part in (cuda.split(".") + ["0"])[:2])
    return next((DRIVERS[one] for one in sorted(DRIVERS, reverse=True) if one <= (major, minor)), None)


def under_wsl() -> bool:
    """Whether this is Linux inside Windows."""
    return (ROOT / "dev/dxg").exists()


def smi() -> tuple[str, str]:
    """The driver's version by nvidia-smi, or else what it complains of; each is empty where there is none."""
    inside = ROOT / "usr/lib/wsl/lib/nvidia-smi"
    command = shutil.which("nvidia-smi") or (str(inside) if inside.is_file() else None)
    if command is None:
        return "", ""
    try:
        answer = subprocess.run(
            [command, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", f"nvidia-smi: {type(error).__name__}"
    version = re.match(r"\d+(\.\d+)+", answer.stdout.strip())
    if version:
        return version[0], ""
    complaint = " ".join((answer.stdout + answer.stderr).split())
    return "", f"nvidia-smi: {complaint[:100]}" if complaint else ""


def loaded_driver() -> str:
    """The version of the kernel's driver; empty where none is loaded."""
    try:
        text = (ROOT / "proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return ""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text)
    return found[0] if found else ""


def has_card() -> bool:
    """Whether a graphics card of NVIDIA's is on the PCI bus."""
    for device in (ROOT / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        if vendor == NVIDIA and kind.startswith(DISPLAY):
            return True
    return False


@cache
def gpu_problem() -> str | None:
    """Why torch cannot use an NVIDIA GPU that is there, with the remedy; None where it can, or where there is none."""
    if torch.cuda.is_available():
        return None
    version, complaint = smi()
    version = version or loaded_driver()
    node, wsl = (ROOT / "dev/nvidia0").exists(), under_wsl()
    if not version and not complaint and not node and not has_card():
        return None
    driver, cuda = f"driver {version}" if version else "its driver", torch.version.cuda
    this, there = f"torch {torch.__version__}", f"a GPU is there ({driver}), but"
    if cuda is None:
        return f"{there} {this} is built without CUDA; install one that is built for it: {PAGE}"
    this += f" for CUDA {cuda}"
    needed, newer = needed_driver(cuda), "a newer driver" + " in Windows" * wsl
    if version and needed and int(version.split(".")[0]) < needed:
        return f"{there} {this} needs driver {needed} or newer; install {newer}, or a torch for an older CUDA: {PAGE}"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and not re.match(r"\d|GPU-|MIG-", hidden):
        return f"{there} CUDA_VISIBLE_DEVICES={hidden!r} hides it; unset it to use the GPU"
    if version and not node and not wsl:
        remedy = "start the container with --gpus all, or restart the machine after installing its driver"
        return f"{there} no /dev/nvidia0; {remedy}"
    if not version and not complaint and not node:
        return f"a GPU is there, but no driver is loaded; install one{f' of {needed} or newer' * bool(needed)}"
    said = f" ({complaint})" if complaint else ""
    return f"{there} {this} cannot use it{said}; see that nvidia-smi works, and restart after a change of drivers"


def check_gpu(accelerator: object, warn: bool) -> None:
    """Refuse ``trainer.accelerator: gpu`` where torch has none, and warn where a GPU that is there goes unused.

    Args:
        accelerator: as configured.
        warn: whether to warn.

    Raises:
        UserError: there is none that torch can use.
    """
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        nothing = "no CUDA device is seen (no driver, no /dev/nvidia0, no card on the PCI bus); set it to auto"
        raise UserError(f"trainer.accelerator is {accelerator}, but {gpu_problem() or nothing}.")
    if warn and accelerator == "auto" and (problem := gpu_problem()):
        log.warning("no GPU is used: %s", problem)


def check_device(device: torch.device) -> None:
    """Refuse a GPU that this torch has left behind, and warn of one that emulates bfloat16.

    Args:
        device: where it would be computed.

    Raises:
        UserError: torch has no code for it.
    """
    if device.type != "cuda":
        return
    own = torch.cuda.get_device_capability(device)
    built = [int(digits) for one in torch.cuda.get_arch_list() for digits in re.findall(r"^sm_(\d+)", one)]
    name = f"{torch.cuda.get_device_name(device)} (compute capability {own[0]}.{own[1]})"
    if built and own[0] * 10 + own[1] < min(built):
        raise UserError(
            f"trainer.accelerator: {name} is older than what torch {torch.__version__} is built for "
            f"({min(built) // 10}.{min(built) % 10} and newer); install a torch for an older CUDA: {PAGE}, or set it "
            "to cpu."
        )
    if own[0] < 8:
        log.warning("%s has no instructions for bf16, which is emulated and slow", name)


def check_size(parameters: int, device: torch.device, accelerator: object) -> None:
    """Refuse to train a large model on the CPU unless that is asked for.

    Args:
        parameters: of the base.
        device: where it would be trained.
        accelerator: as configured.

    Raises:
        UserError: before weights are fetched or read.
    """
    if device.type == "cpu" and parameters > LARGEST_ON_CPU and accelerator != "cpu":
        reason = gpu_problem() or "no NVIDIA GPU is seen"
        raise UserError(
            f"a model of {parameters / 1e9:.1f} billion parameters would be trained on the CPU, which takes weeks "
            f"({reason}); set trainer.accelerator: cpu if that is meant. plan says what a GPU must have."
        )
