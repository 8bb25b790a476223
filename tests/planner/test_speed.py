"""Time by named costs gives the speeds that were measured."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from qwen_lit.engine.policy import Policies
from qwen_lit.engine.products import NAMED
from qwen_lit.planner.host import HostProfile
from qwen_lit.planner.plan import Plan
from qwen_lit.planner.speed import Shares, Traffic, pace_of, relative_time, time_of
from tests.planner.test_plan import SEVEN_WITH_EMBEDDING

TABLE = Path("benchmarks/README.md").read_text(encoding="utf-8")
AS_MEASURED = {
    "q,k,v,o, dropout 0": (8, {"resident": 28}),
    "the same, limited to 40 GiB": (4, {"offload_activations": 7, "resident": 25}),
    "limited to 24 GiB": (2, {"offload_activations": 7, "resident": 14}),
    "limited to 16 GiB": (2, {"recompute": 2, "offload_activations": 7}),
    "limited to 8 GiB": (2, {"recompute": 20, "offload_activations": 7}),
    "least memory, 2,048 tokens": (1, {"recompute": 28, "offload_inputs": True, "offload_embedding": True}),
}
"""Rows of the table, with the plans that were chosen for them."""

LAUNCH = 3300
"""Tokens that the card computes while its host launches a micro-batch: 0.17 s, as of a step of few tokens."""

WITHIN = {"limited to 8 GiB": 0.05, "least memory, 2,048 tokens": 0.1}
"""Where one cost for all shapes fits least."""


def measured(row):
    """Tokens a second."""
    return int(re.search(rf"^\| {re.escape(row)} \| ([\d,]+) \|", TABLE, re.MULTILINE)[1].replace(",", ""))


def planned(row):
    count, options = AS_MEASURED[row]
    plan = Plan(count, Policies.of_counts(28, **options), 0, 0)
    return time_of(plan, 2048, SEVEN_WITH_EMBEDDING, HostProfile(launch=LAUNCH))


@pytest.mark.parametrize("row", AS_MEASURED)
def test_the_times_of_plans_are_in_the_ratio_of_the_measured_speeds(row):
    first = next(iter(AS_MEASURED))
    wanted, found = measured(first) / measured(row), planned(row) / planned(first)
    assert found == pytest.approx(wanted, rel=WITHIN.get(row, 0.015))


@pytest.mark.parametrize("name", ["fp8_backward", "fp8"])
def test_products_in_8_bits_take_the_share_of_time_that_was_measured(name):
    passes, layers = NAMED[name], []
    for layer in SEVEN_WITH_EMBEDDING.layers:
        groups = tuple(tuple(replace(one, passes=passes) for one in group) for group in layer.groups)
        layers.append(replace(layer, groups=groups))
    found = pace_of(replace(SEVEN_WITH_EMBEDDING, layers=tuple(layers)))
    times = re.search(rf"^\| {name} \| [\d,]+ \((1\.\d+) x\)", TABLE, re.MULTILINE)[1]
    assert found == pytest.approx(1 / float(times), rel=0.03) and pace_of(SEVEN_WITH_EMBEDDING) == 1


def test_a_host_that_launches_slowly_sets_the_time_of_a_small_micro_batch():
    assert relative_time(Shares(), 1000, launch=3000) == 3.0
    assert relative_time(Shares(recomputed=1.0), 1000, launch=3000) == 4.5
    assert relative_time(Shares(), 100_000, launch=3000) == relative_time(Shares(), 100_000)


def test_what_saves_memory_takes_time_and_what_takes_memory_saves_it():
    plain = relative_time(Shares(), 4096)
    assert relative_time(Shares(recomputed=0.5), 4096) > relative_time(Shares(offloaded=0.5), 4096) > plain
    assert relative_time(Shares(resident=1.0), 4096) < plain and relative_time(Shares(), 8192) < plain
    assert plain < relative_time(Shares(streamed=1.0), 4096) < relative_time(Shares(recomputed=0.1), 4096)
    assert relative_time(Shares(), 4096, passes=2) > plain


def test_a_pass_takes_what_the_device_computes_or_what_the_link_brings():
    plain = relative_time(Shares(), 4096)
    assert relative_time(Shares(), 4096, traffic=Traffic(2000, 2000)) == plain
    slow = relative_time(Shares(), 4096, traffic=Traffic(5000, 5000))
    assert slow == 10_000 / 4096
    # Forward waits for the link; backward, which computes layers again, does not.
    again = relative_time(Shares(recomputed=1.0), 4096)
    some = relative_time(Shares(recomputed=1.0), 4096, traffic=Traffic(3000, 3000))
    assert again < some == pytest.approx(again + (3000 - (4096 + 480) / 2) / 4096)
    assert relative_time(Shares(), 4096, traffic=Traffic(alone=4096)) == plain + 1
