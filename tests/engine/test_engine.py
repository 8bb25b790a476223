"""The fast engine equals PEFT's own path: values, gradients, and whole loss curves."""

import weakref
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.autograd.graph import saved_tensors_hooks
from transformers import BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from qwen_lit.cli import main
from qwen_lit.data.batches import collate, padded
from qwen_lit.engine.engine import FastEngine
from qwen_lit.engine.policy import Policies, Policy
from qwen_lit.engine.supported import linears_of, unsupported_reason
from qwen_lit.families.table import family_of
from qwen_lit.kernels.dropout import dropped
from qwen_lit.model.load import load_base
from qwen_lit.model.loss import summed_loss

CPU = torch.device("cpu")
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*QKVO, "gate_proj", "up_proj", "down_proj"]


def base(family: str):
    torch.manual_seed(0)
    kind, model = (Qwen2Config, Qwen2ForCausalLM) if family == "qwen2" else (Qwen3Config, Qwen3ForCausalLM)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 301}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    made = model(kind(**sizes, **heads, tie_word_embeddings=family == "qwen3"))
    made.requires_grad_(False)
    for name, parameter in made.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def adapted(family: str, **options):
    torch.manual_seed(1)
    lora = {"r": 4, "lora_alpha": 8, "target_modules": QKVO, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(base(family), LoraConfig(**lora))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model.train()


def batch(packed: bool, lengths=(7, 13, 1, 20), seed: int = 0):
    draw = np.random.default_rng(seed)
    made = collate([(draw.integers(0, 301, n), np.array([[n // 2, n]])) for n in lengths], 0)
    return made if packed else padded(made, 0)


def reference(model, one) -> torch.Tensor:
    causal = model.base_model.model
    hidden = causal.model(input_ids=one["input_ids"], position_ids=one["position_ids"], use_cache=False)
    rows = hidden.last_hidden_state.flatten(0, 1)[one["target_index"]]
    return summed_loss(causal.lm_head, rows, one["targets"])


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


VARIANTS = {
    "q, k, v, o": {},
    "all linears": {"target_modules": ALL},
    "some linears": {"target_modules": ["q_proj", "v_proj", "down_proj"]},
    "ranks and alphas per module": {"rank_pattern": {"q_proj": 6, "o_proj": 1}, "alpha_pattern": {"v_proj": 3}},
    "rsLoRA": {"use_rslora": True, "target_modules": ALL},
}


KEEP, AGAIN, INPUT, AWAY = Policy.KEEP, Policy.RECOMPUTE, Policy.RECOMPUTE_INPUT_ON_HOST, Policy.OFFLOAD
WAYS = (
    (KEEP, KEEP, KEEP),
    (AGAIN, KEEP, KEEP),
    (AGAIN, AGAIN, AGAIN),
    (INPUT, INPUT, INPUT),
    (AWAY, KEEP, AWAY),
    (AWAY, AWAY, AWAY),
    (AWAY, AGAIN, KEEP),
    (AWAY, AGAIN, AGAIN),
    (AWAY, INPUT, AWAY),
    (KEEP, INPUT, AGAIN),
)
PIECES = 10


def engine(model, recompute=0, **more):
    """Three layers, of which the first ones are recomputed."""
    return FastEngine(model, Policies.of_counts(len(model.base_model.model.model.layers), recompute, **more))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_equal_pefts_whatever_is_kept_recomputed_or_on_the_host(
    family, packed, variant, monkeypatch
):
    monkeypatch.setattr("qwen_lit.engine.offload.SMALL", 0)
    model, one = adapted(family, **VARIANTS[variant]), batch(packed)
    assert unsupported_reason(model, CPU) is None
    loss = reference(model, one)
    wanted = gradients(model, loss)
    assert wanted
    for policies in (*(Policies(way, loss_chunk=5) for way in WAYS), Policies(WAYS[3], mlp_piece=PIECES)):
        found_loss = FastEngine(model, policies).loss_sum(one)
        found = gradients(model, found_loss)
        assert abs(float(found_loss - loss)) < 1e-5 * float(loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() < 1e-4 * gradient.norm(), name


def test_with_its_adapters_disabled_a_model_has_the_loss_of_its_base():
    model, one = adapted("qwen2", lora_dropout=0.3, target_modules=ALL), batch(True)
    with_them = float(FastEngine(model).loss_sum(one).detach())
    with model.disable_adapter(), torch.no_grad():
        found, wanted = FastEngine(model).loss_sum(one), reference(model, one)
    assert torch.isclose(found, wanted, rtol=1e-5) and abs(float(found) - with_them) > 1e-3 * with_them


@pytest.mark.parametrize("lengths", [(1,), (2, 2, 2), (3,) * 400])
def test_odd_packs_work(lengths):
    model, one = adapted("qwen2"), batch(True, lengths)
    loss = reference(model, one)
    assert torch.isclose(FastEngine(model).loss_sum(one), loss, rtol=1e-5)


def test_a_batch_that_trains_nothing_leaves_zero_gradients():
    model = adapted("qwen2")
    one = collate([(np.arange(9), np.zeros((0, 2), dtype=int))], 0)
    loss = FastEngine(model).loss_sum(one)
    found = gradients(model, loss)
    assert float(loss) == 0 and all(not gradient.any() for gradient in found.values())


def test_dropout_is_the_same_in_backward_and_drawn_from_the_hosts_generator():
    model, one = adapted("qwen2", lora_dropout=0.3), batch(True)
    runs = []
    for recompute in (0, 3, 0):
        torch.manual_seed(5)
        loss = engine(model, recompute).loss_sum(one)
        runs.append((float(loss.detach()), gradients(model, loss)))
    torch.manual_seed(6)
    assert float(FastEngine(model).loss_sum(one)) != runs[0][0]
    for loss, found in runs[1:]:
        assert loss == runs[0][0]
        assert all(torch.equal(gradient, runs[0][1][name]) for name, gradient in found.items())
    model.eval()
    assert torch.isclose(FastEngine(model).loss_sum(one), reference(model, one), rtol=1e-5)


@pytest.mark.parametrize("piece", [0, 10], ids=["whole", "in pieces"])
def test_dropout_gradients_are_those_of_the_loss(piece):
    """Central differences along the gradient, in float64."""
    model, one = adapted("qwen2", lora_dropout=0.3, target_modules=ALL).double(), batch(True)

    def loss():
        torch.manual_seed(5)
        return engine(model, 3 if piece else 0, mlp_piece=piece).loss_sum(one)

    found = gradients(model, loss())
    named = dict(model.named_parameters())
    slope = sum(float((gradient**2).sum()) for gradient in found.values())
    step = 1e-4
    ends = []
    for sign in (1, -2):
        with torch.no_grad():
            for name, gradient in found.items():
                named[name] += sign * step * gradient
        ends.append(float(loss()))
    # The loss is a float32 sum, which bounds how well the difference is known.
    assert abs((ends[0] - ends[1]) / (2 * step) - slope) < 0.01 * slope


class SeededDropout(torch.nn.Module):
    """PEFT's dropout with the mask that the engine derives from a batch's seed for one place of the model."""

    def __init__(self, p: float, place: int, chosen: bool):
        super().__init__()
        self.p, self.place, self.chosen = p, place, chosen

    def forward(self, x):
        flat = x.flatten(0, 1)
        mask = torch.ones_like(flat, dtype=torch.float32)
        if self.chosen:
            # The engine goes on with these rows alone, and nobody looks at the others.
            mask[self.rows] = dropped(mask[self.rows], self.p, self.seed + self.place)
        else:
            mask = dropped(mask, self.p, self.seed + self.place)
        return (flat * mask).to(x.dtype).view_as(x)


def with_the_engines_masks(model):
    """Puts the masks into PEFT's own path; returns what draws a batch's seed, as the engine does."""
    places, blocks = [], model.base_model.model.model.layers
    config = model.base_model.model.config
    for number, (block, described) in enumerate(zip(blocks, family_of(config).layers(config), strict=True)):
        for name, layer in linears_of(block, described).items():
            drops = dict(getattr(layer, "lora_dropout", {}))
            if isinstance(drops.get("default"), torch.nn.Dropout):
                group = next(
                    at for at, linears in enumerate(described.groups) if name in {one.name for one in linears}
                )
                chosen = group > 0 and block is blocks[-1]
                places.append(SeededDropout(drops["default"].p, 4 * number + group, chosen))
                layer.lora_dropout["default"] = places[-1]

    def draw(one):
        seed = int(torch.randint(2**30, ()))
        for place in places:
            place.seed, place.rows = seed, one["target_index"]

    return draw


def fifty_steps(model, batches, fast, rate=1e-3, context=nullcontext):
    """The loss of each of fifty steps over these batches in turn, by the engine or by PEFT's own path."""
    draw = (lambda one: None) if fast else with_the_engines_masks(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    torch.manual_seed(2)
    made, curve = FastEngine(model), []
    for step in range(50):
        one = batches[step % len(batches)]
        draw(one)
        with context():
            loss = (made.loss_sum(one) if fast else reference(model, one)) / len(one["targets"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize("targets", [QKVO, ALL], ids=["q,k,v,o", "all linears"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_fifty_steps_have_pefts_losses(family, dropout, targets):
    batches = [batch(True, (40, 60, 30, 50), seed) for seed in range(5)]
    pefts, ours = (
        fifty_steps(adapted(family, lora_dropout=dropout, target_modules=targets), batches, fast)
        for fast in (False, True)
    )
    assert pefts[-1] < pefts[0]
    assert np.abs(np.subtract(pefts, ours)).max() < 1e-4


def four_bit(model_folder, **options):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ALL, "task_type": "CAUSAL_LM", **options}
    model = get_peft_model(load_base(str(model_folder), quantization, CPU), LoraConfig(**lora)).train()
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("targets", [ALL, QKVO, ["v_proj", "down_proj"], ["gate_proj"]], ids=len)
def test_a_4_bit_base_gives_pefts_losses_and_gradients(model_folder, targets):
    model, one = four_bit(model_folder, target_modules=targets), batch(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = reference(model, one)
    wanted = gradients(model, loss)
    for options in ({}, {"resident": 1}, {"recompute": 2, "mlp_piece": 16}):
        found_loss = engine(model, **options).loss_sum(one)
        found = gradients(model, found_loss)
        assert abs(float(found_loss - loss)) < 1e-2 * float(loss)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert (found[name] - gradient).norm() < 5e-2 * gradient.norm(), name


def test_weights_that_are_held_give_the_same_bits(model_folder):
    model, one = four_bit(model_folder, lora_dropout=0.2), batch(True)
    runs = []
    for held in (0, 1, 2):
        torch.manual_seed(5)
        loss = engine(model, resident=held).loss_sum(one)
        runs.append((float(loss.detach()), gradients(model, loss)))
    for loss, found in runs[1:]:
        assert loss == runs[0][0]
        assert all(torch.equal(gradient, runs[0][1][name]) for name, gradient in found.items())


@pytest.mark.parametrize("recompute", [0, 2])
def test_saved_tensors_that_come_back_without_their_room_give_the_same(model_folder, recompute):
    model, one = four_bit(model_folder), batch(True)
    made = engine(model, recompute, mlp_piece=10)
    wanted = gradients(model, made.loss_sum(one))
    with saved_tensors_hooks(lambda x: x.clone(memory_format=torch.contiguous_format), lambda x: x):
        found = gradients(model, made.loss_sum(one))
    assert all(torch.allclose(found[name], gradient, rtol=1e-3) for name, gradient in wanted.items())


def test_weights_that_were_held_and_are_released_give_the_same_loss(model_folder):
    model, one = four_bit(model_folder).eval(), batch(True)
    made = engine(model, resident=2)
    held = weakref.ref(next(iter(made.resident.values())))
    loss = float(made.loss_sum(one).detach())
    made.release()
    assert held() is None and not made.arena.workspace.buffers
    assert float(made.loss_sum(one).detach()) == loss


def test_a_second_backward_is_refused_rather_than_wrong():
    loss = FastEngine(adapted("qwen2")).loss_sum(batch(True))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward twice"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias is trained too"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head has an adapter"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(options, reason):
    assert reason in unsupported_reason(adapted("qwen2", **options), CPU)


def test_fit_runs_on_it_and_says_why_when_it_cannot(arguments, tmp_path, capsys, caplog):
    caplog.set_level("INFO")
    assert main([*arguments, "--model.engine", "fast", "--trainer.max_steps", "2"]) == 0
    assert "engine     fast" in caplog.text
    dora = ["--model.engine", "fast", "--model.lora_config.use_dora", "true"]
    assert main([*arguments, *dora, "--output_dir", str(tmp_path / "other")]) == 2
    assert "model.engine is fast, but lora_config.use_dora is set" in capsys.readouterr().err


def test_validation_of_a_long_row_goes_in_pieces_and_training_goes_on_after_it(monkeypatch):
    from qwen_lit.engine import engine as engine_module

    rows = []
    plain = engine_module.mlp
    monkeypatch.setattr("qwen_lit.engine.mlp.mlp", lambda x, *a, **k: rows.append(len(x)) or plain(x, *a, **k))
    monkeypatch.setattr(engine_module, "PIECE", 10)
    model, one = adapted("qwen2", target_modules=ALL), batch(True)
    model.bfloat16()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    made = FastEngine(model)
    with torch.inference_mode():
        whole = made.loss_sum(one)
    assert max(rows) == 10 and sum(rows) == 2 * 41 + len(one["targets"])
    monkeypatch.setattr(engine_module, "PIECE", 1000)
    with torch.no_grad():
        assert torch.allclose(made.loss_sum(one), whole, rtol=1e-3)
    assert gradients(model, made.loss_sum(one))
