"""The merged folder against PEFT's adapter on the base model; no network, tiny random models."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen3Config

from qwen_lit.export import CONVERTED_MARKER, ExportError, merge_adapter
from qwen_lit.export.adapter import read_adapter
from qwen_lit.quantization import Held

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and PEFT deprecations
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIZES: dict[str, Any] = dict(
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection is an error."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture(params=["qwen2", "qwen3"], scope="module")
def base_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2 untied or Qwen3 tied, bf16, in shards."""
    return make_base(tmp_path_factory.mktemp(request.param) / "base", request.param)


def make_base(path: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "qwen2":
        config: Any = Qwen2Config(tie_word_embeddings=False, **SIZES)
    else:
        config = Qwen3Config(tie_word_embeddings=True, head_dim=16, **SIZES)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("*.safetensors"))) >= 2
    return path


def load(path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    return model.eval()


def make_adapter(base_dir: Path, path: Path, **options: Any) -> Path:
    """A saved adapter whose every trainable value is random, so that no delta is zero."""
    torch.manual_seed(1)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})
    model = get_peft_model(load(base_dir), config)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * (0.02 if "magnitude" in name else 0.05))
    model.save_pretrained(path, save_embedding_layers=False)
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(path.glob("*.safetensors")) for name, value in load_file(file).items()}


@torch.no_grad()
def compare(base_dir: Path, adapter: Path, out: Path) -> None:
    """Weights equal PEFT's fp32 merge rounded to bf16; logits equal adapter + base up to that rounding."""
    ids = torch.randint(0, 300, (2, 12), generator=torch.Generator().manual_seed(2))
    peft = PeftModel.from_pretrained(load(base_dir), str(adapter)).eval()
    want = peft(input_ids=ids).logits
    # PEFT merges in place: where embedding and head share one tensor it would add one's delta to both.
    for module in peft.modules():
        if "weight" in module._parameters:
            module.weight = torch.nn.Parameter(module.weight.detach().clone())
    merged = peft.merge_and_unload()
    got, model = tensors(out), load(out)
    reference = merged.state_dict()
    assert set(got) | {"lm_head.weight"} == set(reference) | {"lm_head.weight"}
    for name, value in got.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, reference[name].to(torch.bfloat16)), name
    base = load(base_dir)(input_ids=ids).logits
    error = (model(input_ids=ids).logits - want).abs().max()
    assert error < 0.02 * (base - want).abs().max() + 1e-3
    # The same rounding applied to PEFT's own merge leaves only fp32 noise.
    rounded = {name: value.to(torch.bfloat16).float() for name, value in reference.items()}
    merged.load_state_dict(rounded)
    torch.testing.assert_close(model(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.mlp.up_proj": 2}, "alpha_pattern": {"v_proj": 32}},
        {"use_rslora": True, "use_dora": True, "rank_pattern": {"down_proj": 6}},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"modules_to_save": ["norm"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["v_proj", "lm_head"]},
    ],
    ids=lambda options: "+".join(f"{k}={v}" if isinstance(v, list) else k for k, v in options.items()) or "plain",
)
def test_merge_equals_adapter(base_dir: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adapter = make_adapter(base_dir, tmp_path / "adapter", **options)
    report = merge_adapter(adapter, base_dir, tmp_path / "out", max_shard_bytes=200_000)
    pairs = 4 if len(options.get("target_modules", [])) == 2 else 14
    assert report.merged == (3 if pairs == 4 else 14)
    assert report.max_delta > 0
    assert report.tensors == len(tensors(tmp_path / "out"))
    assert report.bytes == sum(value.nbytes for value in tensors(tmp_path / "out").values())
    compare(base_dir, adapter, tmp_path / "out")


def test_dequantized_merges_into_the_trained_weights(tmp_path: Path) -> None:
    import bitsandbytes.functional as bnb

    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj"])
    held = {name: Held("nf4", 64, True) for name in tensors(base_dir) if "_proj.weight" in name}
    merge_adapter(adapter, base_dir, tmp_path / "out", merge_base="dequantized", held=held)
    base, lora, got = tensors(base_dir), load_file(adapter / "adapter_model.safetensors"), tensors(tmp_path / "out")
    for name, weight in base.items():
        want = weight
        if "_proj.weight" in name:
            want = bnb.dequantize_4bit(
                *bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
            )
            assert not torch.equal(want, weight)
        if "q_proj.weight" in name:
            key = "base_model.model." + name.removesuffix(".weight")
            want = want.float() + 2.0 * (lora[key + ".lora_B.weight"] @ lora[key + ".lora_A.weight"])
        assert torch.equal(got[name], want.to(torch.bfloat16)), name


def test_pissa_needs_conversion(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen3")
    adapter = make_adapter(base_dir, tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(ExportError, match="init_lora_weights=pissa"):
        merge_adapter(adapter, base_dir, tmp_path / "out")
    (adapter / CONVERTED_MARKER).touch()
    assert merge_adapter(adapter, base_dir, tmp_path / "out").merged == 14


def test_converted_pissa_merges(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    config = LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(load(base_dir), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial", save_embedding_layers=False)
    model.peft_config["default"].init_lora_weights = "pissa"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value.add_(torch.randn_like(value) * 0.05)
        want = model.eval()(input_ids=ids).logits
    adapter = tmp_path / "adapter"
    model.save_pretrained(
        adapter, save_embedding_layers=False, path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    merge_adapter(adapter, base_dir, tmp_path / "out")
    with torch.no_grad():
        got, base = (load(path)(input_ids=ids).logits for path in (tmp_path / "out", base_dir))
    assert (got - want).abs().max() < 0.02 * (base - want).abs().max() + 1e-3


@pytest.mark.parametrize("name", ["../base/evil.safetensors", "/etc/passwd", "..", "a\\b", ""])
def test_shard_names_stay_inside(tmp_path: Path, name: str) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    index = base_dir / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["lm_head.weight"] = name
    index.write_text(json.dumps(value))
    with pytest.raises(ExportError, match="plain file name") as error:
        merge_adapter(adapter, base_dir, tmp_path / "out")
    assert repr(name) in str(error.value)


def test_foreign_and_source_folders_are_refused(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "in" / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    for out in (base_dir, base_dir.parent, adapter, tmp_path):
        with pytest.raises(ExportError, match="would overwrite"):
            merge_adapter(adapter, base_dir, out)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("keep")
    with pytest.raises(ExportError, match="no config.json"):
        merge_adapter(adapter, base_dir, foreign)
    downloaded = make_base(tmp_path / "downloaded", "qwen2")
    with pytest.raises(ExportError, match="was not written by"):
        merge_adapter(adapter, base_dir, downloaded)
    assert (foreign / "thesis.txt").exists() and len(list(downloaded.glob("*.safetensors"))) >= 2


def test_own_export_is_replaced(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    merge_adapter(adapter, base_dir, tmp_path / "out", max_shard_bytes=100_000)
    (tmp_path / "out.tmp").mkdir()  # left by a killed run
    report = merge_adapter(adapter, base_dir, tmp_path / "out")
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == [".exported.json", "config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "out"]
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as handle:
        assert handle.metadata()["format"] == "pt" and len(list(handle.keys())) == report.tensors
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = json.loads((base_dir / "config.json").read_text())
    assert config == base


def test_the_config_keeps_the_keys_of_the_base_and_no_path_of_a_machine(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    plain = json.loads((base_dir / "config.json").read_text()) | {"own_key": [1], "torch_dtype": "float32"}
    plain.pop("dtype")
    for name, kept in (("Qwen/Qwen2.5-7B", {"_name_or_path": "Qwen/Qwen2.5-7B"}), ("/home/me/base", {}), ("", {})):
        written = plain | {"_name_or_path": name, "quantization_config": {"quant_method": "none"}}
        (base_dir / "config.json").write_text(json.dumps(written))
        merge_adapter(adapter, base_dir, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "config.json").read_text()) == plain | kept


def test_failure_leaves_the_old_export(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")

    def fail(folder: Path) -> None:
        assert folder.name == "out.tmp"
        raise RuntimeError("tokenizer")

    with pytest.raises(RuntimeError):
        merge_adapter(adapter, base_dir, tmp_path / "out", finish=fail)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.tmp").exists()
    merge_adapter(adapter, base_dir, tmp_path / "out")
    with pytest.raises(RuntimeError):
        merge_adapter(adapter, base_dir, tmp_path / "out", finish=fail)
    assert (tmp_path / "out" / "config.json").exists()


def test_kill_in_the_middle_leaves_no_folder(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from qwen_lit.export import merge\n"
        "write, count = merge.ShardWriter.write, [0]\n"
        "def kill(self, name, tensor):\n"
        "    count[0] += 1\n"
        "    if count[0] == 9:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    write(self, name, tensor)\n"
        "merge.ShardWriter.write = kill\n"
        "merge.merge_adapter(*map(Path, sys.argv[1:]), max_shard_bytes=100_000)\n"
    )
    paths = [str(adapter), str(base_dir), str(tmp_path / "out")]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    code = subprocess.run([sys.executable, "-c", script, *paths], env=environment, timeout=300).returncode
    assert code == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    whole = sorted(path.name for path in (tmp_path / "out.tmp").glob("*.safetensors"))
    assert whole
    kept = (tmp_path / "out.tmp" / whole[0]).stat().st_ino
    merge_adapter(adapter, base_dir, tmp_path / "out", max_shard_bytes=100_000)
    assert (tmp_path / "out" / whole[0]).stat().st_ino == kept
    compare(base_dir, adapter, tmp_path / "out")
    merge_adapter(adapter, base_dir, tmp_path / "again", max_shard_bytes=100_000)
    first, second = tensors(tmp_path / "out"), tensors(tmp_path / "again")
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_broken_adapters_are_named(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    good = {name: value.clone() for name, value in load_file(file).items()}
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"

    def broken(change: dict[str, torch.Tensor], drop: str = "") -> None:
        save_file({name: value for name, value in {**good, **change}.items() if name != drop}, file)
        merge_adapter(adapter, base_dir, tmp_path / "out")

    with pytest.raises(ExportError, match="only one of"):
        broken({}, drop=key)
    with pytest.raises(ExportError, match=r"layers\.9.*does not have"):
        other = {name.replace("layers.0", "layers.9"): good[name].clone() for name in (key, key.replace("_B", "_A"))}
        broken(other)
    with pytest.raises(ExportError, match="do not fit"):
        broken({key: good[key][:-1].clone()})
    with pytest.raises(ExportError, match="not a key"):
        broken({"base_model.model.odd": torch.zeros(1)})
    with pytest.raises(ExportError, match="not finite"):
        broken({key: torch.full_like(good[key], float("nan"))})
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ExportError, match="cannot be read"):
        merge_adapter(adapter, base_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_every_tensor_keeps_the_dtype_of_the_base_and_the_config_its_words(tmp_path: Path, merge_base: Any) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj"])
    of = {"q_proj": torch.float32, "k_proj": torch.float16, "input_layernorm": torch.float32, "up_proj": torch.float64}
    for file in base_dir.glob("*.safetensors"):
        named = {
            name: one.to(next((dtype for part, dtype in of.items() if part in name), one.dtype))
            for name, one in load_file(file).items()
        }
        save_file(named, file, metadata={"format": "pt"})
    held = {f"model.layers.{number}.mlp.up_proj.weight": Held("nf4", 64) for number in range(2)}
    merge_adapter(adapter, base_dir, tmp_path / "out", merge_base=merge_base, held=held)
    base, got = tensors(base_dir), tensors(tmp_path / "out")
    assert {name: one.dtype for name, one in got.items()} == {name: one.dtype for name, one in base.items()}
    changed = {name for name in got if not torch.equal(got[name], base[name])}
    rounded = set(held) if merge_base == "dequantized" else set()
    assert changed == {name for name in base if name.endswith("q_proj.weight")} | rounded
    pairs = read_adapter(adapter).pairs
    for name, pair in pairs.items():
        assert torch.equal(got[name], base[name] + pair.b @ pair.a * pair.scaling), name
    assert (tmp_path / "out" / "config.json").read_text() == (base_dir / "config.json").read_text()


def test_a_merge_that_overflows_the_dtype_of_the_base_is_refused(tmp_path: Path) -> None:
    base_dir = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(base_dir, tmp_path / "adapter", target_modules=["q_proj"], lora_alpha=10**8)
    for file in base_dir.glob("*.safetensors"):
        save_file({name: one.half() for name, one in load_file(file).items()}, file, metadata={"format": "pt"})
    with pytest.raises(ExportError, match=r"q_proj: the merged weight is not finite in torch.float16"):
        merge_adapter(adapter, base_dir, tmp_path / "out")
