"""The verdict's figures against the same models loaded whole by plain libraries."""

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.export import merge_adapter
from qwen_lit.export.verdict import Figures, Verdict, measure
from tests.export.test_merge import make_adapter, make_base

pytestmark = pytest.mark.filterwarnings("ignore")
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def examples(count: int = 5):
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 300, (7 + 5 * n,), generator=draw).numpy() for n in range(count)]
    return [(ids, [(2, len(ids) - 1)] if n else [(0, 3), (4, 6)]) for n, ids in enumerate(rows)]


def mean_loss(model) -> float:
    total, count = 0.0, 0
    for ids, spans in examples():
        row = torch.as_tensor(ids)[None]
        with torch.no_grad():
            logits = model(input_ids=row).logits[0].float()
        for begin, end in spans:
            where = torch.arange(max(begin, 1), end)
            total += float(cross_entropy(logits[where - 1], row[0, where], reduction="sum"))
            count += len(where)
    return total / count


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_every_figure_is_that_of_the_whole_models(tmp_path, kind, options):
    base = make_base(tmp_path / "base", kind)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    verdict = measure(adapter, base, examples(), NF4, torch.device("cpu"))
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **NF4)
    quantized = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    trained = PeftModel.from_pretrained(quantized, adapter).eval()
    assert verdict.adapter_loss == pytest.approx(mean_loss(trained), abs=0.02)
    for name in ("original", "dequantized"):
        merge_adapter(adapter, base, tmp_path / name, merge_base=name, quantization=NF4)
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval()
        assert verdict.merges[name].loss == pytest.approx(mean_loss(merged), abs=0.005)
    assert verdict.merges["dequantized"].kl < verdict.merges["original"].kl
    assert verdict.best == "dequantized" and verdict.merges["dequantized"].same_top > 0.9


def test_without_quantisation_there_is_one_merge_and_it_answers_as_the_adapter(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    verdict = measure(make_adapter(base, tmp_path / "adapter"), base, examples(), None, torch.device("cpu"))
    assert list(verdict.merges) == ["original"] and verdict.merges["original"].kl < 1e-3


def test_a_merge_that_answers_worse_is_said_loudly():
    figures = {"original": Figures(1.2, 0.1, 0.8), "dequantized": Figures(1.0, 0.001, 0.99)}
    verdict = Verdict(1.0, 100, 10, figures)
    assert "MERGED MODEL ANSWERS WORSE" in verdict.warning("original") and "dequantized" in verdict.warning("original")
    assert verdict.warning("dequantized") is None
    assert all(len(line) <= 80 for line in verdict.lines())
