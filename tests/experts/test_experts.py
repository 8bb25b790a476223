"""Experts in 4 bits compute what transformers' experts do with the same numbers, and are never all in 16 bits."""

import json

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.experts import products
from qwen_lit.experts.loading import Quantize
from qwen_lit.experts.stacked import PARAMETERS, Stacked4bit, held_4bit, stacks
from qwen_lit.export import merge_adapter
from qwen_lit.model.load import add_adapter, load_base, load_config, read_model
from qwen_lit.quantization import loaded_weights, on_disk, planned_weights, usable
from tests.experts.mixtures import EXPERTS, HIDDEN, INNER, mixture

CPU = torch.device("cpu")
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
ADAPTED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES = {
    "qwen3_moe": ("qwen3_moe", False, False),
    "qwen3_moe, fused": ("qwen3_moe", True, False),
    "qwen3_next": ("qwen3_next", False, False),
    "qwen3_5_moe": ("qwen3_5_moe_text", True, True),
    "qwen3_5_moe, each expert by itself": ("qwen3_5_moe_text", False, False),
}


@pytest.fixture
def fp32(monkeypatch):
    """Products in float32, as on a CPU without bfloat16."""
    monkeypatch.setattr("qwen_lit.hardware.cpu_has_bf16", lambda: False)


@pytest.fixture(scope="module", params=CASES)
def folder(request, tmp_path_factory):
    kind, fused, wrapped = CASES[request.param]
    return mixture(tmp_path_factory.mktemp("mixture"), kind, fused, wrapped=wrapped)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe", fused=False)


def quantized(folder, **options):
    return usable(BitsAndBytesConfig(**(NF4 | options)), load_config(folder))


def adapted(folder, **options):
    """A base in 4 bits, and an adapter on it that changes what it says."""
    torch.manual_seed(1)
    settings = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": ADAPTED, **options}
    model = add_adapter(load_base(folder, quantized(folder), CPU), LoraConfig(**settings), checkpointing=True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def plain(folder, model):
    """transformers' own model and experts, with the numbers that a base in 4 bits computes with."""
    reference = read_model(folder, CPU, dtype=torch.float32)
    reference.config._experts_implementation = "eager"
    modules = dict(reference.named_modules())
    for name, module in model.named_modules():
        own = modules.get(name.removeprefix("base_model.model.").replace(".base_layer", ""))
        for parameter, form in held_4bit(module).items():
            getattr(own, parameter).data.copy_(form.dequantize(getattr(module, parameter)))
        if isinstance(module, Linear4bit):
            own.weight.data.copy_(dequantize_4bit(module.weight.data, module.weight.quant_state))
    return reference


def ids(words=96):
    return torch.randint(0, words, (2, 12), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_each_matrix_of_an_expert_is_quantised_as_bitsandbytes_quantises_a_linear(kind, double):
    weight = torch.randn(3, 64, 128, generator=torch.Generator().manual_seed(0)).bfloat16() * 3
    form = Stacked4bit(3, 64, 128, 2, kind, 64, double)
    held = form.quantize(weight)
    alone = [
        dequantize_4bit(*quantize_4bit(one.contiguous(), blocksize=64, compress_statistics=double, quant_type=kind))
        for one in weight.view(6, 32, 128)
    ]
    assert held.dtype == torch.uint8
    assert torch.equal(form.dequantize(held), torch.stack(alone).view(3, 64, 128))
    assert torch.equal(form.dequantize(held[[2, 0]]), torch.stack(alone).view(3, 64, 128)[[2, 0]])


def test_what_is_planned_is_what_is_loaded_and_what_memory_is_counted(folder):
    planned = planned_weights(load_config(folder), quantized(folder), CPU)
    model = load_base(folder, quantized(folder), CPU)
    assert planned == loaded_weights(model)
    found = {f"{name}.{own}": getattr(module, own) for name, module in stacks(model) for own in PARAMETERS}
    assert len(found) == 4
    for name, parameter in found.items():
        numbers = EXPERTS * INNER * HIDDEN * (2 if "gate_up" in name else 1)
        # Beside what bitsandbytes counts, each matrix has the mean of its scales.
        assert parameter.numel() == planned[name].bytes_of(numbers, EXPERTS) + 4 * planned[name].matrices


def test_experts_in_4_bits_answer_and_teach_as_those_of_transformers_with_the_same_numbers(folder, fp32, tmp_path):
    model = adapted(folder)
    model.save_pretrained(tmp_path)
    reference = PeftModel.from_pretrained(plain(folder, model), str(tmp_path), is_trainable=True)
    said = []
    for one in (model, reference):
        one.train()
        logits = one(input_ids=ids(), use_cache=False).logits
        (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
        said.append(logits.detach())
    assert torch.allclose(*said, atol=2e-5)
    theirs = {name: one.grad for name, one in reference.named_parameters() if one.requires_grad}
    mine = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    assert mine.keys() == theirs.keys() and sum("experts" in name for name in mine) == 8
    for name, gradient in theirs.items():
        assert torch.allclose(mine[name], gradient, atol=2e-5 * float(gradient.abs().max())), name


def test_an_answer_does_not_change_when_it_is_asked_for_again(one, fp32):
    model = adapted(one)
    first, second = (model(input_ids=ids(), use_cache=False).logits for _ in range(2))
    with model.disable_adapter():
        base = model(input_ids=ids(), use_cache=False).logits
    assert torch.equal(first, second) and not torch.allclose(first, base, atol=0.1)


def test_only_experts_that_a_token_passes_are_dequantised_and_none_is_kept_for_backward(one, fp32, monkeypatch):
    model = load_base(one, quantized(one), CPU)
    module = model.model.layers[0].mlp.experts
    real, asked, kept = Stacked4bit.dequantize, [], []
    monkeypatch.setattr(Stacked4bit, "dequantize", lambda form, held: asked.append(len(held)) or real(form, held))
    hidden = torch.randn(5, HIDDEN, requires_grad=True)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made = module(hidden, torch.tensor([[3, 1]] * 5), torch.full((5, 2), 0.5))
    assert asked == [2, 2]
    made.sum().backward()
    assert asked == [2, 2, 2, 2] and hidden.grad.abs().sum() > 0
    large = [one for one in kept if one.is_floating_point() and one.numel() >= INNER * HIDDEN]
    assert not large


def test_experts_are_dequantised_a_group_at_a_time(one, fp32, monkeypatch):
    model = load_base(one, quantized(one), CPU)
    module, hidden = model.model.layers[0].mlp.experts, torch.randn(9, HIDDEN)
    routing = torch.arange(18).view(9, 2) % EXPERTS, torch.rand(9, 2)
    whole = module(hidden, *routing)
    real, asked = Stacked4bit.dequantize, []
    monkeypatch.setattr(Stacked4bit, "dequantize", lambda form, held: asked.append(len(held)) or real(form, held))
    monkeypatch.setattr(products, "GROUP_BYTES", 1)
    assert torch.equal(module(hidden, *routing), whole) and asked == [1] * 8


def test_experts_of_one_layer_at_most_are_in_16_bits_while_they_are_read(folder, monkeypatch):
    real, seen = Quantize.convert, []

    def convert(operation, tensors, *args, **kwargs):
        own = next(iter(tensors))
        others = [
            (f"{name}.{key}", getattr(module, key)) for name, module in stacks(kwargs["model"]) for key in PARAMETERS
        ]
        if ".experts." in own:
            seen.append(own)
            assert all(one.device.type == "meta" or one.dtype == torch.uint8 for name, one in others if name != own)
        return real(operation, tensors, *args, **kwargs)

    monkeypatch.setattr(Quantize, "convert", convert)
    load_base(folder, quantized(folder), CPU)
    assert len(seen) == 4


def test_a_dequantised_merge_has_the_numbers_that_were_trained_and_the_names_of_the_base(folder, bf16, tmp_path):
    model = adapted(folder)
    model.save_pretrained(tmp_path / "adapter")
    held = loaded_weights(model)
    merge_adapter(tmp_path / "adapter", folder, tmp_path / "merged", merge_base="dequantized", held=held)
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "merged"))
    assert {name: (one.dtype, one.shape) for name, one in before.items()} == {
        name: (one.dtype, one.shape) for name, one in after.items()
    }
    reference = PeftModel.from_pretrained(plain(folder, model), str(tmp_path / "adapter")).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, parameter in reference.named_parameters():
        mine = merged.get_parameter(name)
        if ".experts." in name:
            # One rounding to bf16; in 4 bits numbers move by a twentieth.
            assert torch.allclose(mine, parameter, rtol=2**-8, atol=1e-6), name
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    assert {name for name in before if ".experts." in name} <= changed
    assert not any("mlp.gate." in name or "visual" in name or "embed" in name for name in changed)


def test_a_merge_into_the_original_is_what_peft_merges(folder, bf16, tmp_path):
    model = adapted(folder, target_parameters=ADAPTED[1:], use_rslora=True, alpha_pattern={"down_proj": 3})
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", folder, tmp_path / "merged")
    base = read_model(folder, CPU, dtype=torch.float32)
    reference = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload()
    merged = read_model(tmp_path / "merged", CPU, dtype=torch.float32)
    for name, parameter in reference.named_parameters():
        if ".experts." in name:
            assert torch.allclose(merged.get_parameter(name), parameter, rtol=2**-8, atol=1e-6), name
    down, before = "model.layers.1.mlp.experts.down_proj", read_model(folder, CPU, dtype=torch.float32)
    assert not torch.equal(reference.get_parameter(down), before.get_parameter(down))


def test_files_that_hold_experts_by_themselves_or_together_are_held_with_the_same_numbers(tmp_path):
    both = [mixture(tmp_path / str(fused), "qwen3_moe", fused) for fused in (True, False)]
    together, apart = (dict(load_base(folder, quantized(folder), CPU).named_parameters()) for folder in both)
    assert together.keys() == apart.keys()
    assert all(torch.equal(together[name], apart[name]) for name in together if ".experts." in name)


def test_experts_stay_in_16_bits_where_they_are_skipped(one):
    quantization = quantized(one, llm_int8_skip_modules=["lm_head", "mlp.experts.down_proj"])
    held = planned_weights(load_config(one), quantization, CPU)
    model = load_base(one, quantization, CPU)
    assert loaded_weights(model) == held
    assert {name.rpartition(".")[2] for name in held if ".experts." in name} == {"gate_up_proj"}
    assert model.model.layers[0].mlp.experts.down_proj.is_floating_point()
    assert torch.isfinite(model(input_ids=ids()).logits).all()


def test_8_bits_are_refused_where_they_would_leave_the_experts_in_16(one):
    with pytest.raises(UserError, match="load_in_8bit leaves the experts.*load_in_4bit"):
        usable(BitsAndBytesConfig(load_in_8bit=True), load_config(one))


def test_the_weights_of_files_are_named_as_the_files_have_them(folder):
    there = load_file(folder / "model.safetensors")
    written = json.loads((folder / "config.json").read_text())
    held = on_disk(planned_weights(load_config(folder), quantized(folder), CPU), written, there)
    experts = {name: one.matrices for name, one in held.items() if ".experts." in name}
    assert experts.keys() == {name for name in there if ".experts." in name}
    for name, matrices in experts.items():
        assert matrices == (1 if there[name].ndim == 2 else EXPERTS * (1 + ("gate_up" in name)))
