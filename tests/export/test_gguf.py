"""GGUF, read back by the gguf package and compared with the safetensors."""

import gguf
import numpy as np
import pytest

from qwen_lit.export import ExportError
from qwen_lit.export.folder import BaseModel
from qwen_lit.export.gguf import MOST_ERROR, write_gguf
from tests.export.test_merge import make_base


@pytest.mark.parametrize("kind", ["q8_0", "f16", "bf16"])
@pytest.mark.parametrize("model", ["qwen2", "qwen3"])
def test_every_tensor_reads_back_within_its_type_s_precision(tmp_path, tokenizer, model, kind):
    base, path = make_base(tmp_path / "base", model), tmp_path / "model.gguf"
    worst = write_gguf(base, path, kind, tokenizer)
    assert worst <= MOST_ERROR[kind] and (kind != "bf16" or worst == 0)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert len(tensors) == len(BaseModel(base).where)
    wanted = BaseModel(base).get("model.layers.1.mlp.down_proj.weight").float().numpy()
    found = tensors["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == kind.upper()
    assert np.abs(gguf.quants.dequantize(found.data, found.tensor_type) - wanted).max() < 0.01 * np.abs(wanted).max()


def test_shape_vocabulary_and_template_are_told(tmp_path, tokenizer):
    path = tmp_path / "model.gguf"
    write_gguf(make_base(tmp_path / "base", "qwen3"), path, "bf16", tokenizer)
    fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    assert fields["general.architecture"] == "qwen3" and fields["qwen3.attention.key_length"] == 16
    assert fields["qwen3.block_count"] == 2 and fields["qwen3.attention.head_count_kv"] == 2
    assert fields["tokenizer.chat_template"] == tokenizer.chat_template
    vocab = tokenizer.get_vocab()
    tokens = fields["tokenizer.ggml.tokens"]
    assert tokens[vocab["<|im_end|>"]] == "<|im_end|>"
    assert fields["tokenizer.ggml.eos_token_id"] == vocab["<|im_end|>"]
    assert fields["tokenizer.ggml.token_type"][vocab["<|im_end|>"]] == gguf.TokenType.CONTROL


def test_a_file_that_reads_back_wrong_is_not_kept(tmp_path, tokenizer, monkeypatch):
    plain = gguf.quants.quantize
    monkeypatch.setattr(gguf.quants, "quantize", lambda data, kind: plain(data * 1.5, kind))
    with pytest.raises(ExportError, match="reads back with an error"):
        write_gguf(make_base(tmp_path / "base", "qwen2"), tmp_path / "model.gguf", "f16", tokenizer)
    assert not list(tmp_path.glob("model.gguf*"))
