"""What the table says of a family is what transformers builds, bitsandbytes replaces and gguf-py names."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from qwen_lit.errors import UserError
from qwen_lit.families.layer import Family, Layer, Linear, Vector
from qwen_lit.families.table import FAMILIES, family_of
from qwen_lit.model.load import load_base
from qwen_lit.planner.flops import token_flops
from qwen_lit.quantization import Held, count_linears, loaded_weights, on_disk, planned_weights, usable

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 128,
}
CASES = {
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 untied": (
        "qwen2",
        {"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False, "head_dim": 32, "attention_bias": True}),
}
WRITTEN = {
    "qwen2": {
        ("self_attn.q_proj", 64, 64, True, "attn_q"),
        ("self_attn.k_proj", 64, 32, True, "attn_k"),
        ("self_attn.v_proj", 64, 32, True, "attn_v"),
        ("self_attn.o_proj", 64, 64, False, "attn_output"),
        ("mlp.gate_proj", 64, 160, False, "ffn_gate"),
        ("mlp.up_proj", 64, 160, False, "ffn_up"),
        ("mlp.down_proj", 160, 64, False, "ffn_down"),
    },
    "qwen3": {
        ("self_attn.q_proj", 64, 128, False, "attn_q"),
        ("self_attn.k_proj", 64, 64, False, "attn_k"),
        ("self_attn.v_proj", 64, 64, False, "attn_v"),
        ("self_attn.o_proj", 128, 64, False, "attn_output"),
        ("mlp.gate_proj", 64, 160, False, "ffn_gate"),
        ("mlp.up_proj", 64, 160, False, "ffn_up"),
        ("mlp.down_proj", 160, 64, False, "ffn_down"),
    },
}
CPU = torch.device("cpu")


@pytest.fixture(params=CASES, scope="module")
def built(request, tmp_path_factory):
    """A family, a config of it, and the folder of a tiny model."""
    kind, options = CASES[request.param]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES, **options)
    folder = tmp_path_factory.mktemp("family")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return FAMILIES[kind], config, folder


def test_the_table_needs_no_torch():
    names = "'torch' in sys.modules, 'transformers' in sys.modules"
    code = f"import sys; import qwen_lit.families.table as table; print(len(table.FAMILIES), {names})"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(FAMILIES)), "False", "False"]


def test_each_family_stands_under_its_own_name():
    assert all(kind == family.model_type for kind, family in FAMILIES.items())


def test_every_layer_has_the_linears_of_transformers_with_their_sizes_and_biases(built):
    family, config, folder = built
    model = AutoModelForCausalLM.from_pretrained(folder)
    blocks = model.get_submodule(family.decoder).layers
    layers = family.layers(config)
    assert len(blocks) == len(layers) == 3
    for block, layer in zip(blocks, layers, strict=True):
        real = {
            (name, one.in_features, one.out_features, one.bias is not None)
            for name, one in block.named_modules()
            if isinstance(one, nn.Linear)
        }
        assert {(one.path, one.inputs, one.outputs, one.bias) for one in layer.linears} == real
        vectors = {name: one.numel() for name, one in block.named_parameters() if one.ndim == 1 and "proj" not in name}
        assert {one.name: one.size for one in layer.vectors} == vectors
        assert layer.head_size == block.self_attn.head_dim and layer.query_key_norm == hasattr(
            block.self_attn, "q_norm"
        )
        assert (layer.heads, layer.key_heads) == (config.num_attention_heads, config.num_key_value_heads)
        assert (layer.mixer, layer.feed_forward) == ("attention", "mlp")
    ends = {family.embedding: model.get_input_embeddings(), family.head: model.get_output_embeddings()}
    assert all(model.get_submodule(place) is one for place, one in ends.items())
    assert model.get_submodule(family.norm) is model.model.norm


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_linears_of_a_family_are_those_written_here(kind):
    options = dict(CASES[kind][1])
    (layer, *_) = FAMILIES[kind].layers({"model_type": kind, **SIZES, **options})
    found = {(one.path, one.inputs, one.outputs, one.bias, one.gguf[0].name) for one in layer.linears}
    assert found == {(*rest, f"{name}.weight") for *rest, name in WRITTEN[kind]}
    assert [[one.name for one in group] for group in layer.groups] == [
        ["q_proj", "k_proj", "v_proj"],
        ["o_proj"],
        ["gate_proj", "up_proj"],
        ["down_proj"],
    ]
    assert layer.query_key_norm == (kind == "qwen3")


def test_a_config_and_its_json_give_the_same(built):
    family, config, folder = built
    written = json.loads((folder / "config.json").read_text())
    assert family.layers(written) == family.layers(config) and family_of(written) is family_of(config) is family
    assert family.gguf.fields(written) == family.gguf.fields(config)


def test_the_names_of_the_files_are_those_of_the_table(built):
    family, config, folder = built
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        there = set(file.keys())
    known = {name for names in family.weights(config).values() for name in names}
    tied = {family.head_on_disk} if config.tie_word_embeddings else set()
    assert there == known - tied and family.head_on_disk in known and family.embedding_on_disk in there
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert {name for name, _ in model.named_parameters()} == set(family.weights(config)) - tied


def test_the_names_in_gguf_are_those_of_gguf_py(built):
    gguf = pytest.importorskip("gguf")
    family, config, folder = built
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == family.gguf.arch)
    mapping = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        there = set(file.keys())
    ours = {one.sources[0]: one.name for one in family.gguf_tensors(config, there)}
    assert set(ours) == there
    assert ours == {name: mapping.get_name(name, try_suffixes=(".weight", ".bias")) for name in ours}
    keys = {
        value.replace("{arch}", family.gguf.arch)
        for group in (gguf.Keys.LLM, gguf.Keys.Attention, gguf.Keys.Rope)
        for value in vars(group).values()
        if isinstance(value, str)
    }
    assert {f"{family.gguf.arch}.{key}" for key in family.gguf.fields(config)} <= keys


def test_the_shape_in_gguf_is_the_configs():
    fields = FAMILIES["qwen3"].gguf.fields({"model_type": "qwen3", **SIZES, "head_dim": 32, "rope_theta": 1e6})
    assert fields == {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": 160,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "rope.freq_base": 1e6,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.key_length": 32,
        "attention.value_length": 32,
    }


def test_bitsandbytes_holds_what_the_table_says(built):
    family, config, folder = built
    quantization = usable(BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"), config)
    model = load_base(folder, quantization, CPU)
    replaced = {f"{name}.weight" for name, one in model.named_modules() if isinstance(one, Linear4bit)}
    said = {
        f"{family.block(number)}.{one.weight}"
        for number, layer in enumerate(family.layers(config))
        for one in layer.linears
        if one.linear and one.quantized
    }
    assert replaced == said == set(loaded_weights(model))
    assert planned_weights(config, quantization, CPU) == loaded_weights(model)
    assert count_linears(config) == len(said) + 1 == 22


def test_what_a_family_keeps_is_kept_whatever_else_is_skipped(built, monkeypatch):
    """Such as the small projections that steer a linear attention's decay."""
    family, config, folder = built

    def layers(config):
        return tuple(
            replace(
                layer,
                groups=tuple(
                    tuple(replace(one, quantized=one.name != "up_proj") for one in group) for group in layer.groups
                ),
            )
            for layer in family.layers(config)
        )

    monkeypatch.setitem(FAMILIES, family.model_type, replace(family, layers=layers))
    up = {f"model.layers.{number}.mlp.up_proj.weight" for number in range(3)}
    k = {f"model.layers.{number}.self_attn.k_proj.weight" for number in range(3)}
    given = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    for skipped, kept in ((None, up), (["lm_head", "k_proj"], up | k)):
        quantization = usable(BitsAndBytesConfig(**given, llm_int8_skip_modules=skipped), config)
        planned = planned_weights(config, quantization, CPU)
        assert planned == loaded_weights(load_base(folder, quantization, CPU))
        assert set(planned).isdisjoint(kept) and len(planned) == 21 - len(kept)
        assert family.head_on_disk not in planned


EXPERTS = Layer(
    "gated attention",
    "experts",
    (
        (Linear("self_attn.q_proj", 8, 16),),
        (Linear("self_attn.o_proj", 8, 8),),
        (Linear("mlp.gate.weight", 8, 4, linear=False, quantized=False),),
        (
            Linear(
                "mlp.experts.down_proj",
                6,
                8,
                count=4,
                linear=False,
                quantized=False,
                tokens=2 / 4,
                parts=tuple(f"mlp.experts.{number}.down_proj.weight" for number in range(4)),
            ),
        ),
    ),
    (Vector("input_layernorm.weight", 8),),
    heads=2,
    head_size=4,
)
MADE_UP = Family(
    model_type="made_up",
    releases=("Made-up",),
    layers=lambda config: (EXPERTS, replace(EXPERTS, mixer="linear attention")),
    decoder_on_disk="model.language_model",
)


def test_experts_and_a_wrapper_can_be_told():
    names = MADE_UP.weights({})
    assert names["model.layers.1.mlp.experts.down_proj"] == tuple(
        f"model.language_model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(4)
    )
    assert names["model.layers.0.mlp.gate.weight"] == ("model.language_model.layers.0.mlp.gate.weight",)
    assert names["model.layers.0.input_layernorm.weight"] == ("model.language_model.layers.0.input_layernorm.weight",)
    assert names["lm_head.weight"] == ("lm_head.weight",)
    assert MADE_UP.embedding_on_disk == "model.language_model.embed_tokens.weight"
    assert EXPERTS.linears[-1].numbers == 4 * 6 * 8


def test_work_and_counts_follow_the_table(monkeypatch):
    """Attention counts where it is, an expert by its share of the tokens."""
    monkeypatch.setitem(FAMILIES, "made_up", MADE_UP)
    config = type("Config", (), {"model_type": "made_up", "vocab_size": 10, "hidden_size": 8})()
    model = nn.Linear(1, 1)
    model.base_model = type("Base", (), {"model": type("Causal", (), {"config": config})})
    linear = 2 * (8 * 16 + 8 * 8 + 8 * 4 + 4 * 6 * 8 / 2)
    attention = 2 * 100 * 2 * 4
    assert token_flops(model, 100, 0.5) == (4 * (linear + 40) + 3 * attention, 2 * linear + attention)
    assert count_linears(config) == 1 + 2 * (1 + 1 + 1 + 4)
    held = {
        "model.layers.1.mlp.experts.down_proj": Held("nf4", 64, matrices=4),
        "model.layers.0.self_attn.q_proj.weight": Held("nf4", 64),
    }
    assert on_disk(held, config) == dict.fromkeys(
        [
            "model.language_model.layers.0.self_attn.q_proj.weight",
            *(f"model.language_model.layers.1.mlp.experts.{number}.down_proj.weight" for number in range(4)),
        ],
        Held("nf4", 64),
    )


def test_a_window_is_read_as_transformers_reads_it():
    given = {**SIZES, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    wanted = ["attention", "sliding-window attention", "sliding-window attention"]
    for config in ({"model_type": "qwen2", **given}, AutoConfig.for_model("qwen2", **given)):
        assert [layer.mixer for layer in family_of(config).layers(config)] == wanted


def test_an_unknown_family_is_named_with_those_that_are_known():
    wanted = "/m is a 'llama', which cannot be trained; give one of Qwen2, Qwen2.5, Qwen3 dense, Qwen3.5"
    with pytest.raises(UserError, match=wanted):
        family_of({"model_type": "llama"}, "/m")
