"""Kernels of 8 bits are compiled for cards that are not here."""

import pytest

from qwen_lit.kernels import eight, eight_product, nf4_turned, packed, packed_narrow
from qwen_lit.kernels.kinds import Kind

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
driver = pytest.importorskip("triton.backends.compiler")

CARDS = [80, 86, 89, 90, 120]
POINTERS = {
    "a": "*i8",
    "b": "*i8",
    "out": "*bf16",
    "scale_a": "*fp32",
    "scale_b": "*fp32",
    "bias": "*bf16",
    "low": "*bf16",
    "lift": "*bf16",
}
NUMBERS = ("rows", "columns", "depth", "rank", "low_stride", "lift_stride")


def compiled(kernel, signature, constants, card, **options):
    wanted = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = compiler.ASTSource(kernel, {name: wanted[name] for name in kernel.arg_names}, constants)
    return triton.compile(source, target=driver.GPUTarget("cuda", card, 32), options=options)


@pytest.mark.parametrize(
    ("card", "integer"), [*((card, True) for card in CARDS), *((card, False) for card in CARDS if card >= 89)]
)
def test_products_in_8_bits_use_the_instructions_of_every_card(card, integer):
    tile = dict(eight_product.TILE)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    signature = {**POINTERS, **dict.fromkeys(NUMBERS, "i32")}
    constants = {"HAS_BIAS": True, "RANK": eight_product.MOST_RANK, "INTEGER": integer, **tile}
    done = compiled(eight_product._product, signature, constants, card, **options)
    found = done.asm["ptx"]
    assert ("wgmma" if card == 90 else "mma.sync") in found
    assert (".s32.s8.s8" if integer else ".e4m3.e4m3") in found
    # What cards of GeForce have for a program.
    assert done.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("card", [80, 90, 120])
def test_rows_are_transformed_on_every_card(card):
    lines, blocks = eight.TRANSFORMED_TILE
    constants = {
        "UNIT": 0.1,
        "TOP": eight.TOP[Kind.INT8],
        "LEAST": eight.LEAST,
        "ROWS": lines,
        "BLOCKS": blocks,
        "BLOCK": eight.BLOCK,
    }
    signature = {"x": "*bf16", "out": "*i8", "scale": "*fp32", "matrix": "*bf16", "rows": "i32", "width": "i32"}
    done = compiled(eight._quantize_transformed, {**signature, "stride": "i32"}, constants, card, num_warps=8)
    assert done.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("card", [80, 90, 120])
def test_four_bits_become_integers_on_every_card(card):
    constants = {
        "NESTED": True,
        "OUTER": 256,
        "TURNED": True,
        "INTEGER": True,
        "PER": 2,
        "TILE": eight.BLOCK,
    }
    pointers = {
        "packed": "*u8",
        "absmax": "*u8",
        "code": "*fp32",
        "outer": "*fp32",
        "offset": "*fp32",
        "table": "*fp32",
        "inverse": "*fp32",
        "matrix": "*bf16",
        "out": "*i8",
    }
    signature = {**pointers, "rows": "i32", "across": "i32", "stride": "i32"}
    assert compiled(nf4_turned._narrow, signature, constants, card, num_warps=8).metadata.shared <= 99 * 1024


SWIGLU = {
    **dict.fromkeys(("both", "out", "grad"), "*bf16"),
    **{"codes": "*i8", "scales": "*i16", "values": "*fp8e4nv", "scale": "*fp32"},
    **dict.fromkeys(("width", "stride", "blocks"), "i32"),
}


@pytest.mark.parametrize("name", ["_forward", "_backward"])
@pytest.mark.parametrize(("module", "card"), [(packed, 80), (packed, 120), (packed_narrow, 90)])
def test_gate_and_up_are_packed_on_every_card(module, card, name):
    kernel, constants = getattr(module, name), {"BLOCK": module.BLOCK, "BLOCKS": module.BLOCKS}
    if module is packed_narrow:
        constants |= {"WIDE": True, "TOP": eight.TOP[Kind.FP8], "LEAST": eight.LEAST}
    signature = {one: kind for one, kind in SWIGLU.items() if one in kernel.arg_names}
    fused = {"enable_fp_fusion": False} if name == "_forward" else {}
    found = compiled(kernel, signature, constants, card, num_warps=8, **fused).asm["ptx"]
    # Codes are rounded after the product with the inverse of their scale, as the reference does.
    assert ("fma.rn.f32" in found) == (name == "_backward")
