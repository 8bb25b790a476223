"""The benchmark's table sets ours beside each peer of the same case, and its rows are what it says they are."""

import importlib.util

import numpy as np
import pytest


@pytest.fixture(scope="module")
def train():
    spec = importlib.util.spec_from_file_location("train", "benchmarks/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_peer_is_compared_with_ours_of_its_own_case_and_a_failure_is_told(train):
    ours = {"runner": "qwen_lit", "peak_gib": 7.3, "estimate_gib": 7.4, "first_step_s": 3.0}
    theirs = {"runner": "unsloth", "peak_gib": 6.0, "first_step_s": 37.3, "tokens_per_second": 8000}
    lines = train.table(
        [
            {"case": "8 GiB", "tokens_per_second": 14_000, **ours},
            {"case": "8 GiB", **theirs},
            {"case": "24 GiB", "runner": "qwen_lit", "error": "one\ntwo: out of memory\n"},
            {"case": "24 GiB", **theirs},
        ]
    )
    assert lines[2] == "| 8 GiB | qwen_lit | 14,000 | 7.30 | 7.4 | 3.0 |  |"
    assert lines[3] == "| 8 GiB | unsloth | 8,000 | 6.00 |  | 37.3 | 1.75 x |"
    assert lines[4].startswith("| 24 GiB | qwen_lit | failed: two: out of memory |")
    assert lines[5].endswith("| 37.3 |  |")
    assert len({line.count("|") for line in lines}) == 1


def test_the_length_mix_has_a_median_of_300_tokens_of_which_60_percent_are_supervised(train):
    lengths, supervised = zip(
        *((len(ids), int(spans[0, 1] - spans[0, 0])) for ids, spans in train.documents({"mix": True}, 4000, 2048)),
        strict=True,
    )
    assert 290 < np.median(lengths) < 310 and max(lengths) == 2048 and min(lengths) >= 30
    assert abs(sum(supervised) / sum(lengths) - 0.6) < 0.01
    assert {len(ids) for ids, _ in train.documents({}, 5, 2048)} == {2048}
