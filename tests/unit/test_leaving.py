"""When a server leaves, in virtual time: after its grace, its last callers and its requests, and not for a trifle."""

from __future__ import annotations

import asyncio
import faulthandler
import math
import signal
from unittest import mock

import pytest
import uvicorn

from server.connection import Doorkeeper
from server.lifecycle import LAST_CALL_S, QUIET_S, SHUTDOWN_S, Lifecycle, Server
from tests.unit.virtual_time import Clock, run

GRACE_S, TIMEOUT_S = 5.0, 30.0


def make_server(lifecycle: Lifecycle, keeper: Doorkeeper, grace_s: float = GRACE_S) -> Server:
    config = uvicorn.Config("none", log_config=None)
    return Server(config, lifecycle, keeper, grace_s=grace_s, timeout_s=TIMEOUT_S)


def leaves_after(
    *, started: bool = True, requests_until_s: float = 0.0, in_flight_until_s: float = 0.0, grace_s: float = GRACE_S
) -> float:
    """Seconds from the signal to the end, with a request answered ten times a second and one that takes long."""
    left_after = 0.0

    async def scenario(clock: Clock) -> None:
        nonlocal left_after
        lifecycle = Lifecycle()
        lifecycle.started, lifecycle.in_flight = started, 1
        server = make_server(lifecycle, Doorkeeper(10, 30.0, str), grace_s)
        server.handle_exit(signal.SIGTERM, None)
        assert not lifecycle.ready
        signalled = clock.now
        while not await server.on_tick(1):
            server.server_state.total_requests += clock.now - signalled < requests_until_s
            lifecycle.in_flight = int(clock.now - signalled < in_flight_until_s)
            await asyncio.sleep(0.1)
        assert lifecycle.refusing
        left_after = clock.now - signalled

    run(scenario)
    return left_after


def test_it_leaves_shortly_after_the_grace() -> None:
    assert leaves_after() == pytest.approx(GRACE_S + QUIET_S, abs=0.15)


def test_it_waits_for_those_who_came_in_the_last_moment_of_the_grace() -> None:
    """Its listening socket and their connections are closed only once they have heard their refusals."""
    assert leaves_after(requests_until_s=GRACE_S + 0.2) == pytest.approx(GRACE_S + 2 * QUIET_S, abs=0.15)


def test_it_does_not_wait_for_ever_for_those_who_go_on_asking() -> None:
    assert leaves_after(requests_until_s=math.inf) == pytest.approx(GRACE_S + LAST_CALL_S, abs=0.15)


def test_who_is_being_served_is_waited_for_up_to_the_timeout() -> None:
    assert leaves_after(in_flight_until_s=12.0) == pytest.approx(12.0, abs=0.25)
    assert leaves_after(in_flight_until_s=math.inf) == pytest.approx(TIMEOUT_S - SHUTDOWN_S, abs=0.15)


def test_a_grace_as_long_as_the_timeout_leaves_time_to_close_the_connections() -> None:
    left_after = leaves_after(in_flight_until_s=math.inf, grace_s=TIMEOUT_S)
    assert left_after == pytest.approx(TIMEOUT_S - SHUTDOWN_S, abs=0.15)


@pytest.mark.parametrize("failed", [False, True])
def test_who_is_not_answered_until_then_is_dismissed(failed: bool) -> None:
    async def scenario(clock: Clock) -> None:
        lifecycle = Lifecycle()
        request = asyncio.create_task(asyncio.sleep(math.inf))
        lifecycle.started, lifecycle.in_flight, lifecycle.unanswered = True, 1, {request}
        server = make_server(lifecycle, Doorkeeper(10, 30.0, str))
        if failed:
            lifecycle.fail("it hung")
        else:
            server.handle_exit(signal.SIGTERM, None)
        while not await server.on_tick(1):
            assert not request.done()
            await asyncio.sleep(0.1)
        await asyncio.wait([request])
        assert request.cancelled()

    run(scenario)


def test_a_server_that_is_still_starting_has_no_grace() -> None:
    assert leaves_after(started=False) == pytest.approx(QUIET_S, abs=0.15)


def test_a_watchdog_that_finds_no_thread_and_a_look_that_finds_no_memory_end_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    keeper = mock.Mock(Doorkeeper)
    keeper.look.side_effect = MemoryError

    async def scenario(clock: Clock) -> None:
        server = make_server(Lifecycle(), keeper)
        with mock.patch.object(faulthandler, "dump_traceback_later", side_effect=RuntimeError("no new thread")):
            assert not await server.on_tick(0)
            assert not await server.on_tick(10)

    run(scenario)
    assert keeper.look.call_count == 2, "whatever became of the watchdog"
    assert caplog.messages == [
        "the watchdog cannot be put off: no new thread",
        "connections cannot be looked after: MemoryError",
    ]
