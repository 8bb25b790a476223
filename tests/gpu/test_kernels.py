"""Every kernel beside its reference, on the device, or on the CPU in Triton's interpreter."""

import pytest
import torch

from qwen_lit.engine.linear import group_linear, group_reference
from qwen_lit.engine.lora_linear import LoraLinear, full_weight, lora_columns
from qwen_lit.engine.mlp import gate_up, gate_up_reference, mlp, mlp_in_pieces
from qwen_lit.engine.qkv import qkv_rope, qkv_rope_reference
from qwen_lit.kernels.attention import attention, attention_reference
from qwen_lit.kernels.dropout import Seed, dropped
from qwen_lit.kernels.launch import INTERPRETED
from qwen_lit.kernels.loss import IGNORED, head_loss, head_loss_reference
from qwen_lit.kernels.nf4 import can_dequantize, dequantize, dequantize_reference
from qwen_lit.kernels.norm import add_norm
from qwen_lit.kernels.rope import rope, rope_backward, rope_reference
from qwen_lit.kernels.rows import can_read_host, host_rows, host_rows_reference
from qwen_lit.kernels.swiglu import swiglu, swiglu_backward_, swiglu_reference

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter does not compute in bfloat16.
LOW = torch.float16 if INTERPRETED else torch.bfloat16
LIMIT = {LOW: 1e-2, torch.float32: 1e-5}
# It computes a program at a time, and each row or block is one.
FEW = INTERPRETED
TOKENS = 25 if FEW else 77


def random(*shape, dtype):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def close(found, wanted, dtype):
    wanted = wanted.double()
    error = (found.double() - wanted).norm() / wanted.norm().clamp(min=1e-3)
    assert error < LIMIT[dtype], float(error)


def compare(function, reference, inputs, dtype, several=False):
    """Values and gradients against the reference in float64 of the same inputs."""
    mine = [one.clone().requires_grad_() for one in inputs]
    wide = [one.double().requires_grad_() for one in inputs]
    found, wanted = function(*mine), reference(*wide)
    found, wanted = (found, wanted) if several else ((found,), (wanted,))
    grads = [random(*one.shape, dtype=dtype) for one in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wanted, [one.double() for one in grads])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, dtype)
    for one, other in zip(mine, wide, strict=True):
        close(one.grad, other.grad, dtype)


@pytest.fixture(params=[LOW, torch.float32], ids=["low", "fp32"])
def dtype(request):
    return request.param


@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (37, 896), (15 if FEW else 515, 3584), (3, 5120)])
def test_add_norm_equals_its_reference(tokens, width, dtype):
    weight = random(width, dtype=dtype)
    inputs = [random(tokens, width, dtype=dtype) for _ in range(2)]
    compare(lambda x, d: add_norm(x, d, weight, 1e-6)[:2], lambda x, d: wide_norm(x, d, weight), inputs, dtype, True)


def wide_norm(x, delta, weight):
    total = x + delta
    return total, weight.double() * total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("columns", [0, 24])
def test_add_norm_leaves_the_columns_it_is_asked_for_in_both_passes(columns, dtype):
    x, delta, weight = random(37, 896, dtype=dtype), random(37, 896, dtype=dtype), random(896, dtype=dtype)
    grads = []
    for asked in (0, columns):
        mine = [one.clone().requires_grad_() for one in (x, delta)]
        total, normed, _ = add_norm(*mine, weight, 1e-6, asked, 2 * asked)
        again, last, _ = add_norm(total, normed, weight, 1e-6, 0, asked)
        assert normed.stride(0) == 896 + asked
        grads.append([normed, *torch.autograd.grad([again, last], mine, [x, delta])])
        assert grads[-1][1].stride(0) == grads[-1][2].stride(0) == 896 + 2 * asked
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


@pytest.mark.parametrize(("tokens", "width"), [(1, 7), (33, 4864), (9 if FEW else 129, 18944)])
@pytest.mark.parametrize("columns", [0, 16])
def test_swiglu_equals_its_reference(tokens, width, columns, dtype):
    both = random(tokens, 2 * width + columns, dtype=dtype)
    gate, up = (both[:, at : at + width].double().requires_grad_() for at in (0, width))
    wanted, grad = swiglu_reference(gate, up), random(tokens, width, dtype=dtype)
    close(swiglu(both, width), wanted, dtype)
    wanted.backward(grad.double())
    rest = both[:, 2 * width :].clone()
    swiglu_backward_(both, grad)
    close(both[:, :width], gate.grad, dtype)
    close(both[:, width : 2 * width], up.grad, dtype)
    assert torch.equal(both[:, 2 * width :], rest)


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("count", [1, 2, 5 if FEW else 28])
@pytest.mark.parametrize("size", [64, 128])
def test_rope_and_its_gradient_equal_their_reference_whatever_lies_between_rows(count, size, normed, dtype):
    angle = torch.rand(TOKENS, size // 2, device=DEVICE) * 6
    cos, sin = angle.cos(), angle.sin()
    weight, eps = (random(size, dtype=dtype), 1e-6) if normed else (None, 0.0)
    x, grad, out, d_x = (random(TOKENS, count * size + 24, dtype=dtype) for _ in range(4))
    beside = [one[:, count * size :].clone() for one in (out, d_x)]
    views = [one[:, : count * size].view(TOKENS, count, size) for one in (x, grad, out, d_x)]
    wide = views[0].double().requires_grad_()
    wanted = rope_reference(wide if weight is None else head_norm(wide, weight), cos, sin, None, 0.0)
    wanted.backward(views[1].double())
    rope(views[0], cos, sin, weight, eps, views[2])
    close(views[2], wanted, dtype)
    rope_backward(views[1], cos, sin, views[0], weight, eps, views[3])
    close(views[3], wide.grad, dtype)
    assert all(torch.equal(one[:, count * size :], kept) for one, kept in zip((out, d_x), beside, strict=True))
    if weight is None:
        rope(views[0], cos, sin, None, 0.0, views[0])
        assert torch.equal(views[0], views[2])


def head_norm(x, weight):
    return weight.double() * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# On a CPU one row times 151,936 columns in float32 strays by 1e-5 in the product itself, before any kernel.
@pytest.mark.parametrize("rows", [1, 3 if FEW else 300])
@pytest.mark.parametrize("vocabulary", [1000, 15193 if FEW else 151936])
def test_head_loss_equals_its_reference(rows, vocabulary, dtype):
    hidden, head = random(rows, 128, dtype=dtype), random(vocabulary, 128, dtype=dtype) * 0.1
    targets = torch.randint(0, vocabulary, (rows,), device=DEVICE)
    one, other = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    found, wanted = head_loss(one, head, targets, 128), head_loss_reference(other, head.double(), targets)
    (found * 0.37).backward()
    (wanted * 0.37).backward()
    close(found, wanted, dtype)
    close(one.grad, other.grad, dtype)


def test_a_batch_of_only_masked_tokens_has_no_loss_and_no_gradient():
    hidden = torch.zeros(0, 64, device=DEVICE, dtype=LOW, requires_grad=True)
    head = random(1000, 64, dtype=LOW)
    loss = head_loss(hidden, head, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    loss.backward()
    assert float(loss) == 0 and hidden.grad.shape == (0, 64)


@pytest.mark.parametrize("lengths", [[1], [64] * 8, [5, 1, 300, 77], [2048] * 2, [3] * 4000])
def test_attention_equals_its_reference_and_never_crosses_a_document(lengths):
    dtype = LOW
    tokens = sum(lengths)
    q = random(tokens, 8, 128, dtype=dtype)
    k, v = (random(tokens, 2, 128, dtype=dtype) for _ in range(2))
    ends = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    compare(
        lambda q, k, v: attention(q, k, v, ends, max(lengths)),
        lambda q, k, v: attention_reference(q, k, v, ends),
        [q, k, v],
        dtype,
    )


@pytest.mark.parametrize("storage", [torch.uint8, LOW], ids=str)
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(64, 1), (96, 66), (358 if FEW else 3584, 512), (100 if FEW else 1000, 3584)])
def test_dequantisation_equals_bitsandbytes_to_the_bit(shape, nested, storage):
    from bitsandbytes.functional import quantize_4bit

    weight = random(*shape, dtype=LOW)
    packed, state = quantize_4bit(
        weight, quant_type="nf4", blocksize=64, compress_statistics=nested, quant_storage=storage
    )
    out = torch.full(shape, float("nan"), device=DEVICE, dtype=LOW)
    assert can_dequantize(packed, state)
    assert torch.equal(dequantize(packed, state, out), dequantize_reference(packed, state))
    if shape[1] % 64 == 0:
        corner = torch.full((shape[0] + 8, shape[1] + 16), 7.0, device=DEVICE, dtype=LOW)
        dequantize(packed, state, corner[: shape[0], : shape[1]])
        assert torch.equal(corner[: shape[0], : shape[1]], out)
        assert bool((corner[shape[0] :] == 7).all() and (corner[:, shape[1] :] == 7).all())


def linear(width, out, rank, four_bit, dropout, bias=True):
    """A linear as the model holds it, and its weight in float64."""
    from bitsandbytes.nn import Linear4bit

    layer = torch.nn.Linear(width, out, bias=bias).to(LOW)
    if four_bit:
        made = Linear4bit(width, out, bias, compute_dtype=LOW, quant_type="nf4", compress_statistics=True)
        made.load_state_dict(layer.state_dict())
        layer = made
    layer = layer.to(DEVICE)
    # Products take A and B in their own dtype; these are the same numbers in both.
    a, b = ((0.2 * random(*size, dtype=LOW)).float().requires_grad_() for size in ((rank, width), (out, rank)))
    named = layer.bias.data.to(LOW) if bias else None
    made = LoraLinear(layer.weight, named, a if rank else None, b if rank else None, 0.5, dropout)
    return made, full_weight([made], LOW).double().clone()


def reference(one, weight):
    """The linear in float64, with parameters of its own."""
    a, b = (None if p is None else p.detach().double().requires_grad_() for p in (one.a, one.b))

    def run(x, mask):
        y = x @ weight.t() + (0 if one.bias is None else one.bias.double())
        return y if a is None else y + (x * mask @ a.t() @ b.t()) * one.scale

    return run, (a, b)


def agree(found, wanted, x, wide, linears, references):
    """Values and gradients of everything that is trained."""
    grads = [random(*one.shape, dtype=x.dtype) for one in found]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(wanted, [one.double() for one in grads])
    for one, other in zip(found, wanted, strict=True):
        close(one, other, x.dtype)
    close(x.grad, wide.grad, x.dtype)
    for one, (_, (a, b)) in zip(linears, references, strict=True):
        if a is not None:
            close(one.a.grad, a.grad, x.dtype)
            close(one.b.grad, b.grad, x.dtype)


def alike(found, plain):
    """Values of a fast path and its reference in the same dtype."""
    for one, other in zip(found, plain, strict=True):
        close(one, other, LOW)


def mask_of(tokens, width, dropout, seed):
    return dropped(torch.ones(tokens, width, device=DEVICE), dropout, seed).double() if dropout else 1.0


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "tight"])
@pytest.mark.parametrize("outs", [((256, 8), (64, 5), (128, 0)), ((64, 5),), ((320, 16), (64, 8))], ids=len)
@pytest.mark.parametrize("tokens", [1, TOKENS])
def test_group_linear_equals_its_reference(four_bit, dropout, padded, outs, tokens):
    linears, weights = zip(*(linear(192, *one, four_bit, dropout) for one in outs), strict=True)
    whole = random(tokens, 192 + lora_columns(list(linears)), dtype=LOW) if padded else None
    x = whole[:, :192] if padded else random(tokens, 192, dtype=LOW)
    x = x.detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    references = [reference(one, weight) for one, weight in zip(linears, weights, strict=True)]
    found = group_linear(x, list(linears), 3, padded)
    alike(found, group_reference(x.detach(), list(linears), 3))
    mask = mask_of(tokens, 192, dropout, 3)
    agree(found, [run(wide, mask) for run, _ in references], x, wide, linears, references)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("beside", [0, 8, 12])
def test_a_gradient_with_columns_beside_it_gives_the_same_and_only_the_columns_is_written(four_bit, rank, beside):
    one = linear(192, 192, rank, four_bit, 0.0)[0]
    x = random(TOKENS, 192, dtype=LOW)
    whole = random(TOKENS, 192 + beside, dtype=LOW)
    before, results = whole.clone(), []
    for grad in (whole[:, :192].clone(), whole[:, :192]):
        mine = x.clone().requires_grad_()
        if rank:
            one.a.grad = one.b.grad = None
        group_linear(mine, [one], 3, grad_padded=True)[0].backward(grad)
        results.append([mine.grad, *([one.a.grad, one.b.grad] if rank else [])])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, LOW)
    assert torch.equal(whole[:, :192], before[:, :192])
    if not rank or not four_bit or beside != rank:
        assert torch.equal(whole, before)


@pytest.mark.parametrize("four_bit", [True, False], ids=["nf4", "plain"])
@pytest.mark.parametrize("normed", [False, True], ids=["plain heads", "normed heads"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(8, 5, 0), (0, 0, 0)], ids=str)
def test_heads_equal_their_reference(four_bit, normed, dropout, ranks):
    tokens, size, padded = TOKENS, 64, sum(ranks) > 0
    linears, weights = zip(
        *(linear(192, n, r, four_bit, dropout, bias=n > 64) for n, r in zip((256, 128, 64), ranks, strict=True)),
        strict=True,
    )
    references = [reference(one, weight) for one, weight in zip(linears, weights, strict=True)]
    angle = torch.rand(tokens, size // 2, device=DEVICE) * 6
    norms = [(random(size, dtype=LOW), 1e-6) if normed else (None, 0.0) for _ in range(2)]
    whole = random(tokens, 192 + lora_columns(list(linears)), dtype=LOW)
    x = (whole[:, :192] if padded else whole[:, :192].clone()).detach().requires_grad_()
    wide = x.detach().double().requires_grad_()
    found = qkv_rope(x, list(linears), size, angle.cos(), angle.sin(), norms, 3, padded)
    alike(found, qkv_rope_reference(x.detach(), list(linears), size, angle.cos(), angle.sin(), norms, 3))
    mask = mask_of(tokens, 192, dropout, 3)
    wanted = [run(wide, mask).view(tokens, -1, size) for run, _ in references]
    for at, (weight, _) in enumerate(norms):
        one = wanted[at] if weight is None else head_norm(wanted[at], weight)
        wanted[at] = rope_reference(one, angle.cos(), angle.sin(), None, 0.0)
    agree(found, wanted, x, wide, linears, references)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("ranks", [(8, 8, 8), (5, 0, 3), (0, 0, 0)], ids=str)
def test_gate_up_and_the_mlp_equal_their_references(dropout, ranks):
    shapes = ((128, 320, ranks[0]), (128, 320, ranks[1]), (320, 128, ranks[2]))
    linears, weights = zip(*(linear(*one, True, dropout, bias=False) for one in shapes), strict=True)
    named = dict(zip(("gate_proj", "up_proj", "down_proj"), linears, strict=True))
    for whole in (False, True):
        references = [reference(one, weight) for one, weight in zip(linears, weights, strict=True)]
        x = random(TOKENS, 128, dtype=LOW).requires_grad_()
        wide = x.detach().double().requires_grad_()
        mask = mask_of(TOKENS, 128, dropout, 3)
        h = swiglu_reference(references[0][0](wide, mask), references[1][0](wide, mask))
        wanted = references[2][0](h, mask_of(TOKENS, 320, dropout, 4)) if whole else h
        found = mlp(x, named, 3) if whole else gate_up(x, linears[0], linears[1], 3)[0]
        if not whole:
            alike([found], [gate_up_reference(x.detach(), linears[0], linears[1], 3)])
        for one in linears:
            if one.a is not None:
                one.a.grad = one.b.grad = None
        agree([found], [wanted], x, wide, linears[: 3 if whole else 2], references[: 3 if whole else 2])


def test_the_mlp_in_pieces_is_the_mlp():
    shapes = ((128, 320, 8), (128, 320, 8), (320, 128, 8))
    linears = [linear(*one, True, 0.0, bias=False)[0] for one in shapes]
    named = dict(zip(("gate_proj", "up_proj", "down_proj"), linears, strict=True))
    x, grad = random(TOKENS, 128, dtype=LOW), random(TOKENS, 128, dtype=LOW)
    results = []
    for function in (lambda x: mlp(x, named, 3), lambda x: mlp_in_pieces(x, named, 3, 20)):
        part = x.clone().requires_grad_()
        for one in linears:
            one.a.grad = one.b.grad = None
        out = function(part)
        out.backward(grad)
        results.append([out, part.grad, *(p.grad for one in linears for p in (one.a, one.b))])
    for one, other in zip(*results, strict=True):
        close(one, other, LOW)


def test_the_dropout_mask_is_a_function_of_seed_and_place_and_keeps_its_share():
    x = torch.ones(20 if FEW else 1000, 2333, device=DEVICE)
    one, again, other = dropped(x, 0.1, 5), dropped(x, 0.1, 5), dropped(x, 0.1, 6)
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert abs(float((one == 0).float().mean()) - 0.1) < 0.005
    added = torch.ones_like(x)
    assert torch.equal(dropped(x, 0.1, 5, add=added), one + 1)


@pytest.mark.parametrize("number", [0, 1, 3, 16, 2**30 - 1])
@pytest.mark.parametrize("offset", [0, 1, 2, 48, 111])
def test_a_seed_on_the_device_draws_the_bits_of_the_number(number, offset):
    x, on_device = torch.ones(3, 700, device=DEVICE), torch.tensor([number], device=DEVICE)
    seed = Seed(on_device)
    assert torch.equal(dropped(x, 0.1, seed + offset), dropped(x, 0.1, number + offset))
    on_device += 1
    assert torch.equal(dropped(x, 0.1, seed + offset), dropped(x, 0.1, number + 1 + offset))


def test_a_target_that_is_ignored_has_neither_loss_nor_gradient_by_the_kernel():
    torch.manual_seed(0)
    hidden = torch.randn(7, 64, device=DEVICE).to(LOW).requires_grad_()
    head = torch.randn(301, 64, device=DEVICE).to(LOW)
    targets = torch.tensor([3, IGNORED, 300, 0, IGNORED, 7, IGNORED], device=DEVICE)
    counts = targets >= 0
    loss, wanted = head_loss(hidden, head, targets, 4), head_loss(hidden[counts], head, targets[counts], 4)
    close(loss[None], wanted[None], LOW)
    (found,), (only,) = (torch.autograd.grad(one, hidden) for one in (loss, wanted))
    close(found, only, LOW)
    assert not found[~counts].any() and found[counts].any(1).all()


@pytest.mark.parametrize(("rows", "width", "count"), [(5, 64, 9), (301, 1536, 1), (77, 3584, TOKENS)])
def test_rows_read_from_the_host_are_those_of_the_matrix(rows, width, count, dtype):
    table = torch.randn(rows, width).to(dtype)
    if not INTERPRETED:
        table = table.pin_memory()
    ids = torch.randint(rows, (count,), device=DEVICE)
    ids[0] = rows - 1
    assert can_read_host(table)
    found = host_rows(table, ids)
    assert found.device == ids.device and torch.equal(found, host_rows_reference(table, ids))
