"""Gate and up that are kept in 8 bits, beside the reference, on the device, or on the CPU in Triton's interpreter."""

import pytest
import torch

from qwen_lit.kernels.packed import (
    BLOCK,
    Packed,
    pack_reference,
    packed_bytes,
    swiglu_packed,
    swiglu_packed_backward,
    unpack_reference,
)
from qwen_lit.kernels.swiglu import swiglu, swiglu_reference
from tests.gpu.test_kernels import DEVICE, FEW, LOW, close, random

pytestmark = pytest.mark.gpu


def bits(packed):
    return packed.codes.cpu(), packed.scales.cpu().view(torch.int16)


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (5, 300), (3 if FEW else 129, 4864)])
@pytest.mark.parametrize("columns", [0, 8])
@pytest.mark.parametrize("dtype", [LOW, torch.float32], ids=["low", "fp32"])
def test_swiglu_packs_gate_and_up_bit_for_bit_as_its_reference(tokens, width, columns, dtype):
    both = random(tokens, 2 * width + columns, dtype=dtype) * torch.logspace(-3, 3, tokens, device=DEVICE)[:, None]
    both = both.to(dtype)
    both[0, 1], both[-1, width], both[1:2, :BLOCK] = 1e4, -1e4, 0
    out, packed = swiglu_packed(both, width)
    assert torch.equal(out, swiglu(both, width))
    assert all(map(torch.equal, bits(packed), bits(pack_reference(both.cpu(), width))))
    assert sum(one.nbytes for one in packed) == tokens * packed_bytes(width)
    # Half a step of each block at most, and none in a block of zeros.
    steps = (packed.scales.float().view(tokens, 2, -1).repeat_interleave(BLOCK, -1)[:, :, :width]).flatten(1)
    off = (unpack_reference(packed) - both[:, : 2 * width].float()).abs()
    assert (off <= steps / 2 * (1 + 1e-4)).all() and packed.codes.abs().max() >= 126
    gate, up = (one.double().requires_grad_() for one in unpack_reference(packed).split(width, 1))
    grad = random(tokens, width, dtype=dtype)
    swiglu_reference(gate, up).backward(grad.double())
    found = swiglu_packed_backward(packed, grad, columns)
    assert found.shape == both.shape and found.dtype == dtype
    close(found[:, :width], gate.grad, dtype)
    close(found[:, width : 2 * width], up.grad, dtype)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_stays_so_within_its_block_and_what_is_tiny_becomes_zero(value):
    both = random(2, 2 * 300, dtype=torch.float32)
    both[0, 130], both[1, 300:] = value, 1e-37
    _, packed = swiglu_packed(both, 300)
    assert all(map(torch.equal, bits(packed), bits(pack_reference(both.cpu(), 300))))
    found = unpack_reference(Packed(*packed))
    lost = torch.zeros(2, 600, dtype=torch.bool, device=DEVICE)
    lost[0, BLOCK : 2 * BLOCK] = True
    assert torch.equal(found.isfinite(), ~lost) and not found[1, 300:].any()
    grads = swiglu_packed_backward(packed, torch.ones(2, 300, device=DEVICE))
    assert torch.equal(grads.isfinite()[:, :300], ~lost[:, :300]) and grads[1].isfinite().all()
