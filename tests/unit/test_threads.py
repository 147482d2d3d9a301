"""Pools whose threads are there before the work is."""

from __future__ import annotations

import threading
from unittest import mock

from server.threads import started_pool


def test_no_thread_is_started_once_there_is_work() -> None:
    """To start one may take for ever."""
    with started_pool(3, "mine") as pool, mock.patch.object(threading.Thread, "start", side_effect=AssertionError):
        assert sum(thread.name.startswith("mine") for thread in threading.enumerate()) == 3
        together = threading.Barrier(3)
        assert sorted(each.result(10) for each in [pool.submit(together.wait) for _ in range(3)]) == [0, 1, 2]
