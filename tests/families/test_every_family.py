"""Every family from its files to what is served: trained, merged, asked by transformers, PEFT and llama.cpp."""

import json
import re
import warnings

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.data.batches import collate
from qwen_lit.export.gguf import write_plain
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.model.load import read_adapted, read_model
from qwen_lit.model.loss import reference_loss
from tests.ask_llama import answer
from tests.runs import adapter, stopping
from tests.tiny import FAMILIES as TINY
from tests.tiny import config_file, make_model, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
CPU = torch.device("cpu")
IDS = torch.arange(20, 60)[None]


def fit(kind, base, dataset, out, *options):
    """Five steps of a family's own targets, with dropout; returns what the command returns."""
    given = {
        "--config": "configs/qwen7b.yaml",
        "--output_dir": out,
        "--model.model_name_or_path": base,
        "--model.lora_config.target_modules": json.dumps(list(FAMILIES[kind].targets)),
        "--model.lora_config.r": 4,
        "--model.learning_rate": 0.01,
        "--data.dataset_path": dataset,
        "--data.batch_size": 4,
        "--data.val_size": 4,
        "--trainer.accelerator": "cpu",
        "--trainer.accumulate_grad_batches": 1,
        "--trainer.max_epochs": 1,
        "--trainer.enable_progress_bar": "false",
        "--samples.rows": 0,
        "--export.smoke_rows": 0,
        "--export.merge_base": "dequantized",
    }
    return main(["fit", *(str(part) for pair in given.items() for part in pair), *options])


@pytest.fixture(params=TINY, scope="module")
def trained(request, tokenizer, dataset, tmp_path_factory):
    """A family's name, its tiny base, and the output folder of a short fit."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    base, out = make_model(kind, folder / "base", tokenizer), folder / "out"
    assert fit(kind, base, dataset, out) == 0
    return kind, base, out


def whole_class(base):
    """transformers' own class for all that the files hold."""
    return getattr(transformers, config_file(base)["architectures"][0])


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_merge_has_the_names_dtypes_and_config_of_the_base_and_touches_nothing_else(trained):
    kind, base, out = trained
    before, after = tensors_of(base), tensors_of(out / "final_model")
    assert {name: (one.dtype, one.shape) for name, one in after.items()} == {
        name: (one.dtype, one.shape) for name, one in before.items()
    }
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    targets = tuple(f"{one}.weight" for one in FAMILIES[kind].targets)
    assert changed and not any("visual" in name or name.startswith("mtp") for name in changed)
    assert {
        name for name in before if name.endswith(targets) and "visual" not in name and "mtp" not in name
    } <= changed
    assert not {name for name in changed if before[name].dtype == torch.float32}
    assert config_file(out / "final_model") == config_file(base)


def test_the_merge_answers_alike_as_language_model_and_as_a_whole(trained):
    _, base, out = trained
    ours = logits(read_model(out / "final_model", CPU, dtype=torch.float32))
    assert torch.equal(ours, logits(whole_class(base).from_pretrained(out / "final_model", dtype=torch.float32)))
    if config_file(base)["model_type"] not in ("qwen3_vl", "qwen2_5_vl"):
        # For these transformers has no class of the language model alone.
        plain = AutoModelForCausalLM.from_pretrained(out / "final_model", dtype=torch.float32)
        assert torch.equal(ours, logits(plain))


def test_the_adapter_works_on_the_whole_model_by_plain_peft_as_on_the_language_model(trained):
    _, base, out = trained
    whole = whole_class(base).from_pretrained(base, dtype=torch.float32)
    plain = logits(whole)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = PeftModel.from_pretrained(whole, out / "lora_adapter")
    ours = logits(read_adapted(read_model(base, CPU, dtype=torch.float32), out / "lora_adapter"))
    # PEFT adds the share in a shared expert to its weight, and ours beside it.
    assert not torch.allclose(ours, plain, atol=0.1) and torch.allclose(logits(adapted), ours, atol=1e-4)
    assert not any("visual" in name for name, one in adapted.named_modules() if hasattr(one, "lora_A"))


def test_plain_peft_takes_the_adapter_on_the_language_models_class_by_a_mapping_of_names(trained):
    kind, base, out = trained
    if kind in ("qwen3_vl", "qwen2_5_vl"):
        # transformers has no class of their language model alone.
        return
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    mapping = {r"^model\.language_model\.": "model."} if FAMILIES[kind].text else None
    found = logits(PeftModel.from_pretrained(plain, out / "lora_adapter", key_mapping=mapping))
    ours = logits(read_adapted(read_model(base, CPU, dtype=torch.float32), out / "lora_adapter"))
    assert torch.allclose(found, ours, atol=1e-4)


def test_older_and_odd_configs_of_qwen2_5_vl_are_read_alike(tokenizer, tmp_path):
    base = make_model("qwen2_5_vl", tmp_path, tokenizer)
    config = config_file(base)
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    older = {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    flat = {key: value for key, value in text.items() if key not in ("model_type", "layer_types")}
    wanted = logits(read_model(base, CPU, dtype=torch.float32))
    (base / "config.json").write_text(json.dumps(config | flat | older), encoding="utf-8")
    assert torch.equal(logits(read_model(base, CPU, dtype=torch.float32)), wanted)
    empty = config | {"text_config": text | {"rope_parameters": rope, "quantization_config": {}}}
    (base / "config.json").write_text(json.dumps(empty), encoding="utf-8")
    assert torch.equal(logits(read_model(base, CPU, dtype=torch.float32)), wanted)


def test_the_merge_answers_as_was_trained(trained):
    _, _, out = trained
    verdict = json.loads((out / "summary.json").read_text(encoding="utf-8"))["verdict"]
    dequantized = verdict["merges"]["dequantized"]
    assert abs(dequantized["loss"] - verdict["adapter_loss"]) < 0.02 and dequantized["kl"] < 0.002


def test_a_packed_row_has_the_loss_that_it_has_alone(trained):
    _, base, out = trained
    model = read_adapted(read_model(base, CPU, dtype=torch.float32), out / "lora_adapter").get_base_model()
    family, draw = family_of(model.config), np.random.default_rng(0)
    rows = [(draw.integers(0, 300, length), np.array([[0, length]])) for length in (37, 3, 21, 66)]
    with torch.no_grad():
        alone = [float(reference_loss(model, family, collate([row], 0))) for row in rows]
        for count in range(1, len(rows) + 1):
            packed = float(reference_loss(model, family, collate(rows[:count], 0)))
            assert packed == pytest.approx(sum(alone[:count]), rel=1e-4), count


def test_a_run_that_was_stopped_goes_on_to_the_same_adapter(trained, dataset, tmp_path):
    kind, base, out = trained
    assert fit(kind, base, dataset, tmp_path, *stopping(3), "--export.merge", "false") == 143
    assert fit(kind, base, dataset, tmp_path, "--ckpt_path", "last", "--export.merge", "false") == 0
    whole, resumed = adapter(out), adapter(tmp_path)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_plan_names_the_engine_and_the_memory(trained, dataset, tmp_path, capsys):
    kind, base, _ = trained
    given = ["--config", "configs/qwen7b.yaml", "--output_dir", str(tmp_path), "--data.dataset_path", str(dataset)]
    given += ["--model.model_name_or_path", str(base), "--trainer.accelerator", "cpu"]
    assert main(["plan", *given]) == 0
    said = capsys.readouterr().out
    fast = kind in ("qwen2", "qwen3", "qwen2_5_vl", "qwen3_vl")
    assert ("engine      on a GPU fast" in said) == fast and ("on a GPU reference" in said) != fast
    assert re.search(r"\d GiB", said)


def test_llama_cpp_computes_the_gguf_of_the_merge_as_transformers_computes_the_merge(trained, tokenizer, tmp_path):
    _, base, out = trained
    write_plain(out / "final_model", tmp_path / "model.gguf", "f16", tokenizer)
    theirs = answer(tmp_path / "model.gguf", IDS[0].tolist(), len(tokenizer), steps=6)
    asked = torch.cat([IDS, theirs[:-1].argmax(-1)[None]], 1)
    with torch.no_grad():
        model = whole_class(base).from_pretrained(out / "final_model", dtype=torch.float32).eval()
        ours = model(input_ids=asked).logits[0, IDS.shape[1] - 1 :].log_softmax(-1)
    # llama.cpp rounds to float16 what it multiplies by float16 weights.
    assert (theirs - ours).abs().max() < 0.04 and ours.std() > 0.4
    assert all(row[token] > row.max() - 0.04 for row, token in zip(ours, theirs.argmax(-1), strict=True))
