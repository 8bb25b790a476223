"""What a base's headers and config tell before anything is trained on it."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from qwen_lit.cli import main
from qwen_lit.errors import UserError
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.base_files import check_stored_model
from qwen_lit.model.precision import check_precision
from tests.tiny import FAMILIES as TINY
from tests.tiny import make_model


@pytest.mark.parametrize("kind", TINY)
def test_the_files_of_every_family_are_those_of_its_config(kind, tokenizer, tmp_path):
    check_stored_model(make_model(kind, tmp_path / "model", tokenizer))


def changed(folder, to, **tensors):
    """A copy of a model with other tensors; None takes one away."""
    shutil.copytree(folder, to)
    found = load_file(to / "model.safetensors") | tensors
    save_file({name: one for name, one in found.items() if one is not None}, to / "model.safetensors")
    return to


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({K: None}, f"lacks {K}, which its config.json speaks of"),
        ({K: None, "model.norm.weight": None}, "lacks model.norm.weight and 1 more"),
        ({"lm_head.weight": None}, "lacks lm_head.weight"),
        ({"model.layers.2.mlp.up_proj.weight": torch.zeros(2, 2)}, "holds model.layers.2.mlp.up_proj.weight, which"),
        ({K: torch.zeros(64, 32)}, f"{K} of FOLDER is \\[64, 32\\], and its config.json makes it \\[32, 64\\]"),
        ({K: torch.zeros(32, 64).to(torch.float8_e4m3fn)}, f"{K} of FOLDER is F8_E4M3, which is neither trained on"),
        ({K: torch.zeros(32, 64, dtype=torch.int32)}, f"{K} of FOLDER is I32, quantised in a way that is not known"),
    ],
)
def test_files_of_another_model_than_the_configs_are_refused(tensors, told, model_folder, tmp_path):
    folder = changed(model_folder, tmp_path / "model", **tensors)
    with pytest.raises(UserError, match=told.replace("FOLDER", str(folder))):
        check_stored_model(folder)


def test_fit_refuses_such_files_before_it_loads_them(arguments, model_folder, tmp_path, monkeypatch, capsys):
    folder = changed(model_folder, tmp_path / "model", **{K: None})
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main([*arguments, "--model.model_name_or_path", str(folder)]) == 2
    assert f"lacks {K}" in capsys.readouterr().err


def test_what_is_no_part_of_the_language_model_may_be_there(model_folder, tmp_path, tokenizer, caplog):
    other = {"score.weight": torch.zeros(1), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}
    check_stored_model(changed(model_folder, tmp_path / "model", **other))
    # A tied head may be stored again.
    tied = make_model("qwen3", tmp_path / "tied", tokenizer, tie_word_embeddings=True)
    head = load_file(tied / "model.safetensors")["model.embed_tokens.weight"].clone()
    check_stored_model(changed(tied, tmp_path / "again", **{"lm_head.weight": head}))
    assert not caplog.records


def test_multi_token_prediction_that_is_announced_and_not_there_is_told(tokenizer, tmp_path, caplog):
    folder = make_model("qwen3_5", tmp_path / "model", tokenizer)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    check_stored_model(folder)
    assert not caplog.records
    ahead = [name for name in load_file(folder / "model.safetensors") if name.startswith("mtp.")]
    check_stored_model(changed(folder, tmp_path / "without", **dict.fromkeys(ahead)))
    assert "announces multi-token prediction (mtp_num_hidden_layers: 1)" in caplog.text


def test_float16_is_refused_where_gradients_are_not_finite_in_it():
    half = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    for kind, whole in (("qwen3_5", False), ("qwen3_moe", False), ("qwen3_5_moe_text", False), ("qwen3", True)):
        family = FAMILIES[kind]
        check_precision(family, "bf16-mixed", None)
        assert family.float16 is whole
        if whole:
            check_precision(family, "16-mixed", half)
            continue
        with pytest.raises(UserError, match=f"trainer.precision is 16-mixed, but the gradients of a {kind} model"):
            check_precision(family, "16-mixed", None)
        with pytest.raises(UserError, match="bnb_4bit_compute_dtype is float16"):
            check_precision(family, "bf16-mixed", half)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--export.gguf", "q8_0", "--export.merge", "false"], "export.gguf is q8_0, but export.merge is false"),
        (["--export.merge_base", "auto", "--export.verdict_rows", "0"], "export.merge_base is auto, which measures"),
        (
            ["--export.merge_base", "dequantized", "--model.quantization_config", "null"],
            "export.merge_base is dequantized, but the base is held in bf16",
        ),
        (
            ["--model.lora_config.target_modules", "[embed_tokens, q_proj]", "--model.lora_config.use_dora", "true"],
            "use_dora on model.embed_tokens cannot be merged",
        ),
    ],
)
def test_an_export_that_will_fail_is_refused_before_training(options, told, arguments, monkeypatch, capsys):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main([*arguments, *options]) == 2
    assert told in capsys.readouterr().err


def test_a_gguf_file_is_refused_by_what_the_files_are_and_not_by_what_is_trained(
    arguments, tokenizer, tmp_path, monkeypatch, capsys
):
    """A language model that can be written as GGUF by itself, in files that cannot."""
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    monkeypatch.setitem(FAMILIES, "qwen3_vl", replace(FAMILIES["qwen3_vl"], gguf=None))
    base = str(make_model("qwen3_vl", tmp_path / "model", tokenizer))
    assert main([*arguments, "--model.model_name_or_path", base, "--export.gguf", "q8_0"]) == 2
    assert "export.gguf is q8_0, but this qwen3_vl model cannot be written as GGUF" in capsys.readouterr().err


def test_a_weight_that_two_files_hold_is_told_before_training(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "second.safetensors")
    weight_map = {K: "model.safetensors", "lm_head.weight": "second.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match="is in another shard too; fetch the model again"):
        check_stored_model(folder)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_convolution_with_an_adapter_is_refused_as_it_cannot_be_merged(tokenizer, tmp_path):
    from peft import LoraConfig

    from qwen_lit.export.mergeable import check_mergeable
    from tests.tiny import config_of

    config = config_of("qwen3_5_text", 96)
    check_mergeable(LoraConfig(target_modules=["in_proj_qkv", "q_proj"]), config)
    with pytest.raises(UserError, match="match model.layers.0.linear_attn.conv1d, a Conv1d, cannot be merged"):
        check_mergeable(LoraConfig(r=128, target_modules=["conv1d", "q_proj"]), config)


def test_a_merged_model_that_the_disk_has_no_room_for_is_refused_before_training(
    arguments, model_folder, monkeypatch, capsys
):
    monkeypatch.setattr("qwen_lit.export.space.free_bytes", lambda folder: 1000)
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main(arguments) == 2
    told = capsys.readouterr().err
    size = (model_folder / "model.safetensors").stat().st_size / 1e6
    assert f"final_model will take {size:.2f} MB, and its disk has 0.00 MB free; make room" in told
