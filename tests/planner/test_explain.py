"""The table that explains a plan adds up to its estimate."""

import pytest

from qwen_lit.engine.policy import Policies
from qwen_lit.planner.explain import explain, table_lines
from qwen_lit.planner.plan import GIB, Plan
from tests.planner.test_plan import STATIC, STREAMED

MADE = {
    "everything kept": (16_384, {"resident": 28}),
    "some offloaded": (4096, {"recompute": 20, "offload_activations": 7, "loss_chunk": 512}),
    "inputs on the host": (2048, {"recompute": 28, "offload_inputs": True, "offload_embedding": True}),
    "streamed": (
        4096,
        {"recompute": 20, "streamed": frozenset(range(28)), "offload_embedding": True, "offload_head": True},
    ),
    "the head alone on the host": (4096, {"loss_chunk": 512, "offload_head": True}),
    "in pieces": (32_000, {"recompute": 28, "offload_inputs": True, "mlp_piece": 1024}),
}


@pytest.mark.parametrize("name", MADE)
def test_its_parts_add_up_to_the_estimate(name):
    tokens, options = MADE[name]
    policies = Policies.of_counts(28, **options)
    estimate = STREAMED.peak(STATIC, tokens, policies)
    table = explain(STREAMED, Plan(1, policies, estimate, 80 * GIB), STATIC, tokens)
    assert sum(table["parts_bytes"].values()) == table["estimate_bytes"] == estimate
    for layer in table["layers"]:
        assert layer["saved_bytes_per_token"] == sum(op["saved_bytes_per_token"] for op in layer["ops"])
        assert all(op["saved_bytes_per_token"] == sum(op["saved"].values()) for op in layer["ops"])
    assert sorted(number for layer in table["layers"] for number in layer["numbers"]) == list(range(28))
    told = [(kind["layers"], kind["policy"]) for kind in table["policies"]]
    each = [policy for (first, last), policy in told for _ in range(first, last + 1)]
    assert each == [policy.value for policy in policies.layers]
    lines = table_lines(table)
    assert all(len(line) <= 80 for line in lines) and ["sum", f"{estimate / GIB:.3f}"] in map(str.split, lines)
    assert table["host_bytes"] == STREAMED.on_host(tokens, policies, 1)
    slots = table["parts_bytes"].get("slots of streamed layers", 0)
    assert slots == (2 * STREAMED.blocks[0] if policies.streamed else 0)
    there = [name for name in table["host_bytes"] if any(line.startswith(f"  {name} ") for line in lines)]
    assert there == list(table["host_bytes"]) and bool(there) == (name != "everything kept")
    assert any("mlp_in_pieces" in line for line in lines) == (name == "in pieces")
