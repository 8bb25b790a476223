"""Kernels of another package compute linear attention only where they are right."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5 as file

from qwen_lit.model import delta_rule
from qwen_lit.model.delta_rule import FUNCTIONS, RULE, Sizes, choose_delta_rule, differences, plain, reason_against
from qwen_lit.model.load import load_base
from tests.hybrids import hybrid

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
SIZES = Sizes(file.__name__, 2, 4, 16, 16, 4)


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    """Each test chooses anew, and leaves transformers' functions as they were."""
    monkeypatch.setattr(delta_rule, "_theirs", {})
    for name in FUNCTIONS:
        monkeypatch.setattr(file, name, getattr(file, name))
    reason_against.cache_clear()
    yield
    reason_against.cache_clear()


@pytest.fixture
def fla(monkeypatch):
    """The package with a kernel that says when it is called, and is off by ``wrong``."""
    torch_function = plain(getattr(file, RULE))
    made = SimpleNamespace(calls=[], wrong=lambda output: output)

    def chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=False, **more):
        made.calls.append(q.shape)
        output, state = torch_function(q, k, v, g, beta, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel)
        return made.wrong(output), state

    ops = ModuleType("fla.ops.gated_delta_rule")
    ops.chunk_gated_delta_rule = chunk_gated_delta_rule
    package = ModuleType("fla")
    package.ops = SimpleNamespace(gated_delta_rule=ops)
    for name, module in (("fla", package), ("fla.ops", ModuleType("fla.ops")), (ops.__name__, ops)):
        monkeypatch.setitem(sys.modules, name, module)
    wrapped = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")(torch_function)
    monkeypatch.setattr(file, RULE, wrapped)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.6.0")
    return made


@pytest.fixture
def card(monkeypatch):
    """A card of a generation with a Triton, whose trial runs on the CPU."""

    def make(generation, triton):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (generation, 0))
        monkeypatch.setattr(delta_rule, "triton_version", lambda: triton)
        monkeypatch.setattr(delta_rule, "product_dtype", lambda device: torch.float32)
        trial = differences
        monkeypatch.setattr(delta_rule, "differences", lambda sizes, device, dtype: trial(sizes, CPU, dtype))

    return make


def test_without_the_package_pytorch_computes_and_the_start_says_why(tmp_path, caplog):
    hybrid("qwen3_5_text").save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        load_base(tmp_path, None, CPU)
    told = "linear attention is computed by PyTorch (flash-linear-attention is not installed)"
    assert [one.message for one in caplog.records].count(told) == 1
    assert "is falling back" not in caplog.text


def test_a_package_that_is_installed_without_its_own_needs_is_named_with_them(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'einops'", name="einops")

    monkeypatch.setattr("importlib.import_module", missing)
    assert reason_against(SIZES, CUDA) == "flash-linear-attention needs einops"


@pytest.mark.parametrize(
    ("generation", "triton", "taken"),
    [
        (9, "3.3.1", True),
        (9, "3.4.0", False),
        (9, "3.6.0", False),
        (9, "3.7.0+git1", False),
        (9, "3.7.1", True),
        (9, "3.10.0", True),
        (8, "3.6.0", True),
    ],
)
def test_hopper_takes_no_kernel_of_a_triton_that_computes_wrong_gradients(fla, card, generation, triton, taken):
    card(generation, triton)
    reason = reason_against(SIZES, CUDA)
    assert (reason is None) == taken
    assert taken or reason == (
        f"Triton {triton} computes wrong gradients for flash-linear-attention on this GPU, 3.7.1 does not"
    )


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda output: output * 1.2, "flash-linear-attention differs from it by 20% in "),
        (lambda output: output * float("nan"), "flash-linear-attention differs from it by nan% in "),
        (lambda output: output + 0.3 * (output - output.detach()), "from it by 30% in the gradient of "),
        (lambda output: [][0], "flash-linear-attention fails: list index out of range"),
    ],
    ids=["values", "no number", "gradients", "an error"],
)
def test_kernels_that_are_not_pytorchs_equal_are_not_taken(fla, card, wrong, told):
    card(8, "3.6.0")
    fla.wrong = wrong
    assert told in reason_against(SIZES, CUDA)


def test_the_kernel_runs_where_it_is_taken_and_nowhere_else(fla, card):
    card(9, "3.7.1")
    model, ids = hybrid("qwen3_5_text"), torch.arange(9)[None]
    assert choose_delta_rule(model, CUDA) == "linear attention is computed by flash-linear-attention 0.6.0"
    fla.calls.clear()
    fast = model(ids, use_cache=False).logits
    assert len(fla.calls) == 3
    told = "linear attention is computed by PyTorch (flash-linear-attention needs a CUDA device)"
    assert choose_delta_rule(model, CPU) == told
    assert torch.equal(model(ids, use_cache=False).logits, fast) and len(fla.calls) == 3
    assert choose_delta_rule(model, CUDA).endswith("0.6.0")
    model(ids, use_cache=False)
    assert len(fla.calls) == 6


def test_the_function_inside_is_found_through_every_wrapper():
    def computed(x):
        return x

    wrapped = use_kernel_func_from_hub_with_fallback("computed", "fla")(computed)

    def module_of(func):
        class Func(torch.nn.Module):
            def forward(self, *args, **kwargs):
                return func(*args, **kwargs)

        return Func()

    assert wrapped is not computed and plain(wrapped) is plain(module_of(wrapped)) is computed


def test_a_model_without_linear_attention_is_left_alone(model_folder, caplog):
    with caplog.at_level(logging.INFO):
        load_base(model_folder, None, CPU)
    assert "linear attention" not in caplog.text
