"""Bases that are quantised in their files: their originals, what is refused of them, and odd ones that are not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Qwen3_5Config,
)

from qwen_lit.cli import main
from qwen_lit.export.folder import BaseModel
from qwen_lit.model.load import empty_model, load_base, load_config
from qwen_lit.model.stored import check_stored
from qwen_lit.quantization import loaded_weights, planned_weights, usable
from tests.prequantized import NF4, fit, make_original, on_load, quantize, rename_skipped

pytestmark = [pytest.mark.usefixtures("bf16"), pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")


def refused(capsys, command: list[str]) -> str:
    assert main(command) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1
    return text


@pytest.fixture(scope="module")
def nf4(tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """An original, and its 4-bit files."""
    folder = tmp_path_factory.mktemp("nf4")
    original = make_original("qwen2", tokenizer, folder / "original")
    return original, quantize(original, folder / "base", NF4 | {"bnb_4bit_use_double_quant": True})


@pytest.fixture
def unloaded(monkeypatch):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))


def test_with_its_original_named_both_merges_are_compared_and_either_is_written(nf4, dataset, tmp_path):
    original, base = nf4
    out = tmp_path / "out"
    named = ["--export.original", str(original)]
    assert main(fit(out, base, dataset, *named, "--export.merge_base", "original")) == 0
    verdict = json.loads((out / "summary.json").read_text())["verdict"]
    assert list(verdict["merges"]) == ["original", "dequantized"] and verdict["best"] == "dequantized"
    assert verdict["merges"]["dequantized"]["kl"] < verdict["merges"]["original"]["kl"]
    untouched = "model.layers.0.self_attn.k_proj.weight"
    before = load_file(original / "model.safetensors")

    def merged():
        return load_file(out / "final_model" / "model.safetensors")

    assert torch.equal(merged()[untouched], before[untouched])
    again = ["export", *fit(out, base, dataset, *named)[1:], "--export.verdict_rows", "3"]
    assert main([*again, "--export.merge_base", "auto"]) == 0
    assert torch.equal(merged()[untouched], BaseModel(base).get(untouched))
    assert not torch.equal(merged()[untouched], before[untouched])
    # Neither auto nor dequantized: the original's, as for any base that has one.
    assert main(again) == 0
    assert torch.equal(merged()[untouched], before[untouched])


def test_a_wrong_original_is_refused_before_training(nf4, tokenizer, dataset, tmp_path, capsys, unloaded):
    original, base = nf4

    def told(folder) -> str:
        return refused(capsys, fit(tmp_path / "out", base, dataset, "--export.original", str(folder)))

    other = make_original("qwen2", tokenizer, tmp_path / "other", seed=1)
    assert f"export.original: {other} is not the model" in told(other)
    assert "it is a qwen3, and the base a qwen2" in told(make_original("qwen3", tokenizer, tmp_path / "qwen3"))
    assert "is quantised too" in told(base)
    assert "export.original: no such folder" in told(tmp_path / "nowhere")
    # Trained further by a little, in the matrices alone.
    near = shutil.copytree(original, tmp_path / "near")
    weights = load_file(original / "model.safetensors")
    for name, value in weights.items():
        if "proj.weight" in name:
            value += 0.05 * value.float().std() * torch.randn(value.shape)
    save_file(weights, near / "model.safetensors", {"format": "pt"})
    assert "has other numbers" in told(near)
    narrow = shutil.copytree(original, tmp_path / "narrow")
    weights = load_file(original / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**weights, name: weights[name][:, :64].contiguous()}, narrow / "model.safetensors", {"format": "pt"})
    assert f"its {name} is [64, 64], and the base's [64, 128]" in told(narrow)


def test_what_cannot_be_merged_is_refused_before_training(nf4, dataset, tmp_path, capsys, unloaded):
    original, base = nf4
    out = tmp_path / "out"
    asked = ["--export.merge_base", "original"]
    assert "name the unquantised model as export.original" in refused(capsys, fit(out, base, dataset, *asked))
    assert "set it to null" in refused(capsys, fit(out, original, dataset, "--export.original", str(original)))
    whole = ["--model.lora_config.modules_to_save", "[k_proj]"]
    assert "the files hold it so: give the original bf16 model" in refused(capsys, fit(out, base, dataset, *whole))
    assert not (out / "checkpoints").exists()


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_kinds_are_refused_by_name_with_what_there_is_instead(nf4, dataset, tmp_path, capsys, unloaded, method):
    base = shutil.copytree(nf4[0], tmp_path / f"Tiny-Instruct-{method.upper()}-Int4")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    told = refused(capsys, fit(tmp_path / "out", base, dataset))
    assert f"is quantised already ({method})" in told and "bnb-4bit" in told
    assert ("Tiny-Instruct, which" in told) == (method != "compressed-tensors")


def test_files_that_are_not_what_config_says_are_refused(nf4, dataset, tmp_path, capsys, unloaded):
    original, base = nf4
    folder = shutil.copytree(base, tmp_path / "base")
    whole, config = load_file(base / "model.safetensors"), json.loads((base / "config.json").read_text())
    name = "model.layers.0.mlp.up_proj.weight"

    def told(weights: dict, settings: dict = config) -> str:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        return refused(capsys, fit(tmp_path / "out", folder, dataset))

    assert f"{name}.absmax is missing" in told({key: one for key, one in whole.items() if key != f"{name}.absmax"})
    state = f"{name}.quant_state.bitsandbytes__nf4"
    assert "nothing that says how" in told({key: one for key, one in whole.items() if key != state})
    assert "its files hold none" in told(load_file(original / "model.safetensors"))
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    assert "its config.json does not say so" in told(whole, plain)
    name = "model.layers.0.mlp.gate_proj.weight"
    assert f"{name} of {folder} is [128, 64], and its config.json makes it [96, 64]" in told(
        whole, config | {"intermediate_size": 96}
    )


def test_a_head_that_is_quantised_in_the_files_trains_and_merges(nf4, dataset, tmp_path):
    original, _ = nf4
    base = quantize(original, tmp_path / "base", NF4 | {"llm_int8_skip_modules": ["q_proj"]})
    out = tmp_path / "out"
    assert main(fit(out, base, dataset, "--trainer.max_steps", "2")) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["run"]["quantization"] == "nf4, 13 of 15 linears"
    assert summary["verdict"]["merges"]["dequantized"]["kl"] < 0.01
    merged, before = load_file(out / "final_model" / "model.safetensors"), load_file(original / "model.safetensors")
    assert torch.equal(merged["lm_head.weight"], BaseModel(base).get("lm_head.weight"))
    assert not torch.equal(merged["lm_head.weight"], before["lm_head.weight"])


def test_a_skip_list_without_the_head_quantises_it_on_load_and_verdict_and_merge_know(nf4, dataset, tmp_path):
    original, _ = nf4
    skipped = [*on_load(NF4), "--model.quantization_config.llm_int8_skip_modules", "[q_proj]"]
    out = tmp_path / "out"
    more = ["--trainer.max_steps", "2", "--export.merge_base", "dequantized"]
    assert main(fit(out, original, dataset, *skipped, *more)) == 0
    verdict = json.loads((out / "summary.json").read_text())["verdict"]
    assert verdict["merges"]["dequantized"]["kl"] < 0.01 < verdict["merges"]["original"]["kl"]
    held = planned_weights(load_config(original), BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["q_proj"]), CPU)
    merged, before = load_file(out / "final_model" / "model.safetensors"), load_file(original / "model.safetensors")
    head, plain = "lm_head.weight", "model.embed_tokens.weight"
    assert torch.equal(merged[head], held[head].round_trip(before[head])) and plain not in held
    assert torch.equal(merged[plain], before[plain])


def test_the_start_says_which_quantisation_holds(nf4, dataset, tmp_path, caplog):
    _, base = nf4
    assert main(["inspect", *fit(tmp_path / "out", base, dataset, *on_load({"load_in_8bit": True}))[1:]]) == 0
    told = [one.message for one in caplog.records if "quantised already" in one.message]
    assert told == ["the base is quantised already and stays as its files are; model.quantization_config is not used"]


def test_the_language_model_of_files_with_a_vision_tower_is_loaded_by_their_headers(tmp_path):
    """A dynamic skip list names modules as in the whole model, which transformers leaves as it is."""
    text = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2)
    text |= dict(num_key_value_heads=1, head_dim=32, linear_num_key_heads=1, linear_num_value_heads=2)
    text |= dict(linear_key_head_dim=32, linear_value_head_dim=32, tie_word_embeddings=False)
    vision = dict(depth=1, hidden_size=32, intermediate_size=32, num_heads=1, out_hidden_size=64, patch_size=4)
    config = Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=False)
    whole = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    whole.save_pretrained(tmp_path / "original")
    inner = "model.language_model.layers"
    skipped = ["lm_head", "model.visual", f"{inner}.0.linear_attn", f"{inner}.3.mlp"]
    options = BitsAndBytesConfig(**NF4, bnb_4bit_use_double_quant=True, llm_int8_skip_modules=skipped)
    held_whole = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "original", dtype=torch.bfloat16, quantization_config=options, device_map={"": "cpu"}
    )
    base = tmp_path / "base"
    held_whole.save_pretrained(base)
    read = load_config(base)
    check_stored(base, empty_model(read))
    quantization = usable(None, read)
    model = load_base(base, quantization, CPU)
    held = loaded_weights(model)
    assert (
        held == planned_weights(read, usable(None, read), CPU, base) == planned_weights(read, usable(None, read), CPU)
    )
    assert len(held) == 23 and not any(".0.linear_attn" in name or ".3.mlp" in name for name in held)
    # The names in config.json are for what is not downloaded yet.
    rename_skipped(base, ["lm_head", "somewhere.else"])
    model = load_base(base, quantization, CPU)
    theirs = dict(held_whole.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, theirs[name.replace("model.", "model.language_model.", 1)]), name
    assert BaseModel(base).where == {
        name: (base / path.name, dtype, shape)
        for name, (path, dtype, shape) in BaseModel(tmp_path / "original").where.items()
    }
