"""k-quants of GGUF: llama.cpp's quantiser is asked, and what it has written is read back."""

import sys
from typing import get_args

import gguf
import numpy as np
import pytest

from qwen_lit.callbacks.checkpoint import RunCheckpoint
from qwen_lit.callbacks.export import Export
from qwen_lit.errors import UserError
from qwen_lit.export import ExportError
from qwen_lit.export.gguf import GgufType, write_gguf, write_plain
from qwen_lit.export.kquants import BITS, K_QUANTS, compare, gguf_bytes, missing_quantizer
from qwen_lit.run import Run
from tests.export.test_merge import make_base

STUB = """#!{python}
import sys
import numpy as np
import gguf

source, target, kind = sys.argv[1:]
assert kind == "Q4_K_M", kind
if "{fault}" == "fails":
    sys.exit(print("main: failed to quantize model from a full disk") or 1)
read = gguf.GGUFReader(source)
writer = gguf.GGUFWriter(target, "qwen2")
for number, tensor in enumerate(read.tensors, 1):
    print(f"[{{number:4d}}/{{len(read.tensors):4d}}] {{tensor.name}}", file=sys.stderr)
    numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    if "{fault}" == "loses" and number == 3:
        continue
    if "{fault}" == "garbles" and number == 3:
        numbers = -numbers
    kind = gguf.GGMLQuantizationType.Q5_0 if numbers.ndim > 1 else gguf.GGMLQuantizationType.F32
    writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, kind), raw_dtype=kind)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
"""


@pytest.fixture
def no_quantizer(tmp_path, monkeypatch):
    """Neither the package nor the program."""
    monkeypatch.setattr("qwen_lit.export.kquants.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture
def stub(tmp_path, no_quantizer):
    """A ``llama-quantize`` on PATH that stores matrices in q5_0, and has the fault that is asked for."""

    def make(fault=""):
        (tmp_path / "bin").mkdir()
        program = tmp_path / "bin" / "llama-quantize"
        program.write_text(STUB.format(python=sys.executable, fault=fault))
        program.chmod(0o755)

    return make


def test_a_k_quant_is_made_from_a_bf16_file_that_is_removed(tmp_path, tokenizer, stub, caplog):
    stub()
    path = tmp_path / "model.gguf"
    with caplog.at_level("INFO"):
        worst = write_gguf(make_base(tmp_path / "base", "qwen2"), path, "q4_k_m", tokenizer)
    assert 0 < worst < 0.1
    kinds = [tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors]
    for kind in ("Q5_0", "F32"):
        assert f"{kinds.count(kind)} {kind}" in caplog.text
    assert "do not divide into blocks of 256" in caplog.text
    assert [one.name for one in tmp_path.glob("model*")] == ["model.gguf"]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("fails", "quantiser failed .main: failed to quantize model from a full disk"),
        ("loses", "in one of it and model.gguf.bf16 alone"),
        ("garbles", "reads back with an error of 2.0"),
    ],
)
def test_a_quantiser_that_fails_or_writes_wrong_leaves_no_file(tmp_path, tokenizer, stub, fault, words):
    stub(fault)
    with pytest.raises(ExportError, match=words):
        write_gguf(make_base(tmp_path / "base", "qwen2"), tmp_path / "model.gguf", "q4_k_m", tokenizer)
    assert not list(tmp_path.glob("model*"))


def test_without_a_quantiser_the_remedy_is_said_for_k_quants_alone(no_quantizer):
    assert missing_quantizer("q8_0") is None and missing_quantizer(None) is None
    for kind in K_QUANTS:
        words = f"export.gguf: {kind} needs llama.cpp's quantiser: pip install llama-cpp-python"
        assert missing_quantizer(kind).startswith(words)


def test_a_missing_quantiser_is_known_before_anything_is_trained_or_merged(no_quantizer, tmp_path):
    run = Run(tmp_path)
    saver = RunCheckpoint(run)
    Export(run, saver, gguf="q8_0").check_gguf()
    with pytest.raises(UserError, match="or put llama-quantize on PATH"):
        Export(run, saver, gguf="q4_k_m").check_gguf()
    with pytest.raises(UserError, match="or put llama-quantize on PATH"):
        # Neither the adapter, nor the model, nor the data is looked at.
        Export(run, saver, gguf="q4_k_m").from_checkpoint(None, None, None, None, None)


def test_every_kind_has_its_size_and_a_k_quant_counts_the_file_it_is_made_from():
    assert set(BITS) == set(get_args(GgufType))
    assert gguf_bytes("q8_0", 800) == 850 and gguf_bytes("bf16", 800) == 1600
    assert gguf_bytes("q4_k_m", 800) == 490 + 1600


@pytest.mark.parametrize("kind", ["q3_k_m", "q4_k_m", "q6_k"])
def test_llama_cpp_itself_quantises_and_answers_as_transformers(tmp_path, tokenizer, kind):
    llama_cpp = pytest.importorskip("llama_cpp")
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            max_position_embeddings=512,
        )
    ).bfloat16()
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model.gguf"
    assert write_gguf(tmp_path / "model", path, kind, tokenizer) > 0
    ids = [5, 40, 77, 300, 12]
    with torch.no_grad():
        wanted = model.float()(torch.tensor([ids])).logits[0, -1].numpy()
    loaded = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, verbose=False)
    loaded.eval(ids)
    found = np.array(loaded.scores[len(ids) - 1])
    loaded.close()
    assert np.corrcoef(found, wanted)[0, 1] > {"q3_k_m": 0.9, "q4_k_m": 0.97, "q6_k": 0.995}[kind]


def test_a_shape_that_differs_is_found(tmp_path, tokenizer):
    for name, rows in (("a", 4), ("b", 8)):
        writer = gguf.GGUFWriter(tmp_path / name, "qwen2")
        writer.add_tensor("x", np.ones((rows, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    with pytest.raises(ExportError, match="x has shape"):
        compare(tmp_path / "a", tmp_path / "b")


def test_the_plain_types_are_written_as_before(tmp_path, tokenizer):
    base = make_base(tmp_path / "base", "qwen3")
    write_gguf(base, tmp_path / "a.gguf", "q8_0", tokenizer)
    write_plain(base, tmp_path / "b.gguf", "q8_0", tokenizer)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_the_quantiser_may_leave_out_ones_and_experts_are_compared_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr("qwen_lit.export.kquants.ROWS", 3)
    numbers = np.random.default_rng(0).normal(size=(4, 2, 32)).astype(np.float32)
    for name, shape in (("a", (32,)), ("b", (1, 32))):
        writer = gguf.GGUFWriter(tmp_path / name, "qwen2")
        writer.add_tensor("gate", np.ones(shape, dtype=np.float32))
        kind = gguf.GGMLQuantizationType.Q8_0 if name == "a" else gguf.GGMLQuantizationType.F32
        writer.add_tensor("experts", gguf.quants.quantize(numbers, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    worst, kinds = compare(tmp_path / "a", tmp_path / "b")
    assert 1e-4 < worst < 0.01 and kinds == {"F32": 1, "Q8_0": 1}
