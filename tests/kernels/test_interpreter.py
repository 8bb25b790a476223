"""The Triton kernels themselves, where there is no CUDA device."""

import os
import re
import subprocess
import sys

import pytest


@pytest.mark.timeout(1800)
def test_every_kernel_equals_its_reference_in_tritons_interpreter():
    # Attention is no kernel of ours, and its reference of thousands of documents is not for the CPU.
    files = ["tests/gpu/test_kernels.py", "tests/gpu/test_eight.py", "tests/gpu/test_packed.py"]
    command = [sys.executable, "-m", "pytest", *files, "-k", "not attention", "-p", "no:xdist"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {name: value for name, value in environment.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100 and "skipped" not in done.stdout
