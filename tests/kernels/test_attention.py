"""flash-attn is taken where it is installed and suits the device, and told what torch's own kernels are told."""

import sys
from types import ModuleType

import pytest
import torch

from qwen_lit.kernels.attention import attention, attention_reference, by_flash, flash


def installed(monkeypatch, *names, returns=lambda out: out):
    """flash-attn's packages, whose function has the keywords that all of its versions share."""

    def flash_attn_varlen_func(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal):
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        assert int(cu_seqlens_q.diff().max()) == max_seqlen_q
        return returns(attention_reference(q, k, v, cu_seqlens_q))

    for name in names:
        module = ModuleType(name)
        module.flash_attn_varlen_func = flash_attn_varlen_func
        monkeypatch.setitem(sys.modules, name, module)
    flash.cache_clear()


@pytest.fixture(autouse=True)
def nothing_is_installed(monkeypatch):
    for name in ("flash_attn", "flash_attn.cute", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, None)
    flash.cache_clear()
    yield
    flash.cache_clear()


def test_without_it_there_is_none():
    assert all(flash(major) is None for major in (7, 8, 9, 10, 12))


@pytest.mark.parametrize(
    ("names", "major", "ahead"),
    [
        (["flash_attn"], 8, False),
        (["flash_attn"], 9, False),
        (["flash_attn", "flash_attn_interface"], 9, True),
        (["flash_attn.cute", "flash_attn_interface"], 10, True),
        (["flash_attn_interface"], 8, None),
        (["flash_attn.cute"], 12, None),
        (["flash_attn"], 7, None),
    ],
)
def test_the_newest_one_for_the_device_is_taken(monkeypatch, names, major, ahead):
    installed(monkeypatch, *names)
    found = flash(major)
    assert found is None if ahead is None else found is not None and found[1] is ahead


def test_a_package_of_that_name_without_the_function_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert flash(8) is None


@pytest.mark.parametrize("returns", [lambda out: out, lambda out: (out, None)], ids=["output", "output and lse"])
def test_it_is_told_the_documents_and_that_attention_is_causal(monkeypatch, returns):
    installed(monkeypatch, "flash_attn", returns=returns)
    lengths = [5, 1, 30]
    q, k, v = torch.randn(36, 4, 16), torch.randn(36, 2, 16), torch.randn(36, 2, 16)
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    found = by_flash(flash(8)[0], q, k, v, ends, 30)
    assert torch.equal(found, attention(q, k, v, ends, 30))
