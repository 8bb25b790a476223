"""GPU tests are collected where there is a CUDA device; elsewhere one line says that they are not."""

import torch

from qwen_lit.kernels.launch import INTERPRETED

collect_ignore_glob = [] if torch.cuda.is_available() or INTERPRETED else ["test_*.py"]


def pytest_report_header(config):
    return "tests/gpu: not collected, there is no CUDA device" if collect_ignore_glob else "tests/gpu: collected"
