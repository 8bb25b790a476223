"""GGUF in llama.cpp's k-quants: its own quantiser makes them, and every tensor is read back."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from qwen_lit.export.folder import ExportError
from qwen_lit.files import whole_or_absent
from qwen_lit.progress import Progress

log = logging.getLogger(__name__)
BITS = {
    "q3_k_s": 3.7,
    "q3_k_m": 4.0,
    "q3_k_l": 4.3,
    "q4_k_s": 4.7,
    "q4_k_m": 4.9,
    "q5_k_s": 5.6,
    "q5_k_m": 5.7,
    "q6_k": 6.6,
    "q8_0": 8.5,
    "f16": 16.0,
    "bf16": 16.0,
}
"""Bits a weight in a file of each kind, of an 8B model (llama.cpp, tools/quantize/README.md)."""
K_QUANTS = tuple(kind for kind in BITS if "_k" in kind)
MOST_SHARE = {
    "Q3_K": 0.3,
    "Q4_0": 0.2,
    "Q4_K": 0.15,
    "Q5_0": 0.1,
    "Q5_1": 0.1,
    "Q5_K": 0.08,
    "Q6_K": 0.04,
    "Q8_0": 0.02,
    "F16": 0.001,
    "BF16": 0.0,
    "F32": 0.0,
}
"""Largest norm of a tensor's error over the norm of the tensor: twice what normally distributed numbers have."""
BY_PACKAGE = """
import os, sys, llama_cpp
source, target, kind = sys.argv[1:]
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + kind)
sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))
"""
STEP = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
"""Of the quantiser's own lines, one for each tensor."""
ROWS = 4096


def quantizer() -> list[str] | None:
    """The command that runs llama.cpp's quantiser: the package ``llama_cpp`` in a process of its own, which may abort,
    or else ``llama-quantize``; None where neither is there.
    """
    if find_spec("llama_cpp") is not None:
        return [sys.executable, "-c", BY_PACKAGE]
    found = shutil.which("llama-quantize")
    return [found] if found else None


def missing_quantizer(kind: str | None) -> str | None:
    """Why a file of this kind cannot be made here; None where it can."""
    if kind not in K_QUANTS or quantizer() is not None:
        return None
    return (
        f"export.gguf: {kind} needs llama.cpp's quantiser: pip install llama-cpp-python, or put llama-quantize on "
        "PATH; q8_0 needs neither."
    )


def gguf_bytes(kind: str, weights: int) -> int:
    """What a GGUF file takes on disk, with the bf16 file that it is made from while it is made.

    Args:
        kind: how matrices are stored.
        weights: how many there are.
    """
    return round(weights * (BITS[kind] + 16 * (kind in K_QUANTS)) / 8)


def quantize(source: Path, path: Path, kind: str) -> float:
    """Make a GGUF file smaller.

    Args:
        source: a GGUF file in bf16.
        path: the file to make; it is there only when every tensor has been read back.
        kind: one of ``K_QUANTS``.

    Returns:
        The largest error found by reading back, as in ``MOST_SHARE``.

    Raises:
        ExportError: there is no quantiser, it fails, or a tensor reads back wrong.
    """
    if reason := missing_quantizer(kind):
        raise ExportError(reason)
    partial = path.with_name(path.name + ".tmp")
    with whole_or_absent(partial, path):
        _run([*(quantizer() or []), str(source), str(partial), kind.upper()], kind)
        worst, kinds = compare(partial, source)
    counts = ", ".join(f"{count} {name}" for name, count in kinds.most_common())
    log.info("%s written and read back (%.2f GB; tensors: %s)", path.name, path.stat().st_size / 1e9, counts)
    return worst


def _run(command: list[str], kind: str) -> None:
    """Run the quantiser, and show how far it is."""
    last, both = "", {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with (
        Progress(f"quantising to {kind}", 1) as progress,
        subprocess.Popen(command, text=True, errors="replace", **both) as made,  # type: ignore[call-overload]
    ):
        try:
            assert made.stdout is not None
            for line in made.stdout:
                last = line.strip() or last
                if step := STEP.match(line):
                    progress.advance(1 / int(step[2]))
        except BaseException:
            made.kill()
            raise
    if made.returncode:
        raise ExportError(f"llama.cpp's quantiser failed ({last or made.returncode})")


def compare(path: Path, source: Path) -> tuple[float, Counter[str]]:
    """Read a quantised GGUF file back and compare every tensor with the file it was made from.

    Returns:
        The largest error, as in ``MOST_SHARE``, and how many tensors are of each type.

    Raises:
        ExportError: a tensor is missing, or differs in shape or by more than its type allows.
    """
    import gguf

    wanted = {tensor.name: tensor for tensor in gguf.GGUFReader(source).tensors}
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    if odd := sorted(wanted.keys() ^ found.keys()):
        raise ExportError(f"{path}: {odd[0]} is in one of it and {source.name} alone")
    worst, kinds, whole = 0.0, Counter[str](), []
    for name, theirs in found.items():
        kind = theirs.tensor_type.name
        kinds[kind] += 1
        if _shape(wanted[name]) != _shape(theirs):
            raise ExportError(f"{path}: {name} has shape {_shape(theirs)}, not {_shape(wanted[name])}")
        share = _share(theirs, wanted[name])
        # A type without a bound is one that no k-quant is made of.
        if not share <= MOST_SHARE.get(kind, -1.0):
            raise ExportError(f"{path}: {name} in {kind} reads back with an error of {share:.2e} of its norm")
        worst = max(worst, share)
        if kind != "F32" and theirs.shape[0] % gguf.QK_K:
            whole.append(name)
    if whole:
        log.info(
            "%d matrices have rows that do not divide into blocks of %d, and are in other types than k-quants",
            len(whole),
            gguf.QK_K,
        )
    return worst, kinds


def _shape(tensor: Any) -> list[int]:
    """As the file has it, without ones at the end, which the quantiser leaves out."""
    shape: list[int] = tensor.shape.tolist()
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return shape


def _share(theirs: Any, ours: Any) -> float:
    """The norm of the difference over the norm of ``ours``, a few rows at a time."""
    import gguf

    error = norm = 0.0
    held, given = (one.data.reshape(-1, one.data.shape[-1]) for one in (theirs, ours))
    for start in range(0, len(held), ROWS):
        rows = slice(start, start + ROWS)
        back = gguf.quants.dequantize(held[rows], theirs.tensor_type)
        wanted = gguf.quants.dequantize(given[rows], ours.tensor_type)
        error += float(np.square(back - wanted, dtype=np.float64).sum())
        norm += float(np.square(wanted, dtype=np.float64).sum())
    return (error / norm) ** 0.5 if norm else error
