"""How busy the GPU is, as NVML, the driver's own library, tells it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from prometheus_client import Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class GpuCollector(Collector):
    """Gives ``scala_gpu_utilization_ratio`` to each scrape, unless no GPU serves here, or NVML is absent or fails.

    A device that is lost ends no scrape either: what it says of the end is worth the most.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def collect(self) -> Iterator[Metric]:
        ratio = self._read()
        if ratio is not None:
            yield GaugeMetricFamily("scala_gpu_utilization_ratio", "Share of time in which the GPU ran anything", ratio)

    def _read(self) -> float | None:
        torch = sys.modules.get("torch")  # a GPU serves through torch; whoever has not loaded it shall not now
        if torch is None or not torch.cuda.is_initialized():
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            if self._handle is None:
                pynvml.nvmlInit()
                # By its identity: CUDA and NVML number devices differently, and CUDA_VISIBLE_DEVICES renumbers them.
                device = torch.cuda.get_device_properties(torch.cuda.current_device())
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{device.uuid}")
            return float(pynvml.nvmlDeviceGetUtilizationRates(self._handle).gpu) / 100
        except (pynvml.NVMLError, RuntimeError):  # the latter from torch
            return None
