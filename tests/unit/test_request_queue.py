"""The queue: earliest deadline first, and nothing in it that nobody waits for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from scala_model.width import Width
from server.errors import Expired
from server.request_queue import RequestQueue
from server.types import Answer, Job, Terms, Waiting

WIDTHS = (Width(0.5), Width(1.0))
PIXELS = np.zeros((1, 1, 3), np.uint8)
ANSWER = Answer(np.zeros(1, np.float32), WIDTHS[0], 1, 0.0, 0.0, 0.0)


def job(order_by: float, deadline: float = 99.0) -> Job:
    return Job(Terms(0.0, order_by, deadline, WIDTHS), PIXELS, 0.0)


def filled(*order_by: float) -> tuple[RequestQueue, list[Job]]:
    queue, jobs = RequestQueue(), [job(instant) for instant in order_by]
    for each in jobs:
        queue.put(each)
    return queue, jobs


async def tick() -> None:
    """Whatever is due now has happened afterwards."""
    for _ in range(3):
        await asyncio.sleep(0)


def test_the_earliest_comes_first_and_equals_in_order_of_arrival() -> None:
    async def scenario() -> None:
        queue, (late, early, twin, middle) = filled(3.0, 1.0, 1.0, 2.0)
        assert len(queue) == 4
        assert queue.take(range(4)) == [early, twin, middle, late]

    asyncio.run(scenario())


def test_a_view_shows_what_policies_may_know_at_the_positions_of_take() -> None:
    async def scenario() -> None:
        queue, jobs = filled(3.0, 1.0, 2.0)
        assert queue.view() == [Waiting(order_by, 99.0, WIDTHS) for order_by in (1.0, 2.0, 3.0)]
        assert queue.take([2, 0]) == [jobs[0], jobs[1]], "in the order asked for"
        assert queue.view() == [jobs[2].waiting]
        assert queue.take([]) == []

    asyncio.run(scenario())


def test_viewing_changes_nothing() -> None:
    async def scenario() -> None:
        queue, _ = filled(1.0, 2.0)
        assert queue.view() == queue.view()
        assert len(queue) == 2

    asyncio.run(scenario())


def test_who_is_ahead() -> None:
    async def scenario() -> None:
        queue, _ = filled(1.0, 2.0, 2.0, 3.0)
        assert [queue.ahead_of(order_by) for order_by in (0.5, 1.0, 1.5, 2.0, 9.0)] == [0, 1, 1, 3, 4]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "settle",
    [
        lambda job: job.answer.cancel(),
        lambda job: job.answer.set_result(ANSWER),
        lambda job: job.answer.set_exception(Expired("late")),
    ],
    ids=["abandoned", "answered", "refused"],
)
def test_a_job_leaves_when_it_is_settled(settle: Callable[[Job], object]) -> None:
    async def scenario() -> None:
        queue, (first, second, third) = filled(1.0, 2.0, 2.0)
        settle(second)
        await tick()
        assert queue.take(range(len(queue))) == [first, third]
        if not second.answer.cancelled():
            second.answer.exception()  # seen

    asyncio.run(scenario())


def test_a_job_that_was_taken_may_be_settled_without_disturbing_others() -> None:
    async def scenario() -> None:
        queue, jobs = filled(1.0, 2.0)
        (taken,) = queue.take([0])
        taken.answer.set_result(ANSWER)
        await tick()
        assert queue.take([0]) == [jobs[1]]

    asyncio.run(scenario())


def test_all_can_be_dropped() -> None:
    async def scenario() -> None:
        queue, (late, early) = filled(2.0, 1.0)
        assert queue.drop_all() == [early, late]
        assert len(queue) == 0
        assert queue.drop_all() == []

    asyncio.run(scenario())


# -- waiting


def finishes(waiting: Callable[[RequestQueue], Coroutine[Any, Any, None]]) -> bool:
    """Whether ``queue.wait()`` has come back once ``waiting`` is done with the queue."""

    async def scenario() -> bool:
        queue = RequestQueue()
        task = asyncio.create_task(queue.wait())
        await tick()
        assert not task.done()
        await waiting(queue)
        await tick()
        task.cancel()
        return task.done() and not task.cancelled() and not task.cancelling()

    return asyncio.run(scenario())


def test_waiting_ends_at_once_where_somebody_waits() -> None:
    async def scenario() -> None:
        queue, _ = filled(1.0)
        await asyncio.wait_for(queue.wait(), 60)

    asyncio.run(scenario())


def test_waiting_ends_when_somebody_comes() -> None:
    async def arrive(queue: RequestQueue) -> None:
        queue.put(job(1.0))

    assert finishes(arrive)


def test_waiting_goes_on_when_all_have_left_again() -> None:
    async def scenario() -> None:
        queue, (left,) = filled(1.0)
        left.answer.cancel()
        await tick()
        task = asyncio.create_task(queue.wait())
        await tick()
        assert not task.done()
        queue.put(job(2.0))
        await asyncio.wait_for(task, 60)

    asyncio.run(scenario())


def test_who_is_late_already_makes_nobody_else_late() -> None:
    """Images without a budget may be late: past their place in the queue, they go behind earlier deadlines."""

    async def scenario() -> None:
        queue = RequestQueue()
        patient, urgent, later = job(1.0, deadline=10.0), job(2.0, deadline=2.0), job(11.0, deadline=11.0)
        for each in (patient, urgent, later):
            queue.put(each)
        queue.postpone_overdue(0.9)
        assert queue.take([0]) == [patient]
        queue.put(patient)
        queue.postpone_overdue(1.0)
        assert (queue.ahead_of(2.0), len(queue)) == (1, 3)
        assert queue.take(range(3)) == [urgent, patient, later]

    asyncio.run(scenario())
