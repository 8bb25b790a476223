"""GGUF, the file that llama.cpp, Ollama and LM Studio take, written tensor by tensor and read back."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qwen_lit.errors import UserError
from qwen_lit.export.folder import BaseModel, ExportError, read_json
from qwen_lit.export.gguf_numbers import Matrices, matrices
from qwen_lit.export.kquants import K_QUANTS, quantize
from qwen_lit.families.gguf import Field
from qwen_lit.families.layer import text_config, value_of
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.files import whole_or_absent
from qwen_lit.progress import through

log = logging.getLogger(__name__)
GgufType = Literal["q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k", "q8_0", "f16", "bf16"]
MOST_ERROR = {"q8_0": 1 / 127, "f16": 2**-10, "bf16": 2**-8, "f32": 0.0}
"""Largest error of a number over the largest of its block of 32 (q8_0), or over itself."""


def check_form(gguf: GgufType | None, config: Any) -> None:
    """Refuse a GGUF file of a model that llama.cpp would not compute as it was trained.

    Args:
        gguf: what is asked for.
        config: of the base model.

    Raises:
        UserError: it cannot be written.
    """
    family = family_of(config)
    if gguf is None:
        return
    reason = "it has no form there" if family.gguf is None else family.gguf.cannot(config)
    if reason:
        raise UserError(
            f"export.gguf is {gguf}, but this {family.model_type} model cannot be written as GGUF: {reason}; "
            "set it to null."
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

    Matrices are stored as ``kind``, vectors and a few small matrices in float32, as llama.cpp's own converter does;
    where rows do not divide into blocks of 32, q8_0 gives way to f16. The file is renamed into
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
    if reason := family.gguf.cannot(config):
        raise ExportError(f"{model_dir} cannot be written as GGUF: {reason}")
    tensors = [matrices(base, one) for one in family.gguf_tensors(config, base.where)]
    taken = {name for one in tensors for name in one.tensor.sources}
    for name in base.where:
        if name not in taken and not family.leaves_out_of_gguf(name, base.where):
            raise ExportError(f"{model_dir}: {name} has no name in GGUF")
    partial = path.with_name(path.name + ".tmp")
    writer: Any = gguf.GGUFWriter(partial, family.gguf.arch)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(config.get("_name_or_path") or "qwen_lit")
    _describe(writer, family.gguf_fields(config, base.where), kind, gguf)
    _vocabulary(writer, value_of(text_config(config), "vocab_size"), tokenizer, gguf)
    stored = [_type_of(one, kind, gguf) for one in tensors]
    for one, type_ in zip(tensors, stored, strict=True):
        block, size = gguf.GGML_QUANT_SIZES[type_]
        count = int(np.prod(one.shape))
        writer.add_tensor_info(
            one.tensor.name, one.shape, np.dtype(np.float32), count // block * size, raw_dtype=type_
        )
    with whole_or_absent(partial, path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for one, type_ in through(list(zip(tensors, stored, strict=True)), "writing GGUF", "tensors"):
            writer.write_tensor_data(_Rows(one, type_, gguf), tensor_endianess=writer.endianess)
        writer.close()
        worst = compare(partial, tensors, gguf)
    log.info("%s written and read back (%.2f GB)", path.name, path.stat().st_size / 1e9)
    return worst


class _Rows:
    """A tensor as the writer of the gguf package takes one, made a few rows at a time while it is written."""

    def __init__(self, tensor: Matrices, type_: Any, gguf: Any) -> None:
        self._tensor, self._type, self._gguf = tensor, type_, gguf
        block, size = gguf.GGML_QUANT_SIZES[type_]
        self.nbytes = int(np.prod(tensor.shape)) // block * size

    def tofile(self, file: Any) -> None:
        """Write it at the file's place."""
        for rows in self._tensor:
            self._gguf.quants.quantize(rows, self._type).tofile(file)


def _type_of(tensor: Matrices, kind: GgufType, gguf: Any) -> Any:
    """How a tensor is stored, as llama.cpp's converter chooses it."""
    types = gguf.GGMLQuantizationType
    if len(tensor.shape) == 1 or tensor.tensor.stored.exact:
        return types.F32
    if kind == "q8_0" and tensor.columns % 32:
        return types.F16
    return {"q8_0": types.Q8_0, "f16": types.F16, "bf16": types.BF16}[kind]


def _describe(writer: Any, fields: dict[str, Field], kind: GgufType, gguf: Any) -> None:
    """The model's shape under GGUF's keys."""
    for key, value in fields.items():
        name = f"{writer.arch}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(name, value)
    file_type = {"q8_0": "MOSTLY_Q8_0", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16"}[kind]
    writer.add_file_type(getattr(gguf.LlamaFileType, file_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _vocabulary(writer: Any, size: int, tokenizer: Any, gguf: Any) -> None:
    """Tokens, their kinds, merges, end tokens and the chat template."""
    inner = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, kinds = [], []
    for number in range(size):
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
    writer.add_tokenizer_pre(_splitting(inner))
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


def _splitting(inner: dict[str, Any]) -> str:
    """llama.cpp's name of how a tokenizer splits text before it joins letters: Qwen3.5's keeps marks with letters."""
    return "qwen35" if r"\\p{M}" in json.dumps(inner.get("pre_tokenizer")) else "qwen2"


def compare(path: Path, tensors: list[Matrices], gguf: Any) -> float:
    """Read a GGUF file back and compare every tensor with the safetensors.

    Returns:
        The largest error, as in ``MOST_ERROR``.

    Raises:
        ExportError: a tensor is missing, or differs by more than its type allows.
    """
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    worst = 0.0
    for one in tensors:
        name = one.tensor.name
        if name not in found:
            raise ExportError(f"{path}: {name} is not in the file")
        theirs, kind = found[name], found[name].tensor_type
        if theirs.shape.tolist() != one.shape[::-1]:
            raise ExportError(
                f"{path}: {name} reads back with shape {theirs.shape.tolist()} instead of {one.shape[::-1]}"
            )
        data, start = theirs.data.reshape(-1, theirs.data.shape[-1]), 0
        for rows in one:
            back = gguf.quants.dequantize(data[start : start + len(rows)], kind)
            start += len(rows)
            error = float(_error(back, rows, kind.name).max())
            if not error <= MOST_ERROR[kind.name.lower()]:
                raise ExportError(f"{path}: {name} reads back with an error of {error:.2e}")
            worst = max(worst, error)
    return worst


def _error(theirs: np.ndarray, ours: np.ndarray, kind: str) -> np.ndarray:
    """Of each number, as in ``MOST_ERROR``."""
    error = np.abs(theirs - ours)
    if kind == "Q8_0":
        return error.reshape(-1, 32) / (np.abs(ours).reshape(-1, 32).max(1, keepdims=True) + 1e-30)
    # Below this float16 has no normal numbers.
    return error / (np.abs(ours) + 2**-14)
