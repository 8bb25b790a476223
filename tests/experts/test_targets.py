"""What LoRA targets mean in a mixture of experts is said before anything is trained, and is what PEFT reads."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from qwen_lit.cli import main
from qwen_lit.errors import UserError
from qwen_lit.export.adapter import write_for_whole
from qwen_lit.families.mixtures import for_peft, from_peft
from qwen_lit.families.table import FAMILIES
from qwen_lit.model.load import add_adapter, load_config, put_adapter, read_adapted, read_model
from qwen_lit.model.targets import check_targets
from tests.experts.mixtures import mixture
from tests.tiny import make_model

CPU = torch.device("cpu")
KINDS = ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHARED = [f"shared_expert.{name}_proj" for name in ("gate", "up", "down")]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"), request.param, fused=False)


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    return mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe", fused=False)


def adapted_names(model):
    found = {
        name.split(".layers.")[1].split(".", 1)[1] for name, one in model.named_modules() if hasattr(one, "lora_A")
    }
    return {name.replace(".base_layer", "") for name in found}


def test_the_family_s_own_targets_adapt_the_shared_expert_and_no_other(folder):
    model = put_adapter(
        read_model(folder, CPU), LoraConfig(r=2, target_modules=list(FAMILIES[kind_of(folder)].targets))
    )
    names = adapted_names(model)
    assert "self_attn.q_proj" in names and not any("mlp.experts" in name or name == "mlp.gate" for name in names)
    shared = {f"mlp.{name}" for name in SHARED}
    assert shared <= names if kind_of(folder) != "qwen3_moe" else not shared & names
    assert {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")} == {2}


def kind_of(folder):
    return json.loads((folder / "config.json").read_text())["model_type"]


def test_all_linear_adapts_no_router_and_nothing_that_steers_gates_and_says_so(folder, caplog):
    lora = LoraConfig(r=2, target_modules="all-linear")
    with caplog.at_level(logging.INFO):
        names = adapted_names(put_adapter(read_model(folder, CPU), lora))
    small = {"mlp.gate", "mlp.shared_expert_gate", *(f"linear_attn.in_proj_{name}" for name in ("a", "b", "ba"))}
    assert "self_attn.o_proj" in names and not names & small
    assert not any("mlp.experts" in name for name in names)
    assert "all-linear leaves out" in caplog.text and "mlp.gate" in caplog.text


@pytest.mark.parametrize("targets", [["q_proj", "gate"], ["mlp.gate"], r".*\.mlp\.gate", r".*gate.*"])
def test_the_router_is_refused_with_the_reason(moe, targets):
    with pytest.raises(UserError, match="names the router .mlp.gate., which is not trained: .*keep their shares even"):
        check_targets(load_config(moe), LoraConfig(target_modules=targets))


def test_the_router_is_not_trained_whole_either(moe):
    with pytest.raises(UserError, match="modules_to_save names the router"):
        check_targets(load_config(moe), LoraConfig(target_modules=["q_proj"], modules_to_save=["gate"]))


def test_names_of_an_mlp_are_refused_with_what_to_name_instead(folder):
    with pytest.raises(UserError, match=r"names gate_proj, up_proj.*target_parameters: \[mlp.experts") as error:
        check_targets(load_config(folder), LoraConfig(target_modules=["q_proj", "gate_proj", "up_proj"]))
    shared = "[shared_expert.gate_proj, shared_expert.up_proj]" in str(error.value)
    assert shared == (kind_of(folder) != "qwen3_moe")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is 0.1, but PEFT adapts parameters.*set it to 0"),
        ({"use_dora": True}, "use_dora is True.*set it to false"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is pissa.*set it to true"),
        ({"layers_to_transform": [0]}, r"layers_to_transform is \[0\], but PEFT adapts the experts of every layer"),
        ({"target_parameters": ["mlp.gate.weight"]}, "'mlp.gate.weight' cannot be adapted.*mlp.experts.gate_up_proj"),
    ],
)
def test_what_experts_cannot_have_is_refused_before_training(moe, options, message):
    lora = LoraConfig(**({"target_modules": ["q_proj"], "target_parameters": EXPERTS} | options))
    with pytest.raises(UserError, match=message):
        check_targets(load_config(moe), lora)


def test_parameters_of_a_dense_model_are_refused(model_folder):
    with pytest.raises(UserError, match="target_parameters.*the model has no experts"):
        check_targets(load_config(model_folder), LoraConfig(target_parameters=EXPERTS))


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.filterwarnings("ignore:The following")  # of PEFT's, of patterns that parameters alone match
def test_plain_peft_reads_an_adapter_of_shared_expert_and_experts_as_it_was_trained(kind, tmp_path):
    base = mixture(tmp_path / "base", kind, fused=True)
    settings = {"r": 2, "target_modules": ["q_proj", *SHARED], "target_parameters": EXPERTS}
    lora = LoraConfig(**settings, rank_pattern={"shared_expert.up_proj": 3}, alpha_pattern={"up_proj": 5})
    model = add_adapter(read_model(base, CPU, dtype=torch.float32), lora, checkpointing=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    write_for_whole(tmp_path / "adapter", FAMILIES[kind])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        before = plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
        ours = model.eval()(input_ids=ids).logits
        again = read_adapted(read_model(base, CPU, dtype=torch.float32), tmp_path / "adapter")
        assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(before, ours, atol=0.1)
        assert torch.allclose(again(input_ids=ids).logits, ours, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "layers.1.mlp.up_proj", "mlp.down_proj"]])
@pytest.mark.filterwarnings("ignore:The following")
def test_plain_peft_reads_an_adapter_of_layers_without_experts(targets, tokenizer, tmp_path):
    base = make_model("qwen3_moe", tmp_path / "base", tokenizer, num_hidden_layers=3, mlp_only_layers=[1])
    lora = LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, rank_pattern={"down_proj": 3})
    check_targets(load_config(base), lora)
    model = add_adapter(read_model(base, CPU, dtype=torch.float32), lora, checkpointing=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    write_for_whole(tmp_path / "adapter", FAMILIES["qwen3_moe"])
    ids = torch.arange(10)[None]
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        ours, before = model.eval()(input_ids=ids).logits, plain(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()(input_ids=ids).logits
        again = read_adapted(read_model(base, CPU, dtype=torch.float32), tmp_path / "adapter")
        assert torch.allclose(theirs, ours, atol=1e-4) and not torch.allclose(before, ours, atol=0.1)
        assert torch.allclose(again(input_ids=ids).logits, ours, atol=1e-5)


def test_names_of_an_mlp_are_refused_with_those_of_layers_without_experts(tokenizer, tmp_path):
    base = make_model("qwen3_moe", tmp_path, tokenizer, mlp_only_layers=[1])
    with pytest.raises(UserError, match=r"layers without experts are \[mlp.up_proj\]"):
        check_targets(load_config(base), LoraConfig(target_modules=["q_proj", "up_proj"]))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "mlp.up_proj"]])
@pytest.mark.parametrize("key", ["use_dora", "lora_bias"])
def test_what_peft_could_not_read_of_an_mlp_in_a_mixture_is_refused(targets, key, tokenizer, tmp_path):
    base = make_model("qwen3_moe", tmp_path, tokenizer, mlp_only_layers=[1])
    lora = LoraConfig(target_modules=targets, **{key: True})
    with pytest.raises(UserError, match=rf"{key} is True, but with it PEFT could not read .*mlp\.\w+_proj"):
        check_targets(load_config(base), lora)
    check_targets(load_config(base), LoraConfig(target_modules=["q_proj"], **{key: True}))


def test_a_dense_model_s_adapter_keeps_its_targets(tmp_path):
    config = {"target_modules": ["mlp.gate_proj"], "target_parameters": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    write_for_whole(tmp_path, FAMILIES["qwen3"])
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == config


def test_a_config_for_peft_comes_back_as_it_was():
    config = {
        "target_modules": ["q_proj", *sorted(SHARED)],
        "target_parameters": None,
        "lora_dropout": 0.0,
        "rank_pattern": {"up_proj": 3},
        "alpha_pattern": {},
    }
    assert for_peft(config) != config and from_peft(for_peft(config)) == config
    assert for_peft(config | {"target_modules": ["gate_proj"]}) == config | {"target_modules": ["gate_proj"]}


@pytest.fixture(scope="module")
def fits(tokenizer, dataset, tmp_path_factory):
    """Makes the arguments of a fit of a tiny mixture, its experts adapted."""
    base = mixture(tmp_path_factory.mktemp("base") / "base", "qwen3_moe", fused=False, words=len(tokenizer))
    tokenizer.save_pretrained(base)

    def make(out, *options):
        given = {
            "--config": "configs/qwen7b.yaml",
            "--output_dir": out,
            "--model.model_name_or_path": base,
            "--model.lora_config.target_parameters": json.dumps(EXPERTS),
            "--model.lora_config.lora_dropout": 0,
            "--model.lora_config.r": 2,
            "--model.learning_rate": 0.01,
            "--data.dataset_path": dataset,
            "--data.batch_size": 5,
            "--data.val_size": 5,
            "--trainer.accelerator": "cpu",
            "--trainer.accumulate_grad_batches": 1,
            "--trainer.max_epochs": 1,
            "--trainer.enable_progress_bar": "false",
            "--checkpoint.every_n_train_steps": 2,
            "--samples.rows": 0,
            "--export.smoke_rows": 0,
        }
        return ["fit", *(str(part) for pair in given.items() for part in pair), *options]

    return make


def test_a_run_with_adapted_experts_is_resumed_to_the_same_weights_and_merges_as_trained(fits, tmp_path):
    assert main(fits(tmp_path / "whole")) == 0
    assert main(fits(tmp_path / "stopped", "--trainer.max_steps", "2", "--export.merge", "false")) == 0
    assert main(fits(tmp_path / "stopped", "--ckpt_path", "last", "--export.merge", "false")) == 0
    whole, stopped = (
        load_file(tmp_path / name / "lora_adapter/adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert sum("mlp.experts" in name for name in whole) == 8
    assert whole.keys() == stopped.keys() and all(torch.equal(one, stopped[name]) for name, one in whole.items())
    verdict = json.loads((tmp_path / "whole/summary.json").read_text(encoding="utf-8"))["verdict"]
    dequantized = verdict["merges"]["dequantized"]
    assert abs(dequantized["loss"] - verdict["adapter_loss"]) < 0.02 and dequantized["kl"] < 0.002
    assert verdict["merges"]["original"]["kl"] > dequantized["kl"]
