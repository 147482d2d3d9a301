"""The GPU's gauge: there when NVML tells it, and otherwise simply not there."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from server.gpu import GpuCollector


class NVMLError(Exception): ...


class FakeNvml(ModuleType):
    """The GPU whose identity torch names is 37 % busy, unless ``fails`` is set."""

    NVMLError = NVMLError
    fails = False

    def nvmlInit(self) -> None:  # noqa: N802
        self._check()

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-1234":
            raise NVMLError("not found")
        return uuid

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:  # noqa: N802
        self._check()
        assert handle == "GPU-1234"
        return SimpleNamespace(gpu=37, memory=90)

    def _check(self) -> None:
        if self.fails:
            raise NVMLError("driver/library version mismatch")


def torch_with(*, initialized: bool = True, uuid: str = "1234") -> Any:
    cuda = SimpleNamespace(
        is_initialized=lambda: initialized,
        current_device=lambda: 0,
        get_device_properties=lambda device: SimpleNamespace(uuid=uuid),
    )
    return SimpleNamespace(cuda=cuda)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    fake = FakeNvml("pynvml")
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setitem(sys.modules, "torch", torch_with())
    return fake


def gauges(collector: GpuCollector) -> list[float]:
    return [sample.value for metric in collector.collect() for sample in metric.samples]


def test_the_gpu_that_serves_is_told(nvml: FakeNvml) -> None:
    registry = CollectorRegistry()
    registry.register(GpuCollector())
    assert "\nscala_gpu_utilization_ratio 0.37\n" in generate_latest(registry).decode()


def test_it_is_gone_while_nvml_fails(nvml: FakeNvml) -> None:
    collector = GpuCollector()
    nvml.fails = True
    assert gauges(collector) == []
    nvml.fails = False
    assert gauges(collector) == [0.37]
    nvml.fails = True
    assert gauges(collector) == []


@pytest.mark.parametrize("torch", [None, torch_with(initialized=False), torch_with(uuid="other")])
def test_there_is_none_where_no_gpu_serves(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, torch: Any) -> None:
    if torch is None:
        monkeypatch.delitem(sys.modules, "torch")
    else:
        monkeypatch.setitem(sys.modules, "torch", torch)
    assert gauges(GpuCollector()) == []


def test_it_is_gone_when_the_device_is_lost(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = torch_with()

    def lost(device: int) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lost)
    monkeypatch.setitem(sys.modules, "torch", torch)
    assert gauges(GpuCollector()) == []


def test_there_is_none_without_the_package(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gauges(GpuCollector()) == []


def test_without_a_driver_the_real_package_means_no_gauge(monkeypatch: pytest.MonkeyPatch) -> None:
    pynvml = pytest.importorskip("pynvml", reason="comes with the torch extra")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        monkeypatch.setitem(sys.modules, "torch", torch_with())
        assert gauges(GpuCollector()) == []
    else:
        pytest.skip("there is a driver")
