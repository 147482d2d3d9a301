"""Pools whose threads are there before the work is."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from server.settings import SettingsError
from server.threads import started_pool


def test_no_thread_is_started_once_there_is_work() -> None:
    """To start one may take for ever."""
    with started_pool(3, "mine") as pool, mock.patch.object(threading.Thread, "start", side_effect=AssertionError):
        assert sum(thread.name.startswith("mine") for thread in threading.enumerate()) == 3
        together = threading.Barrier(3)
        assert sorted(each.result(10) for each in [pool.submit(together.wait) for _ in range(3)]) == [0, 1, 2]


def test_where_not_all_threads_can_run_those_that_do_are_not_waited_for() -> None:
    """They waited for the others for ever, and the process for them."""
    start, allowed = threading.Thread.start, iter(range(2))

    def start_two(thread: threading.Thread) -> None:
        if next(allowed, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    with (
        mock.patch.object(threading.Thread, "start", start_two),
        pytest.raises(SettingsError, match=r"not all of 3 threads .*can't start new thread.*: raise the limit"),
    ):
        started_pool(3, "too many")
    for thread in threading.enumerate():
        if thread.name.startswith("too many"):
            thread.join(10)
            assert not thread.is_alive()
