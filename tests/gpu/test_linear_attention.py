"""Linear attention on the device: packed documents apart, by PyTorch or by kernels that equal it."""

import importlib.util
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from qwen_lit.config import LoraSection, QuantizationSection
from qwen_lit.data.batches import collate
from qwen_lit.model.delta_rule import HOPPER, WRONG, Sizes, _numbers, choose_delta_rule, reason_against, triton_version
from qwen_lit.model.documents import Documents, linear_mixers
from qwen_lit.model.load import add_adapter, load_base
from qwen_lit.model.module import QwenModule
from qwen_lit.model.packing_check import check_packing
from qwen_lit.model.settings import ModelSettings
from tests.hybrids import HYBRIDS, hybrid
from tests.model.test_documents import alone, distance, documents, loss_and_gradients

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda:0")
INSTALLED = importlib.util.find_spec("fla") is not None
BARRED = torch.cuda.get_device_capability()[0] == HOPPER and WRONG[0] <= _numbers(triton_version()) < WRONG[1]
REAL = {
    "hidden_size": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""The heads of the releases."""


@pytest.fixture(params=HYBRIDS)
def module(request, tmp_path, monkeypatch):
    """A 4-bit base with LoRA on the device, as a packed fit in bf16 has it."""
    return adapted(request.param, torch.bfloat16, tmp_path, monkeypatch)


def adapted(kind, dtype, tmp_path, monkeypatch):
    """A 4-bit base with LoRA on the device, all else and all products in one dtype."""
    hybrid(kind, **REAL).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr("qwen_lit.model.load.product_dtype", lambda device: dtype)
    lora = LoraSection(r=4, target_modules=["q_proj", "v_proj", "out_proj"])
    held = QuantizationSection(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    made = QwenModule(ModelSettings(str(tmp_path), lora, held))
    made.model = add_adapter(load_base(tmp_path, made.quantization_config, DEVICE), lora, True)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    monkeypatch.setattr(QwenModule, "pads", False)
    return made.to(DEVICE)


def on_device(batches):
    return [
        {name: one.to(DEVICE) if isinstance(one, torch.Tensor) else one for name, one in batch.items()}
        for batch in batches
    ]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("kind", HYBRIDS)
def test_a_pack_learns_on_the_device_what_its_documents_do(kind, dtype, most, tmp_path, monkeypatch):
    """In bf16 short documents take other kernels than a pack, which round otherwise; in float32 these are equal."""
    module, made = adapted(kind, dtype, tmp_path, monkeypatch), documents()
    pack = on_device([collate(made, 0)])
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        wanted = loss_and_gradients(module, on_device(alone(made)))
        near = distance(loss_and_gradients(module, pack), wanted)
        leaking = distance(loss_and_gradients(module, [pack[0] | {"lengths": [pack[0]["tokens"]]}]), wanted)
    print(f"{kind}, {dtype}: packed differs by {near:.1e}, leaking by {leaking:.1e}")
    assert near < most and leaking > 0.5


def test_the_layout_of_a_pack_waits_for_nothing(module):
    (pack,) = on_device([collate(documents(), 0)])
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows, back = Documents(pack).layout
    finally:
        torch.cuda.set_sync_debug_mode("default")
    tokens = torch.cat([group.flatten() for group in rows])[back]
    assert torch.equal(tokens, torch.arange(pack["tokens"], device=DEVICE))


def test_the_look_before_the_training_lets_the_families_pass_in_bf16(module, monkeypatch):
    context = partial(torch.autocast, "cuda", dtype=torch.bfloat16)
    trainer = SimpleNamespace(precision_plugin=SimpleNamespace(forward_context=context))
    monkeypatch.setattr(QwenModule, "trainer", trainer)
    check_packing(module)


def test_kernels_are_taken_where_they_are_installed_and_right(module):
    base = module.model.get_base_model()
    reason = reason_against(Sizes.of(linear_mixers(base)[0]), DEVICE)
    told = choose_delta_rule(base, DEVICE)
    print(told)
    if not INSTALLED:
        assert reason == "flash-linear-attention is not installed" and "PyTorch" in told
    elif BARRED:
        assert "computes wrong gradients" in reason and "PyTorch" in told
    else:
        assert reason is None and "flash-linear-attention" in told
