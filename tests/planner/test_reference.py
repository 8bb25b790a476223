"""The estimate for PEFT's own path is what autograd keeps of transformers' modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from qwen_lit.commands.plan import static_bytes
from qwen_lit.families.table import family_of
from qwen_lit.model.coverage import coverage, left_out
from qwen_lit.planner.reference import reference_memory
from qwen_lit.quantization import planned_weights, usable
from tests.planner.test_sizes import NF4, config_of

TOKENS = 512
SIZES = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
KINDS = {
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": DELTA | EXPERTS | {"shared_expert_intermediate_size": 96},
    "qwen3_next": DELTA | EXPERTS | {"shared_expert_intermediate_size": 96},
}
ATTENTION = ["q_proj", "v_proj", "o_proj"]


def adapted(kind, targets=ATTENTION):
    config = AutoConfig.for_model(kind, **SIZES, **KINDS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets)), config


def kept_by_autograd(model, config):
    """Bytes that each layer's forward leaves behind, parameters aside."""
    decoder = model.base_model.model.get_submodule(family_of(config).decoder)
    frozen = {one.untyped_storage().data_ptr() for one in model.parameters()}
    now, kept = [None], [{} for _ in decoder.layers]
    for number, layer in enumerate(decoder.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: now.__setitem__(0, number))
        layer.register_forward_hook(lambda *_: now.__setitem__(0, None))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if now[0] is not None and storage.data_ptr() not in frozen:
            # The tensor is held, so that its address stays its own.
            kept[now[0]][storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    model.enable_input_require_grads()
    ids = torch.randint(0, 96, (1, TOKENS))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        decoder(input_ids=ids, position_ids=torch.arange(TOKENS)[None], use_cache=False)
    return [sum(size for size, _ in layer.values()) for layer in kept]


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_layers_keep_is_counted(kind):
    model, config = adapted(kind, [*ATTENTION, "in_proj_qkv", "out_proj"] if kind.startswith("qwen3_5") else ATTENTION)
    memory = reference_memory(model, 0, TOKENS, 0, 8.0, checkpointing=False)
    real = kept_by_autograd(model, config)
    assert memory.parts["kept by the layers"] == pytest.approx(sum(real[:-1]), rel=0.1)


def test_a_recomputed_model_keeps_inputs_and_its_largest_layer():
    model, config = adapted("qwen3_5_text")
    kept = reference_memory(model, 1000, TOKENS, 1, 8.0, checkpointing=False)
    memory = reference_memory(model, 1000, TOKENS, 1, 8.0, checkpointing=True)
    assert memory.parts["inputs of the layers"] == 4 * 2 * 128 * TOKENS and memory.peak < kept.peak
    trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
    assert memory.parts["weights"] == 1000 and memory.parts["optimizer states"] == 8 * trained
    # A layer of linear attention keeps three times as much as one of attention.
    linear = memory.parts["the largest layer, computed again, and its backward"]
    attention, _ = adapted("qwen3")
    other = reference_memory(attention, 1000, TOKENS, 1, 8.0, checkpointing=True)
    assert linear > 2.5 * other.parts["the largest layer, computed again, and its backward"]
    # Logits come first where there are many.
    config.vocab_size = 10**6
    at_loss = reference_memory(model, 1000, TOKENS, TOKENS, 8.0, checkpointing=True)
    assert at_loss.parts["logits and their loss"] == 512 * 10**6 * 12


def test_the_estimate_is_near_what_was_measured_on_a_card():
    """docs/memory.md: PEFT's own path took 7.58 GiB on an H100 with the shape of Qwen2.5-7B, r=32, rows of 2,048."""
    shape = {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    heads = {"num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False}
    config = AutoConfig.for_model("qwen2", **shape, **heads)
    held = planned_weights(config, usable(NF4, config), torch.device("cpu"))
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model = get_peft_model(base, LoraConfig(r=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    memory = reference_memory(model, static_bytes(model, held), 2048, 2048, 2.0, checkpointing=True)
    assert memory.peak / 2**30 == pytest.approx(7.58, abs=0.1)


@pytest.mark.parametrize(
    ("targets", "layers", "linears"),
    [(["q_proj", "k_proj", "v_proj", "o_proj"], 8, 32), (["in_proj_z"], 24, 24), (["up_proj", "out_proj"], 32, 56)],
)
def test_the_reach_of_an_adapter_is_counted_in_layers_and_linears(targets, layers, linears):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config_of("Qwen3.5-9B"), dtype=torch.bfloat16)
        lora = LoraConfig(r=4, target_modules=targets)
        model = get_peft_model(base, lora)
    assert str(coverage(model)) == f"{layers} of 32 layers, {linears} of 248 linears adapted"
    warning = left_out(model, lora)
    if targets == ["q_proj", "k_proj", "v_proj", "o_proj"]:
        assert warning.startswith("lora_config.target_modules adapts nothing in 24 of 32 layers, those with linear")
        assert "usual in a qwen3_5_text is [q_proj, k_proj, v_proj, o_proj, in_proj_qkv" in warning
        lora.layers_to_transform = [3]
        assert left_out(model, lora) is None
    else:
        assert (warning is None) == (layers == 32)
