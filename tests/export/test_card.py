"""The cards: what the hub reads, and commands that servers take."""

import json
import shlex

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from qwen_lit.export.card import AdapterFacts, ModelCardFacts, finish_adapter, model_card
from qwen_lit.names import base_reference, hub_name

NAMES = ["Qwen/Qwen2.5-7B-Instruct", '我的 模型/Qwen2.5 7B: "微调" #1', "it's 'quoted'", "- [a]: {b}"]


def adapter(folder, targets=("q_proj",), rank=4, **config):
    """An adapter folder with weights of one layer."""
    folder.mkdir()
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 9, "bias": "none", "base_model_name_or_path": "x"}
    (folder / "adapter_config.json").write_text(json.dumps(settings | config))
    prefix = "base_model.model.model.layers.0.self_attn."
    tensors = {}
    for target in targets:
        end = target in ("lm_head", "embed_tokens")
        name = f"base_model.model.{'model.' * (target == 'embed_tokens')}{target}" if end else prefix + target
        kind = "lora_embedding_{}" if target == "embed_tokens" else "lora_{}.weight"
        tensors |= {f"{name}.{kind.format('A')}": torch.zeros(rank, 8)}
        tensors |= {f"{name}.{kind.format('B')}": torch.zeros(8, rank)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def card_of(folder, base, **told):
    return model_card(
        ModelCardFacts(config={"model": {"model_name_or_path": base}}, adapter=AdapterFacts.read(folder), **told)
    )


def commands(card):
    blocks = card.split("```bash\n")[1:]
    lines = [shlex.split(line, comments=True) for block in blocks for line in block.split("```")[0].splitlines()]
    return [line for line in lines if line]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("local", [True, False], ids=["folder", "name"])
def test_the_front_matter_is_yaml_and_names_the_base_only_where_the_hub_knows_it(tmp_path, monkeypatch, name, local):
    monkeypatch.chdir(tmp_path)
    if local:
        (tmp_path / name).mkdir(parents=True)
    folder = adapter(tmp_path / "lora_adapter")
    finish_adapter(folder, name, {})
    for text in (card_of(folder, name), (folder / "README.md").read_text("utf-8")):
        front = yaml.safe_load(text.split("---\n")[1])
        known = name == NAMES[0] and not local
        assert front.get("base_model") == (name if known else None)
        assert front["pipeline_tag"] == "text-generation" and "qwen_lit" in front["tags"]
        assert ModelCard(text).data.base_model == front.get("base_model")
        base = str((tmp_path / name).resolve()) if local else name
        assert [one[2] for one in commands(text) if "--max-lora-rank" in one] == [base]
    assert json.loads((folder / "adapter_config.json").read_text("utf-8"))["base_model_name_or_path"] == base


def test_a_hub_name_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("Qwen/Qwen3-8B") == base_reference("Qwen/Qwen3-8B") == "Qwen/Qwen3-8B"
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    assert hub_name("models/qwen") is None and base_reference("models/qwen") == str(tmp_path / "models" / "qwen")
    for name in ("/models/qwen", "./models", "~/qwen", "qwen", "模型/qwen"):
        assert hub_name(name) is None, name


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "trained biases"),
        ({"bias": "all"}, "trained biases"),
        ({"lora_bias": True}, "trained biases"),
        ({"targets": ("q_proj", "embed_tokens")}, "LoRA on embed_tokens"),
        ({"targets": ("embed_tokens", "lm_head")}, "LoRA on embed_tokens and lm_head"),
        ({"rank_pattern": {"q_proj": 8}}, "an alpha or a rank of its own for some modules"),
        ({"alpha_pattern": {"q_proj": 8}}, "an alpha or a rank of its own for some modules"),
        ({"use_dora": True, "bias": "all"}, "DoRA, trained biases"),
    ],
)
def test_an_adapter_that_servers_refuse_gets_a_reason_instead_of_a_command(tmp_path, options, reason):
    folder = adapter(tmp_path / "lora_adapter", **options)
    finish_adapter(folder, "Qwen/Qwen3-8B", {"seed_everything": 7})
    assert json.loads((folder / "training_config.json").read_text()) == {"seed_everything": 7}
    for text in (card_of(folder, "Qwen/Qwen3-8B"), (folder / "README.md").read_text("utf-8")):
        assert "--enable-lora" not in text and "--lora-paths" not in text
        assert f"because of {reason}: serve the merged model." in text
    merged = ["vllm", "serve", ".", "--served-model-name", "Qwen3-8B-tuned"]
    assert merged in commands(card_of(folder, "Qwen/Qwen3-8B"))


def test_rank_stabilised_lora_is_served_by_vllm_alone(tmp_path):
    card = card_of(adapter(tmp_path / "lora_adapter", use_rslora=True), "Qwen/Qwen3-8B")
    assert "--enable-lora" in card and "--lora-paths" not in card and "SGLang scales" in card


def test_the_card_tells_data_losses_and_verdict(tmp_path):
    merges = {"original": {"loss": 1.5, "kl": 0.02, "same_top": 0.95}}
    card = card_of(
        adapter(tmp_path / "lora_adapter"),
        "Qwen/Qwen2.5-7B-Instruct",
        data={"share supervised": "81.0%", "fingerprint": "10 rows, abc"},
        losses={"train, last step": 1.25},
        verdict={"rows": 3, "tokens": 99, "adapter_loss": 1.4, "merges": merges, "kind": "held-out"},
        stopped=(3, 3),
    )
    for words in (
        "81.0%",
        "10 rows, abc",
        "1.2500",
        "| adapter on its base | 1.4000 |",
        "95.00%",
        "3 of 3",
        "merged into its bf16 weights",
    ):
        assert words in card, words
    told = card_of(tmp_path / "lora_adapter", "Qwen/Qwen2.5-7B", merge_base="dequantized", held_in="nf4, double")
    assert "weights as they were trained on, in nf4, double." in told
