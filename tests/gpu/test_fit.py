"""A whole run on the device: what it plans, it measures, and then it trains."""

import re
from dataclasses import replace

import pytest

from qwen_lit.cli import main
from qwen_lit.engine.engine import FastEngine
from qwen_lit.planner import planner as planning
from qwen_lit.planner.search import choose

pytestmark = pytest.mark.gpu


@pytest.fixture
def on_the_gpu(arguments):
    at = arguments.index("--trainer.accelerator")
    return [*arguments[:at], *arguments[at + 2 :], "--trainer.accelerator", "gpu", "--trainer.devices", "1"]


def test_fit_measures_its_plan_and_trains(on_the_gpu, caplog):
    caplog.set_level("INFO")
    assert main([*on_the_gpu, "--trainer.max_steps", "3"]) == 0
    # Lines of the start are wrapped anywhere.
    told = " ".join(" ".join(record.message for record in caplog.records).split())
    assert re.search(r"engine fast, \d+ micro-batch(es)? at once, .* GiB, measured \d+\.\d\d data ", told), told


def test_products_in_8_bits_are_guarded_and_planned(on_the_gpu, caplog, capsys):
    caplog.set_level("INFO")
    eight = ["--model.products", "fp8_backward", "--model.products_check_every", "1"]
    assert main([*on_the_gpu, *eight, "--trainer.max_steps", "2"]) == 0
    assert len(re.findall(r"the gradient of step \d has cosine 0\.99", caplog.text)) == 2
    assert main(["plan", *on_the_gpu[1:], *eight]) == 0
    assert "products    fp8_backward: the gradient of a micro-batch has cosine" in capsys.readouterr().out


def test_an_embedding_that_is_planned_for_the_cpu_is_there_while_the_run_trains(on_the_gpu, monkeypatch):
    plain, seen = FastEngine.loss_sum, []

    def loss_sum(self, batch):
        seen.append((self.model.get_input_embeddings().weight.device.type, batch["input_ids"].device.type))
        return plain(self, batch)

    def on_the_cpu(*given):
        chosen = choose(*given)
        return replace(chosen, policies=replace(chosen.policies, offload_embedding=True))

    monkeypatch.setattr(planning, "choose", on_the_cpu)
    monkeypatch.setattr(FastEngine, "loss_sum", loss_sum)
    assert main([*on_the_gpu, "--trainer.max_steps", "3"]) == 0
    # The machine is measured before it is planned for.
    planned = seen[seen.index(("cpu", "cuda")) :]
    assert set(planned) == {("cpu", "cuda")} and len(planned) > 3
