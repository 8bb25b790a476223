"""What the base is held in: what is said beforehand, what is loaded, and what is merged are one."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.cli import main
from qwen_lit.commands.plan import static_bytes
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.export import merge_adapter
from qwen_lit.model.load import load_base
from qwen_lit.quantization import described, loaded_weights, planned_weights, usable
from tests.export.test_merge import make_adapter, make_base, tensors

pytestmark = pytest.mark.usefixtures("bf16")
CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
INT8 = {"load_in_8bit": True}
CONFIGURATIONS = {
    "neither": ({}, "none, bf16"),
    "4 bits are off": ({"load_in_4bit": False, "bnb_4bit_quant_type": "nf4"}, "none, bf16"),
    "fp4": ({"load_in_4bit": True}, "fp4, 14 of 15 linears"),
    "nf4": (NF4, "nf4, 14 of 15 linears"),
    "double": (NF4 | {"bnb_4bit_use_double_quant": True}, "nf4, double, 14 of 15 linears"),
    "double fp4": ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "fp4, double, 14 of 15 linears"),
    "storage": (NF4 | {"bnb_4bit_quant_storage": "bfloat16"}, "nf4, 14 of 15 linears"),
    "compute float16": (NF4 | {"bnb_4bit_compute_dtype": "float16"}, "nf4, 14 of 15 linears"),
    "int8": (INT8, "int8, 14 of 15 linears"),
    "threshold": (INT8 | {"llm_int8_threshold": 0.0}, "int8, 14 of 15 linears"),
    "nothing skipped": (
        NF4 | {"llm_int8_skip_modules": []},
        {"qwen2": "nf4, 15 of 15 linears", "qwen3": "nf4, 14 of 15 linears"},
    ),
    "without the head": (
        NF4 | {"llm_int8_skip_modules": ["q_proj"]},
        {"qwen2": "nf4, 13 of 15 linears", "qwen3": "nf4, 12 of 15 linears"},
    ),
    "int8 without the head": (
        INT8 | {"llm_int8_skip_modules": ["q_proj"]},
        {"qwen2": "int8, 13 of 15 linears", "qwen3": "int8, 12 of 15 linears"},
    ),
    "with the head": (NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}, "nf4, 12 of 15 linears"),
    "a path": (NF4 | {"llm_int8_skip_modules": ["lm_head", "model.layers.1"]}, "nf4, 7 of 15 linears"),
    "a pattern": (NF4 | {"llm_int8_skip_modules": ["lm_head", r"model\..*\.mlp"]}, "nf4, 8 of 15 linears"),
    "a suffix": (NF4 | {"llm_int8_skip_modules": ["lm_head", "_proj"]}, "none, bf16"),
    "not a part of a name": (NF4 | {"llm_int8_skip_modules": ["lm_head", "attn"]}, "nf4, 14 of 15 linears"),
    "offload": (NF4 | {"llm_int8_enable_fp32_cpu_offload": True}, "none, bf16"),
}


@pytest.fixture(params=["qwen2", "qwen3"], scope="module")
def base(request, tmp_path_factory):
    """A head of its own, or one that is tied to the embedding."""
    folder = make_base(tmp_path_factory.mktemp(request.param) / "base", request.param)
    adapter = make_adapter(folder, folder.parent / "adapter", target_modules=["v_proj"])
    return request.param, folder, adapter


def real(model):
    """Kind, block and nested scales of each weight that bitsandbytes holds, from its own state."""
    found = {}
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if isinstance(module, Linear4bit) and state is not None:
            found[f"{name}.weight"] = (state.quant_type, state.blocksize, state.nested)
        elif isinstance(module, Linear8bitLt) and module.weight.dtype == torch.int8:
            found[f"{name}.weight"] = ("int8", 0, False)
    return found


def dequantized(weight):
    state = getattr(weight, "quant_state", None)
    if state is not None:
        return dequantize_4bit(weight.data, state)
    return int8_vectorwise_dequant(weight.data, weight.SCB) if weight.dtype == torch.int8 else weight


def memory(weight):
    """Bytes of the numbers and their scales, without the tables that all weights of a kind need."""
    state, size = getattr(weight, "quant_state", None), weight.nbytes
    if state is not None:
        size += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return size + (weight.SCB.nbytes if weight.dtype == torch.int8 else 0)


@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_what_is_said_is_what_is_loaded_and_what_is_merged(base, tmp_path, case):
    kind, folder, adapter = base
    options, words = CONFIGURATIONS[case]
    config = AutoConfig.from_pretrained(folder)
    quantization = usable(BitsAndBytesConfig(**options), config)
    planned = planned_weights(config, quantization, CPU)
    model = load_base(str(folder), quantization, CPU)
    assert {name: (one.kind, one.blocksize, one.double) for name, one in planned.items()} == real(model)
    assert loaded_weights(model) == planned and bool(planned) == (words != "none, bf16")
    assert described(planned, 15) == (words if isinstance(words, str) else words[kind])

    weights = dict(model.named_parameters())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    empty.requires_grad_(False)
    assert static_bytes(empty, planned) == sum(memory(weight) for weight in weights.values())

    wanted = {name: dequantized(weights[name]).float() for name in tensors(folder)}
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in wanted:
        key = "base_model.model." + name.removesuffix(".weight")
        if "v_proj.weight" in name:
            wanted[name] += 2.0 * (lora[key + ".lora_B.weight"] @ lora[key + ".lora_A.weight"])
    merge_adapter(adapter, folder, tmp_path / "out", merge_base="dequantized", held=planned)
    merged = tensors(tmp_path / "out")
    assert merged.keys() == wanted.keys()
    assert all(torch.equal(merged[name], wanted[name].to(torch.bfloat16)) for name in wanted)

    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj", "k_proj"], task_type="CAUSAL_LM"))
    assert loaded_weights(peft) == planned
    kinds = {one.kind for one in planned.values()}
    fast = "int8" not in kinds and "lm_head.weight" not in planned
    assert (unsupported_reason(peft, CPU) is None) == fast
    assert peft(input_ids=torch.arange(6)[None]).logits.isfinite().all()


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_base_in_another_dtype_is_quantised_from_bf16(tmp_path, options, dtype):
    folder = make_base(tmp_path / "base", "qwen2")
    for path in folder.glob("*.safetensors"):
        numbers = {name: (value.float() * 1.003).to(dtype) for name, value in load_file(path).items()}
        save_file(numbers, path, {"format": "pt"})
    adapter = make_adapter(folder, tmp_path / "adapter", target_modules=["v_proj"])
    model = load_base(str(folder), BitsAndBytesConfig(**options), CPU)
    merge_adapter(adapter, folder, tmp_path / "out", merge_base="dequantized", held=loaded_weights(model))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(tensors(tmp_path / "out")[name], dequantized(dict(model.named_parameters())[name]).to(dtype))


def test_the_configuration_of_the_user_is_left_as_it_is(base):
    given = BitsAndBytesConfig(**NF4, llm_int8_skip_modules=["q_proj"])
    usable(given, AutoConfig.from_pretrained(base[1]))
    assert given.llm_int8_skip_modules == ["q_proj"]


REFUSED = [
    (["bnb_4bit_quant_type=int4"], "bnb_4bit_quant_type is 'int4'; write nf4 or fp4"),
    (["load_in_4bit=false", "load_in_8bit=true", "llm_int8_has_fp16_weight=true"], "llm_int8_has_fp16_weight keeps"),
    (["llm_int8_skip_modules=['*proj']"], "'*proj' is no name and no pattern"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED)
def test_what_bitsandbytes_cannot_hold_is_refused_before_the_model_is_loaded(
    arguments, options, words, capsys, monkeypatch
):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main([*arguments, *(f"--model.quantization_config.{one}" for one in options)]) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


def test_a_quantised_weight_is_not_trained_whole(arguments, capsys, monkeypatch):
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    whole = "--model.lora_config.modules_to_save"
    assert main([*arguments, whole, "[norm,down_proj]"]) == 2
    told = capsys.readouterr().err
    assert "names down_proj" in told and "held in nf4" in told and "add down_proj to" in told
    skipped = "--model.quantization_config.llm_int8_skip_modules=['q_proj']"
    assert main([*arguments, whole, "[lm_head]", skipped]) == 2
    assert "names lm_head, but lm_head is held in nf4" in capsys.readouterr().err


@pytest.fixture
def short(arguments):
    return [
        *arguments,
        "--trainer.max_steps",
        "2",
        "--data.val_size",
        "5",
        "--export.merge_base",
        "auto",
        "--export.smoke_rows",
        "0",
        "--samples.rows",
        "0",
    ]


def test_4_bits_that_are_off_train_and_merge_as_no_quantisation_does(short, tmp_path, caplog):
    off = [*short, "--model.quantization_config.load_in_4bit", "false", "--output_dir", str(tmp_path / "off")]
    assert main(off) == 0
    assert "sets neither load_in_4bit nor load_in_8bit: the base is held in bf16" in caplog.text
    assert main([*short, "--model.quantization_config", "null", "--output_dir", str(tmp_path / "none")]) == 0
    for file in ("lora_adapter/adapter_model.safetensors", "final_model/model.safetensors"):
        assert (tmp_path / "off" / file).read_bytes() == (tmp_path / "none" / file).read_bytes()
    summary = json.loads((tmp_path / "off" / "summary.json").read_text())
    assert summary["run"]["quantization"] == "none, bf16" and list(summary["verdict"]["merges"]) == ["original"]


def test_8_bits_are_said_measured_and_merged_as_8_bits(short, model_folder, tmp_path, caplog):
    bits = ["--model.quantization_config.load_in_4bit", "false", "--model.quantization_config.load_in_8bit", "true"]
    assert main([*short, *bits, "--export.merge_base", "dequantized"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["run"]["quantization"] == "int8, 14 of 15 linears"
    assert summary["run"]["engine"] == "reference (q_proj is a Linear8bitLt)"
    model = load_base(str(model_folder), BitsAndBytesConfig(**INT8), CPU)
    name = "model.layers.0.mlp.up_proj.weight"
    merged = load_file(tmp_path / "out" / "final_model" / "model.safetensors")
    assert torch.equal(merged[name], dequantized(dict(model.named_parameters())[name]).bfloat16())
    original = load_file(model_folder / "model.safetensors")[name]
    assert 0 < (merged[name] - original).abs().max() <= original.abs().max() / 254 * 1.05
    assert "in int8" in (tmp_path / "out" / "final_model" / "README.md").read_text()
