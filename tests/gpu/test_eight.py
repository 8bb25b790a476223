"""Kernels of numbers in 8 bits beside their references, on the device, or on the CPU in Triton's interpreter."""

import pytest
import torch
from bitsandbytes.functional import quantize_4bit

from qwen_lit.kernels import eight_product
from qwen_lit.kernels.eight import (
    BLOCK,
    Narrow,
    hadamard,
    quantize,
    quantize_reference,
    transformed,
)
from qwen_lit.kernels.eight_product import product, product_reference
from qwen_lit.kernels.kinds import Kind
from qwen_lit.kernels.launch import INTERPRETED
from qwen_lit.kernels.nf4 import dequantize
from qwen_lit.kernels.nf4_turned import narrow, narrow_reference
from qwen_lit.kernels.norm import add_norm
from qwen_lit.kernels.packed import swiglu_packed, swiglu_packed_backward
from qwen_lit.kernels.packed_narrow import swiglu_packed_backward_narrow, swiglu_packed_narrow
from qwen_lit.kernels.swiglu import swiglu, swiglu_backward_, swiglu_backward_narrow_, swiglu_narrow
from tests.gpu.test_kernels import DEVICE, LOW

pytestmark = pytest.mark.gpu
KINDS = [Kind.FP8, Kind.INT8]


def random(*shape, scale=1.0):
    return (torch.randn(*shape, device=DEVICE) * scale).to(LOW)


def exact(one):
    return one.values.float() * one.scale[:, None]


def same(found, wanted, kind):
    """Equal but for the rounding of single numbers: one step of an integer, or of e4m3's mantissa."""
    torch.testing.assert_close(found.scale, wanted.scale, rtol=1e-6, atol=0)
    found, wanted = found.values.float(), wanted.values.float()
    if kind is Kind.INT8:
        assert (found - wanted).abs().max() <= 1 and (found != wanted).float().mean() < 0.01
        return
    near = (found - wanted).abs() <= 2**-3 * wanted.abs().clamp(min=2**-6)
    # Where a mantissa rounds up to the next power of two, the interpreter loses the carry.
    near |= INTERPRETED & (2 * found == wanted)
    assert near.float().mean() > 0.995 if INTERPRETED else near.all()
    assert (found != wanted).float().mean() < (0.1 if INTERPRETED else 1e-3)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 896), (33, 1024), (2, 9600)])
def test_rows_are_quantised_as_the_reference_does(kind, rows, width):
    x = random(rows, width + 8)[:, :width]
    x[0] *= 1000
    x[-1, 0] = 60
    same(quantize(x, kind), quantize_reference(x, kind), kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_comes_back_is_near_and_zeros_stay(kind):
    x = random(6, 512)
    x[2] = 0
    found, turned = exact(quantize(x, kind)), x.float() if kind is Kind.FP8 else transformed(x) * BLOCK**-0.5
    assert (found[2] == 0).all()
    error = (found - turned).norm() / turned.norm()
    assert error < (0.012 if kind is Kind.INT8 else 0.2 if INTERPRETED else 0.04)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_stays_so_in_its_product_and_no_other(kind, bad):
    x, w = random(3, 256), random(32, 256)
    x[1, 7] = bad
    y = product_reference(quantize(x, kind), quantize_reference(w, kind), torch.float32)
    assert not y[1].isfinite().any() and y[[0, 2]].isfinite().all()


def test_the_hadamard_matrix_is_its_own_inverse_but_for_its_size():
    h = hadamard(torch.device(DEVICE), torch.float32)
    assert torch.equal(h @ h.t(), BLOCK * torch.eye(BLOCK, device=DEVICE)) and h.abs().min() == 1


def integers(rows, depth):
    values = torch.randint(-127, 128, (rows, depth), device=DEVICE).to(torch.int8)
    return Narrow(values, torch.rand(rows, device=DEVICE) + 0.5)


@pytest.mark.parametrize(
    ("rows", "columns", "depth"),
    [(1, 16, 128), (3, 48, 384), (130, 144, 256), (257, 128, 896)]
    if INTERPRETED
    else [(1, 16, 128), (77, 1040, 18944)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_tiles", [False, True])
def test_products_of_integers_have_the_bits_of_the_reference(rows, columns, depth, bias, by_tiles, monkeypatch):
    if by_tiles and not INTERPRETED and torch.cuda.get_device_capability()[0] < 9:
        return
    monkeypatch.setattr(eight_product, "copies_tiles", lambda device: by_tiles)
    a, b = integers(rows, depth), integers(columns, depth)
    term = random(columns) if bias else None
    assert torch.equal(product(a, b, LOW, term), product_reference(a, b, LOW, term))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("rank", [0, 1, 8, 96, 256])
def test_an_adapter_and_a_bias_are_added(kind, rank):
    a, b = quantize(random(19, 256), kind), quantize(random(48, 256), kind)
    low, lift = (random(19, rank + 5)[:, :rank], random(48, rank)) if rank else (None, None)
    bias = random(48)
    found, wanted = product(a, b, LOW, bias, low, lift), product_reference(a, b, torch.float32, bias, low, lift)
    assert (found.float() - wanted).norm() / wanted.norm() < 5e-3


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 16, 128), (67, 256, 896 if INTERPRETED else 18944)])
def test_rows_that_torch_does_not_multiply_are_multiplied_by_a_kernel(rows, columns, depth, monkeypatch):
    def refused(*given, **options):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED")

    a, b, bias = quantize(random(rows, depth), Kind.FP8), quantize(random(columns, depth), Kind.FP8), random(columns)
    wanted = product_reference(a, b, torch.float32, bias)
    # By torch or by the kernel, as the device has it.
    assert (product(a, b, LOW, bias).float() - wanted).norm() / wanted.norm() < 1e-2
    monkeypatch.setattr(torch, "_scaled_mm", refused)
    assert (product(a, b, LOW, bias).float() - wanted).norm() / wanted.norm() < 1e-2


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("out", "width", "blocksize"), [(128, 256, 64), (256, 384, 128)])
def test_four_bits_become_eight_as_the_reference_does(kind, nested, turned, out, width, blocksize):
    weight = random(out, width, scale=0.05)
    packed, state = quantize_4bit(weight, blocksize=blocksize, compress_statistics=nested, quant_type="nf4")
    state.dtype = LOW
    shape = (width, out) if turned else (out, width)
    tops = transformed(weight.t() if turned else weight).abs().amax(1) * 1.1
    inverse = 127 / tops if kind is Kind.INT8 else 400 / weight.abs().max().float().view(1)
    # Beside another weight, as linears of one input lie.
    whole = torch.zeros(shape[0], shape[1] + 16, dtype=torch.int8, device=DEVICE)
    whole = whole.view(torch.float8_e4m3fn) if kind is Kind.FP8 else whole
    found = narrow(packed, state, kind, turned, inverse, whole[:, : shape[1]])
    wanted = narrow_reference(packed, state, kind, turned, inverse)
    ones = torch.ones(shape[0], device=DEVICE)
    same(Narrow(found, ones), Narrow(wanted, ones), kind)
    assert (whole[:, shape[1] :].float() == 0).all()
    if kind is Kind.FP8 and not turned:
        straight = dequantize(packed, state, torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE), inverse)
        same(Narrow(straight, ones), Narrow(wanted, ones), kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (7, 896)])
def test_a_norm_gives_what_it_gives_and_that_in_eight_bits(kind, wide, rows, width):
    residual, delta, weight = random(rows, width), random(rows, width), random(width)
    total, normed, found = add_norm(residual, delta, weight, 1e-6, kind=kind, wide=wide)
    same_total, same_normed, nothing = add_norm(residual, delta, weight, 1e-6)
    assert nothing is None and torch.equal(total, same_total)
    assert torch.equal(normed, same_normed) if wide else normed.shape == same_normed.shape
    same(found, quantize_reference(same_normed, kind), kind)


def test_a_norm_that_gives_eight_bits_alone_has_its_gradient():
    weight, grad = random(256), random(5, 256)
    inputs = [random(5, 256) for _ in range(2)]
    found = []
    for kind, wide in ((Kind.WIDE, True), (Kind.FP8, False)):
        mine = [one.clone().requires_grad_() for one in inputs]
        total, normed, _ = add_norm(*mine, weight, 1e-6, kind=kind, wide=wide)
        torch.autograd.backward([total, normed], [grad, grad])
        found.append([one.grad for one in mine])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 4224)])
def test_swiglu_and_its_gradients_in_eight_bits(kind, wide, rows, width):
    both, grad = random(rows, 2 * width + 8), random(rows, width)
    plain = swiglu(both, width)
    h, found = swiglu_narrow(both, width, kind, wide)
    assert torch.equal(h, plain) if wide else h is None
    same(found, quantize_reference(plain, kind), kind)
    gradients, mine = both.clone(), both.clone()
    swiglu_backward_(gradients, grad)
    found = swiglu_backward_narrow_(mine, grad, kind, wide)
    same(found, quantize_reference(gradients[:, : 2 * width], kind), kind)
    if wide:
        assert torch.equal(mine, gradients)


@pytest.mark.parametrize("kind", [Kind.WIDE, *KINDS], ids=str)
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(1, 128), (5, 4224)])
def test_swiglu_that_packs_has_the_same_eight_bits(kind, wide, rows, width):
    both, grad = random(rows, 2 * width + 8), random(rows, width)
    both[0, 3] = 1000
    plain, kept = swiglu_packed(both, width)
    h, found, mine = swiglu_packed_narrow(both, width, kind, wide)
    assert torch.equal(mine.codes, kept.codes) and torch.equal(mine.scales, kept.scales)
    assert torch.equal(h, plain) if wide or kind is Kind.WIDE else h is None
    gradients = swiglu_packed_backward(kept, grad)
    back, narrow = swiglu_packed_backward_narrow(kept, grad, kind, wide)
    assert back.shape == gradients.shape
    if wide or kind is Kind.WIDE:
        torch.testing.assert_close(back, gradients, rtol=1e-2, atol=1e-6)
    if kind is Kind.WIDE:
        assert found is None and narrow is None
        return
    same(found, swiglu_narrow(both, width, kind, wide)[1], kind)
    same(narrow, quantize(gradients, kind), kind)
