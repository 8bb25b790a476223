"""Every family from its files to what is served: trained, merged, asked through transformers, PEFT and llama.cpp."""

import json
import warnings

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.export.gguf import write_plain
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.load import read_adapted, read_model
from tests.ask_llama import answer
from tests.tiny import FAMILIES as TINY
from tests.tiny import config_file, make_model, tensors_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT
CPU = torch.device("cpu")
IDS = torch.arange(20, 60)[None]


@pytest.fixture(params=TINY, scope="module")
def trained(request, tokenizer, dataset, tmp_path_factory):
    """A family's name, its tiny base, and the output folder of a short fit of its own targets."""
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    base, out = make_model(kind, folder / "base", tokenizer), folder / "out"
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
    assert main(["fit", *(str(part) for pair in given.items() for part in pair)]) == 0
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
    assert not torch.allclose(ours, plain, atol=0.1) and torch.equal(logits(adapted), ours)
    assert not any("visual" in name for name, one in adapted.named_modules() if hasattr(one, "lora_A"))


def test_the_merge_answers_as_was_trained(trained):
    _, _, out = trained
    verdict = json.loads((out / "summary.json").read_text(encoding="utf-8"))["verdict"]
    dequantized = verdict["merges"]["dequantized"]
    assert abs(dequantized["loss"] - verdict["adapter_loss"]) < 0.02 and dequantized["kl"] < 0.002


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
