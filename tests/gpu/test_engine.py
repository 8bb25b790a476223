"""The engine on the device: however memory is saved the gradients are the same, in the memory that was said."""

import gc
from functools import partial

import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_lit.callbacks.checkpoint_io import to_host
from qwen_lit.data.batches import collate
from qwen_lit.engine import offload
from qwen_lit.engine.ends import place_ends
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies
from qwen_lit.kernels import attention
from qwen_lit.model.load import add_adapter, load_base
from qwen_lit.model.optim import OPTIMIZERS
from qwen_lit.planner.host import STEPS
from qwen_lit.planner.measure import is_full, measure_host, measure_peak
from qwen_lit.planner.memory import MEMORY, ModelMemory
from qwen_lit.planner.placing import apply
from qwen_lit.planner.plan import GIB
from qwen_lit.planner.search import HostProfile, choose, limit
from tests.engine.test_engine import fifty_steps

pytestmark = pytest.mark.gpu

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]
DEVICE = torch.device("cuda:0")


def saved(folder, family="qwen2", **sizes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 5000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
        **sizes,
    }
    config, model = (Qwen2Config, Qwen2ForCausalLM) if family == "qwen2" else (Qwen3Config, Qwen3ForCausalLM)
    model(config(**sizes)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def folders(folder, tmp_path_factory):
    """Models whose memory goes to different parts."""
    return {
        "usual": folder,
        "wide MLP": saved(tmp_path_factory.mktemp("model"), intermediate_size=5632),
        "narrow MLP": saved(tmp_path_factory.mktemp("model"), hidden_size=2048, num_attention_heads=16),
        "wide attention": saved(
            tmp_path_factory.mktemp("model"),
            "qwen3",
            num_attention_heads=16,
            num_key_value_heads=8,
            intermediate_size=3072,
        ),
    }


def loaded(folder, targets, dropout=0.0, dtype=torch.bfloat16):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=targets)
    base = load_base(str(folder), quantization, DEVICE)
    torch.manual_seed(3)
    model = add_adapter(base, lora, False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    if dtype == torch.float32:
        for module in model.float().modules():
            if isinstance(module, Linear4bit):
                module.weight.quant_state.dtype = dtype
    return model


def batch(lengths, seed=0):
    draw = np.random.default_rng(seed)
    made = collate([(draw.integers(0, 5000, n), np.array([[0, n]])) for n in lengths], 0)
    return {key: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for key, value in made.items()}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def repeatable(monkeypatch):
    """Sums are taken in one order, so that equal numbers have equal bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("lengths", [[512] * 4, [1, 700, 333, 1014]], ids=["equal", "unequal"])
def test_what_is_kept_recomputed_or_offloaded_gives_the_same_bits(
    folder, targets, dropout, lengths, monkeypatch, repeatable
):
    monkeypatch.setattr(offload, "SMALL", 0)
    monkeypatch.setattr(attention, "FLASH", ())
    attention.flash.cache_clear()
    model, one = loaded(folder, targets, dropout), batch(lengths)
    runs = []
    for options in (
        {},
        {"recompute": 6},
        {"recompute": 6, "offload_inputs": True},
        {"offload_activations": 6},
        {"offload_activations": 3},
        {"recompute": 2, "offload_activations": 3},
        {"offload_activations": 2, "resident": 6},
    ):
        engine = FastEngine(model, Policies.of_counts(6, **options))
        # The second run is where memory is used again while copies are under way.
        for _ in range(2):
            torch.manual_seed(5)
            loss = engine.loss_sum(one)
            runs.append((options, float(loss.detach()), gradients(model, loss)))
    attention.flash.cache_clear()
    for options, loss, found in runs[1:]:
        assert loss == runs[0][1], options
        for name, wanted in runs[0][2].items():
            error = float((found[name] - wanted).norm() / wanted.norm())
            # The backward of torch's varlen attention adds in no fixed order, and layers below multiply what differs.
            assert error == 0 if len(set(lengths)) == 1 else error < 2e-2, (options, name, error)


@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["usual", "wide attention"])
@pytest.mark.parametrize(("dtype", "rate"), [(torch.bfloat16, 2e-4), (torch.float32, 1e-3)], ids=["bf16", "fp32"])
def test_fifty_steps_have_pefts_losses(folders, kind, dropout, targets, dtype, rate):
    batches = [batch((40, 60, 30, 50), seed) for seed in range(5)]
    low = partial(torch.autocast, DEVICE.type, dtype=dtype, enabled=dtype != torch.float32)
    pefts, ours = (
        fifty_steps(loaded(folders[kind], targets, dropout, dtype), batches, fast, rate, low) for fast in (False, True)
    )
    # At the higher rate, bfloat16's rounding alone leads two runs apart.
    assert pefts[-1] < pefts[0] - 1
    assert np.abs(np.subtract(pefts, ours)).max() < 1e-2


PLANS = {
    "kept": {},
    "recomputed": {"recompute": 6},
    "inputs offloaded": {"recompute": 6, "offload_inputs": True},
    "inputs and lm_head on the host": {"recompute": 6, "offload_inputs": True, "offload_head": True},
    "half offloaded": {"offload_activations": 3},
    "recomputed and offloaded": {"recompute": 3, "offload_activations": 2},
    "kept in 8 bits": {"kept": "int8"},
    "in 8 bits, some recomputed, some offloaded": {"recompute": 2, "offload_activations": 2, "kept": "int8"},
}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("kind", ["usual", "wide MLP", "narrow MLP", "wide attention"])
def test_the_estimate_is_within_5_percent_of_the_measured_peak(folders, kind, targets, dropout):
    model, tokens = loaded(folders[kind], targets, dropout), 16_384
    one, wrong = batch([2048] * 7 + [1000, 1048]), {}
    for how, options in PLANS.items():
        # What waits in a cycle for Python's collector would count as the model's own, and be gone at the peak.
        gc.collect()
        torch.cuda.empty_cache()
        # cuBLAS has its workspace by now.
        static = torch.cuda.memory_allocated() - MEMORY.cublas
        policies = Policies.of_counts(6, **options)
        memory = ModelMemory.of(model, 0, kept=policies.kept)
        estimate = memory.peak(static, tokens, policies)
        place_ends(model.base_model.model, *policies.ends_on_host)
        peak = measure_peak(FastEngine(model, policies), one)
        place_ends(model.base_model.model, False, False)
        if abs(estimate - peak) > 0.05 * peak:
            wrong[how] = (estimate / GIB, peak / GIB)
    assert not wrong


def test_a_measured_peak_leaves_nothing_behind(folder):
    model = loaded(folder, QKVO, 0.1)
    engine, one = FastEngine(model), batch([500, 300])
    torch.manual_seed(7)
    before = torch.get_rng_state(), torch.cuda.get_rng_state(), torch.cuda.memory_allocated()
    assert measure_peak(engine, one) > before[2]
    assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
    assert all(p.grad is None for p in model.parameters())


def fills(engine, one):
    """Whether a batch is too much; what it holds goes with the error."""
    try:
        measure_peak(engine, one)
    except RuntimeError as error:
        return is_full(error)
    return False


def test_what_does_not_fit_is_told_and_training_goes_on_after_it(folder):
    model = loaded(folder, QKVO)
    engine, total = FastEngine(model), torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    small = torch.cuda.memory_allocated() + GIB // 2
    torch.cuda.set_per_process_memory_fraction(small / total)
    try:
        assert fills(engine, batch([4096] * 8))
        assert measure_peak(engine, batch([100] * 2)) < small
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_machine_is_measured_alike_twice(folder):
    model = loaded(folder, QKVO)
    one, two = (measure_host(FastEngine(model), ModelMemory.of(model, 2), batch([16]), 1) for _ in range(2))
    assert 0 <= one.share <= 1 and one.share * STEPS == int(one.share * STEPS)
    assert abs(one.share - two.share) <= 1 / STEPS and GIB < one.memory < 2**62
    assert one.rate > GIB and 0.5 < one.rate / two.rate < 2
    assert 0 < one.launch < 1_000_000 and 0.5 < one.launch / two.launch < 2


def test_a_plan_with_offloaded_layers_stays_within_its_budget(folder):
    model = loaded(folder, QKVO)
    torch.cuda.empty_cache()
    static, memory = torch.cuda.memory_allocated() - MEMORY.cublas, ModelMemory.of(model, 2)
    budget = static + GIB
    chosen = choose(memory, static, budget, {n: n * 2048 for n in (8, 4, 2, 1)}, HostProfile(1.0))
    assert chosen.policies.offloaded > 0
    peak = measure_peak(apply(chosen, model), batch([2048] * chosen.micro_batches_at_once))
    assert peak <= limit(budget), (str(chosen), peak / GIB)


def test_paged_states_are_copied_as_they_are():
    weight = torch.nn.Parameter(torch.randn(1000, 400, device=DEVICE))
    optimizer = OPTIMIZERS["paged_adamw_8bit"].build([{"params": [weight], "lr": 1e-2}], (0.9, 0.999))

    def step():
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        return optimizer.state[weight]

    for _ in range(3):
        state = step()
    assert state["state1"].is_paged and optimizer.settled
    wanted = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    copied = to_host(dict(state))
    assert all(torch.equal(copied[name], value.cpu()) for name, value in wanted.items())
    state = step()
    assert not torch.equal(copied["absmax1"], state["absmax1"].cpu())
    assert torch.equal(copied["state1"], wanted["state1"])
