"""Whose work on the machine counts as a neighbour's."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import pytest

from server.machine import MachineReader


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
