"""What llama.cpp wants otherwise than transformers: orders, values and layouts of hybrids and mixtures."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from qwen_lit.errors import UserError
from qwen_lit.export import ExportError
from qwen_lit.export import gguf_numbers as numbers
from qwen_lit.export.gguf import check_form, write_plain
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.load import read_model
from tests.ask_llama import answer
from tests.tiny import DELTA_NET, EXPERTS, make_model

PROMPT = list(range(20, 60))
HYBRIDS = {
    "as many key heads as value heads": ("qwen3_5_text", {**DELTA_NET, "linear_num_key_heads": 4}),
    "three value heads a key head": ("qwen3_5_text", {**DELTA_NET, "linear_num_value_heads": 6}),
    "three value heads a key head, joined": ("qwen3_next", {**DELTA_NET, "linear_num_value_heads": 6}),
    "four key heads of two, with experts": (
        "qwen3_5_moe_text",
        {**DELTA_NET, "linear_num_key_heads": 4, "linear_num_value_heads": 8},
    ),
    "tied": ("qwen3_5", {"tie_word_embeddings": True}),
}


def contents(path):
    """The tensors of a GGUF file, as it holds them."""
    return {
        one.name: (one.tensor_type, one.shape.tolist(), one.data.tobytes()) for one in gguf.GGUFReader(path).tensors
    }


def numbers_of(path):
    """The tensors of a GGUF file in float32, in numpy's order."""
    found = gguf.GGUFReader(path).tensors
    return {one.name: gguf.quants.dequantize(one.data, one.tensor_type) for one in found}


def fields_of(path):
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def change(folder, to, tensors):
    """A copy of a model's folder with other tensors."""
    shutil.copytree(folder, to)
    save_file({name: one.contiguous() for name, one in tensors.items()}, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.fixture(scope="module")
def mixture(tokenizer, tmp_path_factory):
    """A Qwen3.5 mixture of experts with all that its release has, and its GGUF file."""
    folder = tmp_path_factory.mktemp("mixture")
    base = make_model("qwen3_5_moe", folder / "base", tokenizer)
    write_plain(base, folder / "model.gguf", "bf16", tokenizer)
    return base, folder / "model.gguf"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HYBRIDS)
def test_llama_cpp_computes_a_hybrid_as_transformers_does(tmp_path, tokenizer, case):
    kind, options = HYBRIDS[case]
    base = make_model(kind, tmp_path / "base", tokenizer, **options)
    write_plain(base, tmp_path / "model.gguf", "f16", tokenizer)
    theirs = answer(tmp_path / "model.gguf", PROMPT, len(tokenizer), steps=3)
    asked = torch.tensor([PROMPT + theirs[:-1].argmax(-1).tolist()])
    with torch.no_grad():
        model = read_model(base, torch.device("cpu"), dtype=torch.float32).eval()
        ours = model(input_ids=asked).logits[0, len(PROMPT) - 1 :].log_softmax(-1)
    # llama.cpp rounds to float16 what it multiplies by float16 weights.
    assert (theirs - ours).abs().max() < 0.04 and ours.std() > 0.4


def test_value_heads_decay_and_norms_are_as_llama_cpp_takes_them(mixture):
    base, path = mixture
    given = {name: one.float().numpy() for name, one in load_file(base / "model.safetensors").items()}
    found, place = numbers_of(path), "model.language_model.layers.0"
    # Value heads 0 and 1 are of the first key, 2 and 3 of the second one.
    order = [0, 2, 1, 3]
    values = np.concatenate([np.arange(16) + 16 * head for head in order])
    mixed = np.concatenate([np.arange(64), 64 + values])
    delta = f"{place}.linear_attn"
    wanted = {
        "attn_qkv.weight": given[f"{delta}.in_proj_qkv.weight"][mixed],
        "attn_gate.weight": given[f"{delta}.in_proj_z.weight"][values],
        "ssm_alpha.weight": given[f"{delta}.in_proj_a.weight"][order],
        "ssm_beta.weight": given[f"{delta}.in_proj_b.weight"][order],
        "ssm_out.weight": given[f"{delta}.out_proj.weight"][:, values],
        "ssm_conv1d.weight": given[f"{delta}.conv1d.weight"][mixed, 0],
        "ssm_a": -np.exp(given[f"{delta}.A_log"])[order],
        "ssm_dt.bias": given[f"{delta}.dt_bias"][order],
        "ssm_norm.weight": given[f"{delta}.norm.weight"],
        "attn_norm.weight": given[f"{place}.input_layernorm.weight"] + 1,
    }
    for name, one in wanted.items():
        np.testing.assert_allclose(found[f"blk.0.{name}"], one, rtol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found["output_norm.weight"], given["model.language_model.norm.weight"] + 1)


def test_the_layer_that_predicts_further_is_a_block_behind_the_others(mixture):
    base, path = mixture
    fields, found = fields_of(path), numbers_of(path)
    assert fields["qwen35moe.block_count"] == 3 and fields["qwen35moe.nextn_predict_layers"] == 1
    assert fields["qwen35moe.attention.recurrent_layers"] == [True, False, False]
    given = load_file(base / "model.safetensors")
    np.testing.assert_array_equal(found["blk.2.nextn.eh_proj.weight"], given["mtp.fc.weight"].float())
    np.testing.assert_array_equal(
        found["blk.2.nextn.hnorm.weight"], given["mtp.pre_fc_norm_hidden.weight"].float() + 1
    )
    up = torch.stack([given[f"mtp.layers.0.mlp.experts.{number}.up_proj.weight"] for number in range(4)])
    np.testing.assert_array_equal(found["blk.2.ffn_up_exps.weight"], up.float())


@pytest.mark.parametrize("gone", ["mtp.", "mtp.norm.weight"])
def test_without_a_whole_layer_ahead_the_file_has_none(mixture, tmp_path, tokenizer, gone):
    base, path = mixture
    given = load_file(base / "model.safetensors")
    less = change(base, tmp_path / "less", {name: one for name, one in given.items() if not name.startswith(gone)})
    write_plain(less, tmp_path / "model.gguf", "bf16", tokenizer)
    whole = contents(path)
    wanted = {name: one for name, one in whole.items() if not name.startswith("blk.2.")}
    assert contents(tmp_path / "model.gguf") == wanted and len(wanted) < len(whole)
    fields = fields_of(tmp_path / "model.gguf")
    assert fields["qwen35moe.block_count"] == 2 and "qwen35moe.nextn_predict_layers" not in fields
    assert answer(tmp_path / "model.gguf", PROMPT, len(tokenizer), steps=1).isfinite().all()


def test_experts_held_whole_and_in_parts_make_the_same_file(mixture, tmp_path, tokenizer):
    base, path = mixture
    given = load_file(base / "model.safetensors")
    whole = {name: one for name, one in given.items() if ".experts." not in name}
    for start in {name[: name.index("experts.") + 8] for name in given if ".experts." in name}:
        parts = [[given[f"{start}{n}.{name}_proj.weight"] for n in range(4)] for name in ("gate", "up", "down")]
        gate, up, down = (torch.stack(one) for one in parts)
        whole |= {f"{start}gate_up_proj": torch.cat([gate, up], 1), f"{start}down_proj": down}
    assert len(whole) < len(given)
    write_plain(change(base, tmp_path / "whole", whole), tmp_path / "model.gguf", "bf16", tokenizer)
    assert contents(tmp_path / "model.gguf") == contents(path)


def test_a_few_rows_at_a_time_make_the_same_file_within_that_memory(mixture, tmp_path, tokenizer, monkeypatch):
    base, path = mixture
    largest = []
    monkeypatch.setattr(numbers, "MOST_NUMBERS", 3 * 64)
    kept = numbers.valued
    monkeypatch.setattr(numbers, "valued", lambda one, value: largest.append(one.numel()) or kept(one, value))
    write_plain(base, tmp_path / "model.gguf", "bf16", tokenizer)
    assert contents(tmp_path / "model.gguf") == contents(path) and max(largest) <= 3 * 64


def test_router_convolution_and_shared_gate_stay_whole_and_odd_rows_go_without_blocks(tmp_path, tokenizer):
    given = {**EXPERTS, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32}
    base = make_model("qwen3_next", tmp_path / "base", tokenizer, **given)
    assert write_plain(base, tmp_path / "model.gguf", "q8_0", tokenizer) < 1 / 127
    kinds = {one.name: one.tensor_type.name for one in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    exact = {"ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d"}
    assert {kinds[f"blk.0.{name}.weight"] for name in exact} == {"F32"} and kinds["blk.0.ssm_ba.weight"] == "Q8_0"
    assert kinds["blk.0.ffn_up_exps.weight"] == "Q8_0" and kinds["blk.0.ffn_down_exps.weight"] == "F16"
    assert answer(tmp_path / "model.gguf", PROMPT, len(tokenizer), steps=1).isfinite().all()


def test_a_file_unlike_its_config_is_refused(mixture, tmp_path, tokenizer):
    base, _ = mixture
    other = tmp_path / "other"
    shutil.copytree(base, other)
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["linear_num_value_heads"] = 8
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=r"in_proj_qkv.weight has shape \[128, 64\], which is not what its config"):
        write_plain(other, tmp_path / "model.gguf", "bf16", tokenizer)


HELD = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, **EXPERTS}


@pytest.mark.parametrize(
    ("kind", "said", "why"),
    [
        ("qwen3_moe", {}, "norm_topk_prob is false"),
        ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}, "layer 1 has no experts"),
        ("qwen3_next", {"norm_topk_prob": False}, "norm_topk_prob is false"),
        ("qwen3_5", {"linear_key_head_dim": 64}, "linear_key_head_dim 64 is not linear_value_head_dim 128"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused_before_training(kind, said, why):
    text = {**HELD, **said}
    config = {"model_type": kind, **({"text_config": text} if FAMILIES[kind].text else text)}
    check_form(None, config)
    with pytest.raises(UserError, match=f"export.gguf is q8_0, but this {kind} model cannot be .*: {why}"):
        check_form("q8_0", config)


def test_older_names_of_the_rotation_are_read():
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    sizes = {"max_position_embeddings": 9, "rms_norm_eps": 1e-6, "rope_theta": 5e5, "rope_scaling": rope}
    fields = FAMILIES["qwen2_5_vl"].gguf.fields({"model_type": "qwen2_5_vl", **HELD, **sizes})
    assert fields["rope.dimension_sections"] == [16, 24, 24, 0] and fields["rope.freq_base"] == 5e5
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32}
    fields = FAMILIES["qwen2"].gguf.fields({"model_type": "qwen2", **HELD, **sizes, "rope_scaling": yarn})
    found = {name: value for name, value in fields.items() if name.startswith("rope.scaling")}
    assert found == {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 32768,
        "rope.scaling.yarn_beta_fast": 32.0,
    }
