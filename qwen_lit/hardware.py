"""What the processor is good at, and how much memory there is."""

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil
import torch

FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""Words of /proc/cpuinfo that name instructions for products in bfloat16, on x86 and on Arm."""
ONEDNN = ("BF16", "FP16", "AMX", "AVX10")
"""Parts of the names of oneDNN's instruction sets that have them (its documentation, CPU dispatcher control)."""
CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_CONTROL_GROUP = Path("/proc/self/cgroup")
"""Names the control group of this process."""


def product_dtype(device: torch.device) -> torch.dtype:
    """The dtype of products: bfloat16, or float32 on a CPU that would emulate them in bfloat16, far slower.

    Args:
        device: where they are computed.
    """
    return torch.float32 if device.type == "cpu" and not cpu_has_bf16() else torch.bfloat16


@cache
def cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for products in bfloat16, and torch may use them."""
    allowed = os.environ.get("DNNL_MAX_CPU_ISA", "").upper()
    if allowed not in ("", "ALL", "DEFAULT") and not any(part in allowed for part in ONEDNN):
        return False
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        return False
    try:
        return bool(FLAGS & set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split()))
    except OSError:
        return False


def host_memory() -> int:
    """Bytes of host memory that are free to this process: the machine's, or what its control groups leave."""
    free = int(psutil.virtual_memory().available)
    try:
        mine = next(line[3:] for line in OWN_CONTROL_GROUP.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return free
    group = CONTROL_GROUPS / mine.strip("/")
    for one in (group, *group.parents):
        if one.is_relative_to(CONTROL_GROUPS):
            # A group without a limit says max, and the outermost has no such file.
            with suppress(OSError, ValueError):
                most, used = ((one / name).read_text().strip() for name in ("memory.max", "memory.current"))
                free = min(free, int(most) - int(used))
    return max(0, free)
