"""Every kernel beside its plain twin, on the device."""

import pytest
import torch

from qwen_lit.kernels.attention import attention, attention_reference
from qwen_lit.kernels.linear import Member, dropped, full_weight, group_linear
from qwen_lit.kernels.loss import head_loss, head_loss_reference
from qwen_lit.kernels.nf4 import can_dequantize, dequantize
from qwen_lit.kernels.norm import add_norm
from qwen_lit.kernels.rope import rope, rope_reference
from qwen_lit.kernels.swiglu import swiglu, swiglu_reference

pytestmark = pytest.mark.gpu
LIMIT = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def random(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def close(found, wanted, dtype):
    wanted = wanted.double()
    error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)
    assert error < LIMIT[dtype], float(error)


def compare(function, twin, inputs, dtype, several=False):
    """Values and gradients against the twin in float64 of the same inputs."""
    mine = [one.clone().requires_grad_() for one in inputs]
    wide = [one.double().requires_grad_() for one in inputs]
    found, wanted = function(*mine), twin(*wide)
    found, wanted = (found, wanted) if several else ((found,), (wanted,))
    grads = [random(*one.shape, dtype=dtype) for one in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wanted, [one.double() for one in grads])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, dtype)
    for one, other in zip(mine, wide, strict=True):
        close(one.grad, other.grad, dtype)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def dtype(request):
    return request.param


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (37, 896), (515, 3584), (3, 5120)])
def test_add_norm_equals_its_twin(tokens, width, dtype):
    weight = random(width, dtype=dtype)
    inputs = [random(tokens, width, dtype=dtype) for _ in range(2)]
    compare(lambda x, d: add_norm(x, d, weight, 1e-6), lambda x, d: wide_norm(x, d, weight), inputs, dtype, True)


def wide_norm(x, delta, weight):
    total = x + delta
    return total, weight.double() * total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (33, 4864), (129, 18944)])
def test_swiglu_equals_its_twin(tokens, width, dtype):
    compare(swiglu, swiglu_reference, [random(tokens, width, dtype=dtype) for _ in range(2)], dtype)


@pytest.mark.parametrize("heads", [1, 2, 28])
@pytest.mark.parametrize("size", [64, 128])
def test_rope_equals_its_twin(heads, size, dtype):
    angle = torch.rand(41, size // 2, device="cuda") * 6
    cos, sin = angle.cos(), angle.sin()
    x = random(41, heads, size, dtype=dtype)
    compare(lambda x: rope(x, cos, sin), lambda x: rope_reference(x, cos, sin, None, 0.0), [x], dtype)
    weight = random(size, dtype=dtype)

    def normed(x):
        hat = weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return rope_reference(hat, cos, sin, None, 0.0)

    compare(lambda x: rope(x, cos, sin, weight, 1e-6), normed, [x], dtype)


@pytest.mark.parametrize("rows", [1, 5, 300])
@pytest.mark.parametrize("vocabulary", [1000, 151936])
def test_head_loss_equals_its_twin(rows, vocabulary, dtype):
    hidden, head = random(rows, 128, dtype=dtype), random(vocabulary, 128, dtype=dtype) * 0.1
    targets = torch.randint(0, vocabulary, (rows,), device="cuda")
    one, other = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, wanted = head_loss(one, head, targets, 128), head_loss_reference(other, head.double(), targets)
    (found * 0.37).backward()
    (wanted * 0.37).backward()
    close(found, wanted, dtype)
    close(one.grad, other.grad, dtype)


def test_a_batch_of_only_masked_tokens_has_no_loss_and_no_gradient():
    hidden = torch.zeros(0, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    head = random(1000, 64, dtype=torch.bfloat16)
    loss = head_loss(hidden, head, torch.zeros(0, dtype=torch.int64, device="cuda"))
    loss.backward()
    assert float(loss) == 0 and hidden.grad.shape == (0, 64)


@pytest.mark.parametrize("lengths", [[1], [64] * 8, [5, 1, 300, 77], [2048] * 2, [3] * 4000])
def test_attention_equals_its_twin_and_never_crosses_a_document(lengths):
    dtype = torch.bfloat16
    tokens = sum(lengths)
    q = random(tokens, 8, 128, dtype=dtype)
    k, v = (random(tokens, 2, 128, dtype=dtype) for _ in range(2))
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    compare(
        lambda q, k, v: attention(q, k, v, ends, max(lengths)),
        lambda q, k, v: attention_reference(q, k, v, ends), [q, k, v], dtype,
    )  # fmt: skip


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 1), (96, 66), (3584, 512), (1000, 3584)])
def test_dequantisation_equals_bitsandbytes_to_the_bit(shape, nested):
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    weight = random(*shape, dtype=torch.bfloat16)
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64, compress_statistics=nested)
    out = torch.full(shape, float("nan"), device="cuda", dtype=torch.bfloat16)
    assert can_dequantize(packed, state)
    assert torch.equal(dequantize(packed, state, out), dequantize_4bit(packed, state))


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_group_linear_equals_its_twin(four_bit, dropout):
    from bitsandbytes.nn import Linear4bit

    dtype, members, weights = torch.bfloat16, [], []
    for out, rank in ((256, 8), (64, 5), (128, 0)):
        layer = torch.nn.Linear(192, out, bias=True)
        if four_bit:
            made = Linear4bit(192, out, compute_dtype=dtype, quant_type="nf4", compress_statistics=True)
            made.load_state_dict(layer.to(dtype).state_dict())
            layer = made
        layer = layer.cuda()
        if not four_bit:
            layer = layer.to(dtype)
        a = random(rank, 192, dtype=torch.float32).requires_grad_() if rank else None
        b = random(out, rank, dtype=torch.float32).requires_grad_() if rank else None
        members.append(
            Member(layer.weight.data if not four_bit else layer.weight, layer.bias.data.to(dtype), a, b, 0.5, dropout)
        )
        weights.append(full_weight(members[-1], dtype).double().clone())
    x = random(77, 192, dtype=dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    mask = dropped(torch.ones(77, 192, device="cuda", dtype=torch.float32), dropout, 3).double() if dropout else 1.0
    twins = [
        [one.detach().double().requires_grad_() if one is not None else None for one in (m.a, m.b)] for m in members
    ]
    found = group_linear(x, members, 3)
    wanted = [
        wide @ w.t() + m.bias.double() + (0 if a is None else (wide * mask @ a.t() @ b.t()) * m.scale)
        for w, m, (a, b) in zip(weights, members, twins, strict=True)
    ]
    grads = [random(*one.shape, dtype=dtype) for one in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wanted, [one.double() for one in grads])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, dtype)
    close(x.grad, wide.grad, dtype)
    for member, (a, b) in zip(members, twins, strict=True):
        if a is not None:
            close(member.a.grad, a.grad, dtype)
            close(member.b.grad, b.grad, dtype)


def test_the_dropout_mask_is_a_function_of_seed_and_place_and_keeps_its_share():
    x = torch.ones(1000, 333, device="cuda")
    one, again, other = dropped(x, 0.1, 5), dropped(x, 0.1, 5), dropped(x, 0.1, 6)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert abs(float((one == 0).float().mean()) - 0.1) < 0.005
    added = torch.ones_like(x)
    assert torch.equal(dropped(x, 0.1, 5, add=added), one + 1)
