"""A family's row of the table decides what the commands do."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.commands.plan import reference_because
from qwen_lit.config import LoraSection
from qwen_lit.engine.supported import unsupported_reason
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.settings import ModelSettings
from qwen_lit.quantization import Held

CPU = torch.device("cpu")
WITHOUT = "for which the fast engine has no kernels"


def ending(family, **what):
    """The family with something else in its last layer."""

    def layers(config):
        *first, last = family.layers(config)
        return (*first, replace(last, **what))

    return replace(family, layers=layers)


@pytest.fixture
def adapted(model_folder):
    config = AutoConfig.from_pretrained(model_folder)
    return get_peft_model(AutoModelForCausalLM.from_config(config), LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("mixer", ["linear attention", "gated attention", "sliding-window attention"])
def test_the_fast_engine_takes_the_mixers_it_has(adapted, monkeypatch, mixer):
    assert unsupported_reason(adapted, CPU) is None
    monkeypatch.setitem(FAMILIES, "qwen2", ending(FAMILIES["qwen2"], mixer=mixer))
    assert unsupported_reason(adapted, CPU) == f"of 2 layers 1 have {mixer}, {WITHOUT}"


def test_the_fast_engine_takes_known_families_alone(adapted, monkeypatch):
    monkeypatch.setattr("qwen_lit.engine.supported.FAMILIES", {"qwen3": FAMILIES["qwen3"]})
    assert unsupported_reason(adapted, CPU) == "model_type qwen2 is not qwen3"


def test_experts_are_left_to_the_reference_engine(adapted, monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen2", ending(FAMILIES["qwen2"], feed_forward="experts"))
    assert unsupported_reason(adapted, CPU) == f"of 2 layers 1 have experts, {WITHOUT}"


def test_a_head_in_four_bits_is_found_by_the_place_of_the_table(adapted, monkeypatch):
    config = adapted.base_model.model.config
    module = type("Module", (), {"settings": ModelSettings("", LoraSection()), "config": config})()
    head = {"lm_head.weight": Held("nf4", 64)}
    assert reference_because(module, adapted, head) == "lm_head is held in nf4"
    assert reference_because(module, adapted, {"model.layers.0.mlp.up_proj.weight": Held("nf4", 64)}) is None


def test_plan_says_that_a_mixer_has_no_fast_engine(arguments, monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "qwen2", ending(FAMILIES["qwen2"], mixer="linear attention"))
    assert main(["plan", *arguments[1:]]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert f"on a GPU reference (of 2 layers 1 have linear attention, {WITHOUT})" in told
    assert main(["plan", *arguments[1:], "--model.engine", "fast"]) == 2
    told = f"model.engine is fast, but of 2 layers 1 have linear attention, {WITHOUT}; set it to auto."
    assert told in capsys.readouterr().err


def test_gguf_is_refused_before_training_where_a_family_has_no_form_in_it(arguments, monkeypatch, capsys):
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], gguf=None))
    monkeypatch.setattr("qwen_lit.model.adapted.load_frozen", lambda *a: pytest.fail("the model is loaded"))
    assert main([*arguments, "--export.gguf", "q8_0"]) == 2
    assert (
        "export.gguf is q8_0, but this qwen2 model cannot be written as GGUF: it has no form"
        in capsys.readouterr().err
    )


def test_targets_that_are_left_out_are_the_familys_own_and_the_run_says_so(arguments, monkeypatch, tmp_path):
    monkeypatch.setitem(FAMILIES, "qwen2", replace(FAMILIES["qwen2"], targets=("up_proj", "k_proj")))
    left_out = ["--model.lora_config.target_modules", "null", "--trainer.max_steps", "1", "--export.merge", "false"]
    assert main([*arguments, *left_out]) == 0
    written = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model"]["lora_config"]
    adapter = json.loads((tmp_path / "out" / "lora_adapter" / "adapter_config.json").read_text())
    assert written["target_modules"] == ["up_proj", "k_proj"]
    assert set(adapter["target_modules"]) == {"up_proj", "k_proj"}
    again = ["--ckpt_path", "last", *left_out, "--trainer.max_steps", "2"]
    assert main([*arguments, *again]) == 0


def test_an_empty_list_of_targets_is_refused(arguments, capsys):
    assert main([*arguments, "--model.lora_config.target_modules", "[]"]) == 2
    assert "name linears, for example [q_proj, k_proj, v_proj, o_proj]" in capsys.readouterr().err
