"""Duties that fail without an end to the server: what the log says of them, and what is no failure of a duty."""

from __future__ import annotations

import asyncio
import logging

import pytest

from server.tolerated import Tolerated


def test_one_line_when_it_begins_and_one_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    duty = Tolerated("stars", "counted")
    with caplog.at_level(logging.INFO):
        for error in (None, OSError("clouds"), MemoryError(), None, None, MemoryError()):
            with duty:
                if error is not None:
                    raise error
    assert caplog.messages == [
        "stars cannot be counted: clouds",
        "stars can be counted again",
        "stars cannot be counted: MemoryError",
    ]
    assert [record.exc_info is None for record in caplog.records] == [True, True, False]


def test_a_task_that_is_cancelled_ends() -> None:
    for end in (asyncio.CancelledError, SystemExit):
        with pytest.raises(end), Tolerated("stars", "counted"):
            raise end
