"""Products are computed in what the processor is good at."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig

from qwen_lit import hardware
from qwen_lit.cli import main
from qwen_lit.model.load import computing_on, load_base
from tests.runs import begun, recording


@pytest.mark.parametrize(
    ("capability", "flags", "allowed", "has"),
    [
        ("AVX512", "avx2 avx512f avx512_bf16", None, True),
        ("AVX512", "avx2 avx512f amx_bf16 amx_tile", None, True),
        ("AVX512", "avx2 avx512f", None, False),
        ("AVX2", "avx2 avx512f avx512_bf16", None, False),
        ("AVX512", "avx2 avx512_bf16", "AVX2", False),
        ("AVX512", "avx2 avx512_bf16", "AVX512_CORE_VNNI", False),
        ("AVX512", "avx2 avx512_bf16", "avx512_core_amx", True),
        ("DEFAULT", "fp asimd bf16", None, True),
    ],
)
def test_a_cpu_has_bf16_where_it_has_the_instructions_and_torch_may_use_them(
    capability, flags, allowed, has, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", lambda self, **options: f"flags\t\t: {flags}\n")
    monkeypatch.delenv("DNNL_MAX_CPU_ISA", raising=False)
    if allowed is not None:
        monkeypatch.setenv("DNNL_MAX_CPU_ISA", allowed)
    assert hardware.cpu_has_bf16.__wrapped__() is has


def test_a_gpu_computes_in_bf16_whatever_the_cpu_beside_it_has(model_folder, monkeypatch):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: False)
    gpu, cpu = torch.device("cuda:0"), torch.device("cpu")
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    assert hardware.product_dtype(gpu) == computing_on(gpu, bits).bnb_4bit_compute_dtype == torch.bfloat16
    base = load_base(model_folder, bits, cpu)
    assert base.lm_head.weight.dtype == base.model.layers[0].self_attn.q_proj.compute_dtype == torch.float32


@pytest.mark.parametrize("has", [True, False])
def test_a_run_on_the_cpu_computes_in_bf16_where_it_has_it_and_in_float32_elsewhere(
    has, arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(hardware, "cpu_has_bf16", lambda: has)
    few = ["--trainer.max_steps", "1", "--export.merge", "false", *recording(tmp_path / "record.pt")]
    assert main([*arguments, *few]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    told = "bf16-mixed" if has else "32-true (this CPU has no instructions for bf16)"
    assert begun(tmp_path / "out")["device"] == f"1 x cpu, precision {told}"
    assert summary["config"]["trainer"]["precision"] == "bf16-mixed"
    record = torch.load(tmp_path / "record.pt")
    assert record["products"] == ["torch.bfloat16" if has else "torch.float32"]
