"""Bases whose own files bitsandbytes has quantised, row by row: they train, go on, merge and answer as a base that is
quantised on load from the same original."""

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.nn import Linear
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)

from qwen_lit.cli import main
from qwen_lit.commands.chat_model import choose, load
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.export.folder import BaseModel
from qwen_lit.export.verdict import _Weights
from qwen_lit.families.table import family_of
from qwen_lit.generate import generate
from qwen_lit.model.load import add_adapter, load_base, load_config, read_model
from qwen_lit.model.loss import reference_loss
from qwen_lit.quantization import loaded_weights, planned_weights, usable
from tests.engine.test_engine import batch
from tests.prequantized import (
    DYNAMIC,
    NF4,
    SKIPPED,
    fit,
    make_original,
    on_load,
    quantize,
    rename_skipped,
    stored_kinds,
)
from tests.runs import adapter, same, trace

pytestmark = [pytest.mark.usefixtures("bf16"), pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")
BASES = {
    "qwen2, NF4": ("qwen2", NF4, {}),
    "qwen2, FP4, nested scales": ("qwen2", {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, {}),
    "qwen2, int8": ("qwen2", {"load_in_8bit": True}, {}),
    "qwen3, NF4, nested scales, a dynamic skip list, the rest in fp16": (
        "qwen3",
        NF4 | {"bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": SKIPPED},
        {"dtype": torch.float16},
    ),
}
"""Each: the family, how its files are quantised, and how the rest is stored."""
COLUMNS = ("load", "plan", "fit", "resume", "verdict", "merge loads plain", "chat and predict")


@pytest.fixture(scope="module", params=BASES)
def row(request, tokenizer, dataset, tmp_path_factory):
    """A base, its original, and the folder of a whole run."""
    kind, options, rest = BASES[request.param]
    folder = tmp_path_factory.mktemp("row")
    original = make_original(kind, tokenizer, folder / "original")
    base = quantize(original, folder / "base", options, **rest)
    if "llm_int8_skip_modules" in options:
        rename_skipped(base, DYNAMIC)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwen_lit.hardware.cpu_has_bf16", lambda: True)
        assert main(fit(folder / "whole", base, dataset)) == 0
    return kind, options, original, base, folder / "whole"


def test_load_as_it_is_and_by_the_headers(row):
    kind, options, original, base, _ = row
    config = load_config(base)
    quantization = usable(BitsAndBytesConfig(load_in_4bit=True), config)
    loaded = load_base(base, quantization, CPU)
    fresh = load_base(original, usable(BitsAndBytesConfig(**options), load_config(original)), CPU)
    held = loaded_weights(loaded)
    assert held == loaded_weights(fresh) == planned_weights(config, quantization, CPU, base)
    # Before the files are there, by the names in config.json.
    assert held == planned_weights(config, quantization, CPU)
    assert {f"{name}.weight" for name, one in loaded.named_modules() if type(one) is not Linear} >= set(held)
    assert len(held) == {"qwen2": 14, "qwen3": 10}[kind]
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(loaded.parameters(), fresh.parameters(), strict=True))
    files = BaseModel(base)
    for name in files.where:
        wanted = BaseModel(original).get(name)
        wanted = held[name].round_trip(wanted) if name in held else wanted
        assert torch.equal(files.get(name).bfloat16(), wanted.bfloat16()), name


def test_plan_counts_the_files_as_they_are(row, dataset, tmp_path, capsys):
    kind, options, original, base, _ = row
    found = []
    for folder, more in ((base, []), (original, on_load(options))):
        assert main(["plan", *fit(tmp_path / "plan", folder, dataset, *more, "--json", "true")[1:]]) == 0
        found.append(json.loads(capsys.readouterr().out))
    ours, theirs = found
    assert not any("nf4" in one or "double_quant" in one for one in ours["advice"])
    ours.pop("advice"), theirs.pop("advice")
    assert ours == theirs


def test_fit_has_the_losses_of_a_base_that_is_quantised_on_load(row, dataset, tmp_path, caplog):
    kind, options, original, base, whole = row
    assert main(fit(tmp_path / "fresh", original, dataset, *on_load(options), "--export.merge", "false")) == 0
    assert same(whole, tmp_path / "fresh") and len(trace(whole)) == 4
    told = json.loads((whole / "summary.json").read_text())["run"]["quantization"]
    assert told == json.loads((tmp_path / "fresh" / "summary.json").read_text())["run"]["quantization"]


def test_both_engines_compute_on_it_alike(row):
    _, options, _, base, _ = row
    config = load_config(base)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}
    model = add_adapter(load_base(base, usable(None, config), CPU), LoraConfig(**lora), False)
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    one = batch(True)
    if "load_in_8bit" in options:
        assert unsupported_reason(model, CPU) == "q_proj is a Linear8bitLt"
        return
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = float(reference_loss(model.get_base_model(), family_of(config), one))
    assert abs(float(FastEngine(model).loss_sum(one)) - wanted) < 1e-2 * wanted


def test_resume_goes_on_exactly(row, dataset, tmp_path):
    *_, base, whole = row
    half = whole / "checkpoints" / "step=00000002.ckpt"
    out = tmp_path / "out"
    assert main(fit(out, base, dataset, "--ckpt_path", str(half), "--export.merge", "false")) == 0
    assert trace(out) == trace(whole)[2:] and len(trace(out)) == 2
    left, right = adapter(whole), adapter(out)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_verdict_compares_the_merge_that_there_is(row):
    *_, base, whole = row
    verdict = json.loads((whole / "summary.json").read_text())["verdict"]
    assert list(verdict["merges"]) == [verdict["best"]] == ["dequantized"]
    assert abs(verdict["merges"]["dequantized"]["loss"] - verdict["adapter_loss"]) < 0.02
    assert verdict["merges"]["dequantized"]["kl"] < 0.01
    config = load_config(base)
    held = planned_weights(config, usable(None, config), CPU, base)
    as_trained = _Weights(whole / "lora_adapter", base, held, CPU)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert torch.equal(as_trained.of(name, "adapter"), BaseModel(base).get(name).bfloat16())
    assert "dequantized (this model)" in (whole / "final_model" / "README.md").read_text()


@torch.no_grad()
def test_the_merge_loads_plain_and_answers_as_the_adapter_on_the_base(row):
    *_, base, whole = row
    merged = AutoModelForCausalLM.from_pretrained(whole / "final_model", dtype=torch.float32)
    config = json.loads((whole / "final_model" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"
    assert {one.dtype for one in load_file(whole / "final_model" / "model.safetensors").values()} == {torch.bfloat16}
    trained_names = ("q_proj.weight", "v_proj.weight", "up_proj.weight", "down_proj.weight")
    for name, value in load_file(whole / "final_model" / "model.safetensors").items():
        if not name.endswith(trained_names):
            assert torch.equal(value, BaseModel(base).get(name).bfloat16()), name
    trained = PeftModel.from_pretrained(read_model(base, CPU, dtype=torch.float32), whole / "lora_adapter").eval()
    ids = torch.arange(20, 44)[None]
    with trained.disable_adapter():
        untrained = trained(input_ids=ids).logits
    wanted = trained(input_ids=ids).logits
    assert (merged(input_ids=ids).logits - wanted).abs().max() < 0.05 * (untrained - wanted).abs().max()


def test_chat_and_predict_answer_with_it(row, dataset, tmp_path, capsys):
    *_, base, whole = row
    choice, _ = choose(str(whole / "lora_adapter"), None, CPU)
    assert choice.held == ("8 bits" if "int8" in stored_kinds(base) else f"4 bits ({stored_kinds(base).pop()})")
    model, tokenizer = load(choice, CPU)
    assert loaded_weights(model) == planned_weights(load_config(base), choice.quantization, CPU, base)
    file = sum(one.nbytes for one in load_file(base / "model.safetensors").values())
    assert 0.5 < choice.bytes_needed(CPU) / file < 1.5
    config = fit(whole, base, dataset)[1:]
    target = tmp_path / "answers.jsonl"
    asked = ["--source", str(dataset), "--target", str(target), "--max_new_tokens", "4", "--batch_size", "25"]
    assert main(["predict", *config, *asked, "--ckpt_path", str(whole / "lora_adapter")]) == 0
    first = json.loads(target.read_text().splitlines()[0])
    messages = [{"role": "user", "content": first["instruction"]}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    (answer,) = generate(model, tokenizer, [prompt], 4)
    assert answer.text == first["prediction"]


def test_the_table_of_the_docs_is_these_tests():
    for language in ("", ".zh"):
        text = Path(f"docs/export{language}.md").read_text("utf-8")
        found = {
            line.split("|")[1].strip(): line.count("✓") for line in text.splitlines() if line.startswith("| qwen")
        }
        assert found == dict.fromkeys(BASES, len(COLUMNS)), language
        assert f"| base | {' | '.join(COLUMNS)} |" in text or language
    tests = {name for name in globals() if name.startswith("test_")}
    for column in COLUMNS:
        words = re.sub(r"\W+", "_", column)
        assert any(words in name for name in tests), column
