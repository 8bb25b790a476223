"""GPU tests are collected where there is a CUDA device; elsewhere one line says which are not."""

import torch

from qwen_lit.kernels.launch import INTERPRETED

# Kernels run in Triton's interpreter too; whole models are too large for it.
MODELS = ["test_engine.py", "test_fit.py", "test_graphs.py"]
LEFT = [] if torch.cuda.is_available() else MODELS if INTERPRETED else ["test_*.py"]
collect_ignore_glob = LEFT


def pytest_report_header(config):
    return f"tests/gpu: {', '.join(LEFT)} not collected, there is no CUDA device" if LEFT else "tests/gpu: collected"
