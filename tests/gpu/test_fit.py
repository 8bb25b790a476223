"""A whole run on the device: what it plans, it measures, and then it trains."""

import pytest

from qwen_lit.cli import main

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_the_gpu(arguments):
    at = arguments.index("--trainer.accelerator")
    return [*arguments[:at], *arguments[at + 2 :], "--trainer.accelerator", "gpu", "--trainer.devices", "1"]


def test_fit_measures_its_plan_and_trains(on_the_gpu, caplog):
    caplog.set_level("INFO")
    assert main([*on_the_gpu, "--trainer.max_steps", "3"]) == 0
    assert "engine     fast, micro-batches merged by" in caplog.text and "GiB, measured 0." in caplog.text
