"""What is measured of a machine: the host's memory, and what a device that is too full leaves unknown."""

import psutil
import pytest
import torch

from qwen_lit import hardware
from qwen_lit.engine.ends import waits
from qwen_lit.engine.engine import FastEngine
from qwen_lit.hardware import host_memory
from qwen_lit.planner import measure as probe
from qwen_lit.planner.host import HostProfile, rounded
from qwen_lit.planner.link import rate_of
from qwen_lit.planner.measure import Speeds, is_full, measure_host
from tests.engine.test_engine import adapted


@pytest.fixture
def group(monkeypatch, tmp_path):
    """A process in a control group of another, on a machine with 5,000 bytes free; ``limit`` gives one a limit."""
    monkeypatch.setattr(hardware, "CONTROL_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(hardware, "OWN_CONTROL_GROUP", tmp_path / "mine")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 5000})())
    inner = tmp_path / "groups" / "job" / "step"
    inner.mkdir(parents=True)
    (tmp_path / "mine").write_text("1:name=systemd:/x\n0::/job/step\n")

    def limit(folder, most, used):
        (tmp_path / "groups" / folder / "memory.max").write_text(f"{most}\n")
        (tmp_path / "groups" / folder / "memory.current").write_text(f"{used}\n")

    return limit


def test_host_memory_is_what_the_machine_and_every_control_group_leave(group):
    assert host_memory() == 5000
    group("job/step", "max", 100)
    assert host_memory() == 5000
    group("job", 3000, 1000)
    assert host_memory() == 2000
    group("job/step", 1500, 100)
    assert host_memory() == 1400
    group(".", 100, 200)
    assert host_memory() == 0


def test_host_memory_is_the_machines_where_there_is_no_control_group(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "OWN_CONTROL_GROUP", tmp_path / "none")
    assert 0 < host_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("the host does not pin 64 MiB more of its memory (...)"), True),
        (RuntimeError("an illegal memory access was encountered"), False),
    ],
)
def test_what_says_that_memory_is_short_is_told_from_faults(error, full):
    assert is_full(error) is full


def test_a_device_too_full_to_be_measured_is_planned_for_as_any(monkeypatch, group):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    engine = FastEngine(adapted("qwen2"))
    met = []
    monkeypatch.setattr(probe, "_speeds", full)
    assert measure_host(engine, None, None, 2, lambda: met.append("full")) == HostProfile(memory=1250, processes=2)
    monkeypatch.setattr(probe, "_speeds", lambda *given: given[-1]() or Speeds(0.3, 900.7, 79_999.0, 15.9, 5.5))
    found = measure_host(engine, None, None, 1, lambda: met.append("room"))
    assert found == HostProfile(0.25, 2500, 900, 73_728, 15, rate=5)
    # Others wait for a rank that cannot measure too, and for none twice.
    assert met == ["full", "room"]


def test_a_device_too_full_for_the_ends_is_measured_without_them(monkeypatch, group):
    engine = FastEngine(adapted("qwen2"))
    head = engine.model.get_base_model().get_output_embeddings()

    def speeds(*given):
        given[-1]()
        if not waits(head):
            raise torch.OutOfMemoryError("full")
        return Speeds(1.0, 1.0, 16.0, 16.0, 1.0)

    met = []
    monkeypatch.setattr(probe, "_speeds", speeds)
    assert measure_host(engine, None, None, 1, lambda: met.append(1)) == HostProfile(1.0, 2500, 1, 16, 16, rate=1)
    assert met == [1]


def test_a_rate_is_that_of_all_copies_in_a_window_and_of_one_at_least(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, 4.0, 0.0, 8.0])
    monkeypatch.setattr("qwen_lit.planner.link.time.perf_counter", lambda: next(clock))
    assert rate_of(lambda: 100, 3.0) == 300 / 4 and rate_of(lambda: 100, 3.0) == 100 / 8


def test_a_slower_link_brings_less_of_everything():
    host = HostProfile(0.75, 5, 6, 1024, 512, 2, 1000)
    assert host.at(0.5) == HostProfile(0.375, 5, 6, 512, 256, 2, 500)


def test_rates_are_rounded_to_eight_steps_between_two_powers_of_two():
    assert [rounded(rate) for rate in (0.5, 7.9, 16.0, 17.9, 18.0, 1000.0, 1024.0)] == [0, 7, 16, 16, 18, 960, 1024]
    for rate in (70_000, 78_000, 100_000, 3 * 10**9):
        assert 8 / 9 < rounded(rate) / rate <= 1
