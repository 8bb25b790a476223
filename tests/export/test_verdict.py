"""The verdict's figures against the same models loaded whole by plain libraries."""

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div, nll_loss
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.export import merge_adapter
from qwen_lit.export.verdict import Figures, Verdict, measure
from qwen_lit.quantization import loaded_weights
from tests.export.test_merge import make_adapter, make_base

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("bf16")]
NF4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
CPU = torch.device("cpu")


def examples(count: int = 5):
    draw = torch.Generator().manual_seed(3)
    rows = [torch.randint(0, 300, (7 + 5 * n,), generator=draw).numpy() for n in range(count)]
    return [(ids, [(2, len(ids) - 1)] if n else [(0, 3), (4, 6)]) for n, ids in enumerate(rows)]


def answers(model) -> torch.Tensor:
    """Log-probabilities ``[supervised tokens, vocabulary]`` of a whole model."""
    found = []
    for ids, spans in examples():
        with torch.no_grad():
            logits = model(input_ids=torch.as_tensor(ids)[None]).logits[0].float()
        found += [logits[torch.arange(max(begin, 1), end) - 1] for begin, end in spans]
    return torch.cat(found).log_softmax(-1)


def loss(answer: torch.Tensor) -> float:
    wanted = [torch.as_tensor(ids[max(begin, 1) : end]) for ids, spans in examples() for begin, end in spans]
    return float(nll_loss(answer, torch.cat(wanted)))


def distance(answer: torch.Tensor, other: torch.Tensor) -> float:
    return float(kl_div(other, answer, log_target=True, reduction="batchmean"))


VARIANTS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 32, "layers.1.mlp.up_proj": 1}},
    "head saved": {"modules_to_save": ["lm_head"]},
    "embedding saved": {"modules_to_save": ["embed_tokens"]},
    "both saved": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "norms saved": {"modules_to_save": ["norm", "input_layernorm"]},
    "saved and tied": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["v_proj", "lm_head"]},
    "head dora": {"target_modules": ["v_proj", "lm_head"], "use_dora": True},
    "embedding": {"target_modules": ["v_proj", "embed_tokens"]},
    "both ends": {"target_modules": ["embed_tokens", "lm_head"]},
    "biases": {"bias": "all"},
    "lora biases": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj", "k_proj"]},
}


def loud(adapter):
    """The same with biases that change the loss."""
    path = adapter / "adapter_model.safetensors"
    factors = {name: 200 if "bias" in name else 1 for name in load_file(path)}
    save_file({name: value * factors[name] for name, value in load_file(path).items()}, path)
    return adapter


def quantized(base, config):
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


# Qwen3 has no biases, and this Qwen2 is not tied.
CASES = [("qwen2", one) for one in VARIANTS if "tied" not in one]
CASES += [("qwen3", one) for one in VARIANTS if "bias" not in one]


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_every_figure_is_that_of_the_whole_models(tmp_path, kind, variant):
    options, base = VARIANTS[variant], make_base(tmp_path / "base", kind)
    adapter = loud(make_adapter(base, tmp_path / "adapter", **{"lora_alpha": 64, **options}))
    model = quantized(base, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **NF4))
    held, untrained = loaded_weights(model), answers(model)
    verdict = measure(adapter, base, examples(), held, CPU)
    trained = answers(PeftModel.from_pretrained(model, adapter).eval())
    # Sums of bfloat16 products in another order differ by as much on CPUs that have instructions for them.
    assert verdict.adapter_loss == pytest.approx(loss(trained), abs=0.005)
    for name in ("original", "dequantized"):
        merge_adapter(adapter, base, tmp_path / name, merge_base=name, held=held)
        merged = answers(AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.bfloat16).eval())
        assert verdict.merges[name].loss == pytest.approx(loss(merged), abs=0.003)
        assert verdict.merges[name].kl == pytest.approx(distance(trained, merged), rel=0.3, abs=2e-4)
        same = float((trained.argmax(-1) == merged.argmax(-1)).float().mean())
        # A random model has many near ties, which the order of sums in bf16 decides.
        assert verdict.merges[name].same_top == pytest.approx(same, abs=0.1)
    assert (verdict.tokens, verdict.rows) == (len(trained), len(examples()))
    # What the adapter adds is far more than that, so that a part of it that is left out would be seen.
    assert distance(trained, untrained) > 2e-3
    assert verdict.merges["dequantized"].kl < verdict.merges["original"].kl
    assert verdict.merges["dequantized"].same_top > 0.85


def test_without_quantisation_there_is_one_merge_and_it_answers_as_the_adapter(tmp_path):
    base = make_base(tmp_path / "base", "qwen2")
    verdict = measure(make_adapter(base, tmp_path / "adapter"), base, examples(), {}, CPU)
    assert list(verdict.merges) == ["original"] and verdict.merges["original"].kl < 1e-3


def test_a_merge_that_answers_worse_is_said_loudly():
    figures = {"original": Figures(1.2, 0.1, 0.8), "dequantized": Figures(1.0, 0.001, 0.99)}
    verdict = Verdict(1.0, 100, 10, figures)
    assert "MERGED MODEL ANSWERS WORSE" in verdict.warning("original") and "dequantized" in verdict.warning("original")
    assert verdict.warning("dequantized") is None
    told = {name: {"loss": one.loss, "kl": one.kl, "same_top": one.same_top} for name, one in figures.items()}
    whole = {"adapter_loss": 1.0, "tokens": 100, "rows": 10, "merges": told, "best": "dequantized"}
    assert verdict.as_dict() == whole
    assert all(len(line) <= 80 for line in verdict.lines())
