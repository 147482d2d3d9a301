"""Whose work on the machine counts as a neighbour's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from server.machine import MachineReader, memory_limit_bytes


@pytest.mark.parametrize(("niceness", "others_cores"), [(0, 1.0), (5, 3.0)])
def test_work_of_low_priority_gives_way_unless_the_server_is_as_low(niceness: int, others_cores: float) -> None:
    """Of four cores one is busy at normal priority, two at low; none of it is ours."""
    times = SimpleNamespace(user=25.0, nice=50.0, idle=20.0, iowait=5.0)
    with (
        mock.patch("server.machine.psutil.cpu_times_percent", return_value=times),
        mock.patch("server.machine.psutil.cpu_count", return_value=4),
        mock.patch("server.machine.os.nice", return_value=niceness),
    ):
        reader = MachineReader()
        used = reader._process.cpu_times()
        with mock.patch.object(reader._process, "cpu_times", return_value=used):
            reader._before = reader._read()
            sample = reader.sample()
    assert sample.cpu_load == pytest.approx(0.75)
    assert sample.others_cores == pytest.approx(others_cores)


@pytest.mark.parametrize(("limit", "usable"), [("1000\n", 1000), ("max\n", 5000), ("9223372036854771712\n", 5000)])
def test_memory_is_the_containers_limit_or_the_machines_own(tmp_path: Path, limit: str, usable: int) -> None:
    for name, text in (("proc/self/cgroup", "0::/\n"), ("sys/fs/cgroup/memory.max", limit)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    with mock.patch("server.machine._total_memory_bytes", return_value=5000):
        assert memory_limit_bytes(tmp_path) == usable
