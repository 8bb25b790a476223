"""A base whose files name its weights otherwise than transformers does, as wrappers and experts do."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BitsAndBytesConfig

from qwen_lit.export import ExportError, merge_adapter
from qwen_lit.export.verdict import measure
from qwen_lit.families.table import FAMILIES
from qwen_lit.quantization import planned_weights
from tests.export.test_merge import make_adapter, make_base, tensors
from tests.export.test_verdict import examples

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("bf16")]
CPU = torch.device("cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]


def otherwise(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """A weight as a wrapper's file has it; that of ``up_proj`` in two parts, of a third and two thirds of its rows."""
    name = "model.language_model." + name.removeprefix("model.") if name.startswith("model.") else name
    if not name.endswith("up_proj.weight"):
        return {name: tensor}
    parts = tensor.split([len(tensor) // 4, len(tensor) - len(tensor) // 4])
    return {name.replace("up_proj", f"up.{number}"): part.contiguous() for number, part in enumerate(parts)}


@pytest.fixture
def both(tmp_path):
    """The usual base, and the same under other names, each with what a table must say of it."""
    usual, other = make_base(tmp_path / "usual", "qwen2"), tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text((usual / "config.json").read_text())
    weights = {to: part for name, one in tensors(usual).items() for to, part in otherwise(name, one).items()}
    weights["model.visual.patch.weight"] = torch.ones(2, 2, dtype=torch.bfloat16)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    family = FAMILIES["qwen2"]

    def layers(config):
        def named(one):
            disk = ("mlp.up.0.weight", "mlp.up.1.weight") if one.name == "up_proj" else ()
            return replace(one, parts=disk)

        return tuple(
            replace(layer, groups=tuple(tuple(named(one) for one in group) for group in layer.groups))
            for layer in family.layers(config)
        )

    return usual, other, replace(family, layers=layers, decoder_on_disk="model.language_model")


def test_verdict_and_merges_are_those_of_the_same_weights_under_their_usual_names(both, tmp_path, monkeypatch):
    usual, other, family = both
    adapter = make_adapter(usual, tmp_path / "adapter", target_modules=TARGETS)
    config = AutoConfig.from_pretrained(usual)
    held = planned_weights(config, BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), CPU)

    def made(base, out):
        for kind in ("original", "dequantized"):
            merge_adapter(adapter, base, tmp_path / f"{out} {kind}", merge_base=kind, held=held)
        return measure(adapter, base, examples(), held, CPU)

    wanted = made(usual, "usual")
    monkeypatch.setitem(FAMILIES, "qwen2", family)
    assert made(other, "other") == wanted
    for kind in ("original", "dequantized"):
        merged = tensors(tmp_path / f"other {kind}")
        assert merged.keys() == load_file(other / "model.safetensors").keys()
        assert torch.equal(merged.pop("model.visual.patch.weight"), torch.ones(2, 2, dtype=torch.bfloat16))
        renamed = {
            to: part
            for name, one in tensors(tmp_path / f"usual {kind}").items()
            for to, part in otherwise(name, one).items()
        }
        assert merged.keys() == renamed.keys() and all(torch.equal(merged[name], renamed[name]) for name in merged)
    assert json.loads((tmp_path / "other original" / "config.json").read_text())["model_type"] == "qwen2"


def test_an_adapter_on_what_the_files_hold_in_parts_is_refused(both, tmp_path, monkeypatch):
    usual, other, family = both
    adapter = make_adapter(usual, tmp_path / "adapter", target_modules=["up_proj"])
    monkeypatch.setitem(FAMILIES, "qwen2", family)
    with pytest.raises(ExportError, match=r"layers.0.mlp.up_proj.weight, which the base model does not have"):
        merge_adapter(adapter, other, tmp_path / "out")
