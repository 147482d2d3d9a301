"""Time that passes only when nothing else is left to do: seconds of serving in a millisecond, and the same every time.

The event loop never sleeps, it moves the clock to its next timer. What is given to an executor runs at once, and its
result arrives as late as the clock says that it took (``Clock.spend``); one executor is one thread.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar, TypeVarTuple
from unittest import mock

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
START_S, LIMIT_S = 1000.0, 10_000.0


class Clock:
    """Takes the place of ``time.monotonic``."""

    def __init__(self) -> None:
        self.now = START_S

    def __call__(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


class _Selector(selectors.SelectSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and nothing would ever happen"
        self._clock.now += max(0.0, timeout)
        assert self._clock.now < START_S + LIMIT_S, "somebody waits for what does not come"
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._virtual = clock
        self._free_at: dict[Executor | None, float] = {}

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        called, future = self._virtual.now, self.create_future()
        self._virtual.now = max(called, self._free_at.get(executor, called))
        try:
            settle = partial(future.set_result, func(*args))
        except Exception as error:
            settle = partial(future.set_exception, error)
        self._free_at[executor] = self._virtual.now
        self.call_at(self._virtual.now, lambda: future.done() or settle())
        self._virtual.now = called
        return future


def run(scenario: Callable[[Clock], Coroutine[Any, Any, T]]) -> T:
    """Like ``asyncio.run``, in virtual time."""
    clock = Clock()
    with mock.patch("time.monotonic", clock), asyncio.Runner(loop_factory=lambda: _Loop(clock)) as runner:
        return runner.run(scenario(clock))
