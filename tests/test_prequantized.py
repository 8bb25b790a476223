"""Bases whose own files bitsandbytes has quantised, row by row: they train, go on, merge and answer as a base that is
quantised on load from the same original."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch.nn import Linear
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Qwen2Config,
    Qwen3_5Config,
    Qwen3Config,
)

from qwen_lit.cli import main
from qwen_lit.commands.chat_model import choose, load
from qwen_lit.engine.engine import FastEngine, unsupported_reason
from qwen_lit.export.folder import BaseModel
from qwen_lit.export.verdict import _Weights
from qwen_lit.families.table import family_of
from qwen_lit.generate import generate
from qwen_lit.model.load import add_adapter, empty_model, load_base, load_config, read_model
from qwen_lit.model.loss import reference_loss
from qwen_lit.model.stored import check_stored
from qwen_lit.prequantized import stored_in
from qwen_lit.quantization import loaded_weights, planned_weights, usable
from tests.engine.test_engine import batch
from tests.runs import adapter, same, trace

pytestmark = [pytest.mark.usefixtures("bf16"), pytest.mark.filterwarnings("ignore")]
CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DYNAMIC = ["lm_head", "model.language_model.layers.0.mlp", "model.language_model.layers.1.self_attn.q_proj", "visual"]
SKIPPED = [one.replace("language_model.", "") for one in DYNAMIC]
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


def make_original(kind: str, tokenizer, path: Path, seed: int = 0) -> Path:
    sizes = dict(vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, initializer_range=0.08)
    torch.manual_seed(seed)
    if kind == "qwen2":
        config = Qwen2Config(tie_word_embeddings=False, **sizes)
    else:
        config = Qwen3Config(tie_word_embeddings=True, head_dim=16, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for name, value in model.named_parameters():
        if value.dim() == 1:
            value.data.normal_(float("norm" in name), 0.1)
        # fp16 has no numbers as small as bf16 has.
        value.data[value.abs() < 2.0**-12] = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def quantize(original: Path, path: Path, options: dict, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As those are made that people download: transformers' own quantised model, saved."""
    model = AutoModelForCausalLM.from_pretrained(
        original, dtype=dtype, quantization_config=BitsAndBytesConfig(**options), device_map={"": "cpu"}
    )
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(original / file, path)
    return path


def rename_skipped(folder: Path, names: list[str]) -> None:
    """Name the modules that are left out as in a wrapper with a vision tower."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = names
    (folder / "config.json").write_text(json.dumps(config))


def fit(out: Path, base: Path, dataset: Path, *options: str) -> list[str]:
    given = {
        "config": "configs/qwen7b.yaml",
        "output_dir": out,
        "model.model_name_or_path": base,
        "model.lora_config.r": 4,
        "model.lora_config.target_modules": "[q_proj,v_proj,up_proj,down_proj]",
        "data.dataset_path": dataset,
        "data.val_size": 5,
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 4,
        "trainer.accumulate_grad_batches": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.log_every_n_steps": 1,
        "model.learning_rate": 0.01,
        "checkpoint.every_n_train_steps": 2,
        "export.smoke_rows": 0,
        "samples.rows": 0,
    }
    traced = ["--trainer.callbacks+=qwen_lit.callbacks.trace.Trace", f"--trainer.callbacks.path={out / 'trace.jsonl'}"]
    return ["fit", *(text for key, value in given.items() for text in (f"--{key}", str(value))), *traced, *options]


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


def on_load(options: dict) -> list[str]:
    plain = {"load_in_4bit": False, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False} | options
    return [f"--model.quantization_config.{key}={value}" for key, value in plain.items()]


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


def stored_kinds(base: Path) -> set[str]:
    return {one.kind for one in stored_in(base).values()}


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
    monkeypatch.setattr("qwen_lit.model.module.load_base", lambda *a: pytest.fail("the model is loaded"))


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
    stored = ["--model.shard_base", "true", "--model.quantization_config.bnb_4bit_quant_storage", "bfloat16"]
    assert "the files of this base hold theirs in uint8" in refused(capsys, fit(out, base, dataset, *stored))
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
