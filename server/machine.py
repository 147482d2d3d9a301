"""What psutil and the cgroup say of this machine, sampled a few times a second."""

from __future__ import annotations

import os
import platform
import re
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from server import cgroup


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's model, as the system names it."""
    try:
        named = re.search(
            r"(?:model name|CPU part)\s*: (.+)", (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        )
    except OSError:
        named = None
    return named[1].strip() if named else platform.processor() or platform.machine()


def memory_limit_bytes(root: Path = Path("/")) -> int:
    """What this process may use: the container's limit, or the machine's memory if that is less."""
    total = _total_memory_bytes()
    return min(cgroup.memory_limit_bytes(root) or total, total)


@cache
def _total_memory_bytes() -> int:
    """Read once, so that it can be told when no file can be opened any more."""
    total: int = psutil.virtual_memory().total
    return total


@dataclass(frozen=True, slots=True)
class MachineSample:
    """``cpu_load`` of all cores, 0 to 1; ``others_cores`` busy with other processes, but for those of
    low priority, which give way (our own planning is one); ``throttled`` share of periods."""

    cpu_load: float
    others_cores: float
    throttled: float
    memory_bytes: int


class MachineReader:
    """Each ``sample`` covers the time since the one before. ``cpus`` are ours to use, of the host's ``host_cpus``."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root, self._process = root, psutil.Process()
        self.cpus = cgroup.available_cpus(root)
        self.host_cpus = psutil.cpu_count() or 1
        self._gives_way = hasattr(os, "nice") and os.nice(0) > 0  # to all that is not of low priority, as we are
        self._busy_share()
        self._before = self._read()

    def sample(self) -> MachineSample:
        load, urgent = self._busy_share()
        before, self._before = self._before, self._read()
        elapsed, own = self._before[0] - before[0], self._before[1] - before[1]
        periods, throttled = self._before[2] - before[2], self._before[3] - before[3]
        own_cores = own / elapsed if elapsed > 0 else 0.0
        return MachineSample(
            cpu_load=load,
            others_cores=max(0.0, urgent * self.host_cpus - own_cores),
            throttled=throttled / periods if periods > 0 else 0.0,
            memory_bytes=self._process.memory_info().rss,
        )

    def _busy_share(self) -> tuple[float, float]:
        """Since the last call: the share of all cores' time that was busy, and that was so with what we must share."""
        times = psutil.cpu_times_percent(None)
        busy = 1 - (times.idle + getattr(times, "iowait", 0.0)) / 100
        return busy, busy if self._gives_way else busy - getattr(times, "nice", 0.0) / 100

    def _read(self) -> tuple[float, float, int, int]:
        times = self._process.cpu_times()
        periods, throttled = cgroup.cpu_throttled(self._root) or (0, 0)
        return time.monotonic(), times.user + times.system, periods, throttled
