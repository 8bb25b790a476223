"""GGUF, the file that llama.cpp, Ollama and LM Studio take, written tensor by tensor and read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from qwen_lit.errors import UserError
from qwen_lit.export.folder import BaseModel, ExportError, read_json
from qwen_lit.export.kquants import K_QUANTS, quantize
from qwen_lit.families.layer import Gguf
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.files import whole_or_absent
from qwen_lit.progress import through

log = logging.getLogger(__name__)
GgufType = Literal["q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16", "bf16"]
MOST_ERROR = {"q8_0": 1 / 127, "f16": 2**-10, "bf16": 2**-8}
"""Largest error of a number over the largest of its block of 32 (q8_0), or over itself."""


def check_form(gguf: GgufType | None, config: Any) -> None:
    """Refuse a GGUF file of a model whose family has no form in it.

    Args:
        gguf: what is asked for.
        config: of the base model.

    Raises:
        UserError: it cannot be written.
    """
    family = family_of(config)
    if gguf is not None and family.gguf is None:
        raise UserError(
            f"export.gguf is {gguf}, but a {family.model_type} model cannot be written as GGUF; set it to null."
        )


def write_gguf(model_dir: Path, path: Path, kind: GgufType, tokenizer: Any) -> float:
    """Convert a merged model folder.

    k-quants are made from a bf16 file, which is removed.

    Args:
        model_dir: a folder with bf16 safetensors, of a family that has a form in GGUF.
        path: the file to make.
        kind: how matrices are stored.
        tokenizer: the transformers tokenizer of the model.

    Returns:
        The largest error found by reading back, as in ``MOST_ERROR``, or for k-quants as in ``kquants.MOST_SHARE``.

    Raises:
        ExportError: the ``gguf`` package or llama.cpp's quantiser is missing, the model is of another kind, or a
            tensor reads back wrong.
    """
    if kind not in K_QUANTS:
        return write_plain(model_dir, path, kind, tokenizer)
    source = path.with_name(path.name + ".bf16")
    try:
        write_plain(model_dir, source, "bf16", tokenizer)
        return quantize(source, path, kind)
    finally:
        source.unlink(missing_ok=True)


def write_plain(model_dir: Path, path: Path, kind: GgufType, tokenizer: Any) -> float:
    """Convert a merged model to GGUF, in the types for which no quantiser of llama.cpp is needed.

    Matrices are stored as ``kind``, vectors in float32, as llama.cpp's own converter does. The file is renamed into
    place when every tensor of it has been read back and compared.

    Args:
        model_dir: a folder with bf16 safetensors, of a family that has a form in GGUF.
        path: the file to make.
        kind: how matrices are stored: q8_0, f16 or bf16.
        tokenizer: the transformers tokenizer of the model.

    Returns:
        The largest error found by reading back, as in ``MOST_ERROR``.

    Raises:
        ExportError: the ``gguf`` package is missing, the model is of another kind, or a tensor reads back wrong.
    """
    try:
        import gguf
    except ImportError as error:
        raise ExportError("export.gguf needs the gguf package: pip install 'qwen_lit[gguf]'") from error
    config, base = read_json(model_dir / "config.json"), BaseModel(model_dir)
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None or family.gguf is None:
        raise ExportError(f"{model_dir}: model_type {config.get('model_type')!r} cannot be written as GGUF")
    known = family.gguf_names(config)
    for name in base.where:
        if name not in known:
            raise ExportError(f"{model_dir}: {name} has no name in GGUF")
    renamed = {name: known[name] for name in base.where}
    partial = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(partial, family.gguf.arch)
    writer.add_name(config.get("_name_or_path") or "qwen_lit")
    _describe(writer, family.gguf, config, kind, gguf)
    _vocabulary(writer, family.gguf.tokenizer, config, tokenizer, gguf)
    kinds = {
        "q8_0": gguf.GGMLQuantizationType.Q8_0,
        "f16": gguf.GGMLQuantizationType.F16,
        "bf16": gguf.GGMLQuantizationType.BF16,
    }
    matrices = {name for name, (_, _, shape) in base.where.items() if len(shape) > 1}
    stored = {name: kinds[kind] if name in matrices else gguf.GGMLQuantizationType.F32 for name in base.where}
    for name, to in renamed.items():
        shape = base.where[name][2]
        if kind == "q8_0" and name in matrices and shape[-1] % 32:
            raise ExportError(f"{name}: rows of {shape[-1]} do not divide into blocks of 32; take export.gguf: f16")
        block, size = gguf.GGML_QUANT_SIZES[stored[name]]
        count = int(np.prod(shape))
        writer.add_tensor_info(to, shape, np.dtype(np.float32), count // block * size, raw_dtype=stored[name])
    with whole_or_absent(partial, path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in through(renamed, "writing GGUF", "tensors"):
            writer.write_tensor_data(gguf.quants.quantize(_numbers(base, name), stored[name]))
        writer.close()
        worst = compare(partial, base, renamed, kind)
    log.info("%s written and read back (%.2f GB)", path.name, path.stat().st_size / 1e9)
    return worst


def _numbers(base: BaseModel, name: str) -> np.ndarray:
    return base.get(name).to(torch.float32).numpy()


def _describe(writer: Any, form: Gguf, config: dict[str, Any], kind: GgufType, gguf: Any) -> None:
    """The model's shape under GGUF's keys."""
    for key, value in form.fields(config).items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{form.arch}.{key}", value)
    file_type = {"q8_0": "MOSTLY_Q8_0", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[kind]
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: Any, kind: str, config: dict[str, Any], tokenizer: Any, gguf: Any) -> None:
    """Tokens, their kinds, merges, end tokens and the chat template."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(config["vocab_size"]):
        token = by_id.get(number)
        tokens.append(token if token is not None else f"[PAD{number}]")
        if token is None:
            kinds.append(gguf.TokenType.UNUSED)
        elif number in added:
            special = added[number].special or token.startswith("<|")
            kinds.append(gguf.TokenType.CONTROL if special else gguf.TokenType.USER_DEFINED)
        else:
            kinds.append(gguf.TokenType.NORMAL)
    merges = [one if isinstance(one, str) else " ".join(one) for one in inner["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    vocab = tokenizer.get_vocab()
    writer.add_eos_token_id(vocab.get("<|im_end|>", tokenizer.eos_token_id))
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if "<|endoftext|>" in vocab:
        writer.add_bos_token_id(vocab["<|endoftext|>"])
    writer.add_add_bos_token(False)
    writer.add_chat_template(tokenizer.chat_template)


def compare(path: Path, base: BaseModel, renamed: dict[str, str], kind: GgufType) -> float:
    """Read a GGUF file back and compare every tensor with the safetensors.

    Returns:
        The largest error, as in ``MOST_ERROR``.

    Raises:
        ExportError: a tensor is missing, or differs by more than its type allows.
    """
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for name, to in renamed.items():
        if to not in found:
            raise ExportError(f"{path}: {to} is not in the file")
        back = gguf.quants.dequantize(found[to].data, found[to].tensor_type)
        for theirs, ours in _blocks(back, _numbers(base, name)):
            scale = np.abs(ours).reshape(-1, 32).max(1, keepdims=True) if kind == "q8_0" and ours.ndim > 1 else None
            error = np.abs(theirs - ours)
            # Below this float16 has no normal numbers.
            share = error.reshape(-1, 32) / (scale + 1e-30) if scale is not None else error / (np.abs(ours) + 2**-14)
            worst = max(worst, float(share.max()))
        if worst > MOST_ERROR[kind]:
            raise ExportError(f"{path}: {to} reads back with an error of {worst:.2e}")
    return worst


def _blocks(back: np.ndarray, wanted: np.ndarray, rows: int = 4096) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    if back.shape != wanted.shape:
        raise ExportError(f"a tensor reads back with shape {back.shape} instead of {wanted.shape}")
    for start in range(0, len(wanted), rows):
        yield back[start : start + rows], wanted[start : start + rows]
