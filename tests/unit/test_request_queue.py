"""The queue: earliest deadline first, and nothing in it that nobody waits for."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from scala_model.width import Width
from server.errors import Expired
from server.request_queue import RequestQueue
from server.types import Answer, Job, QueueView, Terms

WIDTHS = (Width(0.5), Width(1.0))
PIXELS = np.zeros((1, 1, 3), np.uint8)
ANSWER = Answer(np.zeros(1, np.float32), WIDTHS[0], 1, 0.0, 0.0, 0.0, 0.0)


def job(order_by: float, deadline: float = 99.0, widths: tuple[Width, ...] = WIDTHS) -> Job:
    return Job(Terms(0.0, order_by, deadline, widths), PIXELS, 0.0)


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


def test_equals_are_ordered_by_priority() -> None:
    """1 before 2, both before who named none; those of the same priority in order of arrival."""

    async def scenario() -> None:
        queue = RequestQueue()
        given = (0, 2, 1, 0, 2, 9, 1)
        jobs = [Job(Terms(0.0, 5.0, 5.0, WIDTHS, priority), PIXELS, 0.0) for priority in given]
        for each in jobs:
            queue.put(each)
        queue.put(urgent := job(4.0))
        expected = [urgent, *(jobs[i] for i in (2, 6, 1, 4, 5, 0, 3))]
        assert queue.take(range(8)) == expected

    asyncio.run(scenario())


def test_a_view_shows_what_policies_may_know_at_the_positions_of_take() -> None:
    async def scenario() -> None:
        queue, jobs = filled(3.0, 1.0, 2.0)
        queue.put(pinned := job(1.5, widths=WIDTHS[:1]))
        assert queue.view() == QueueView(
            [1.0, 1.5, 2.0, 3.0], [WIDTHS, WIDTHS[:1], WIDTHS, WIDTHS], {WIDTHS: 3, WIDTHS[:1]: 1}
        )
        assert queue.take([2, 0]) == [jobs[2], jobs[1]], "in the order asked for"
        assert queue.view() == QueueView([1.5, 3.0], [WIDTHS[:1], WIDTHS], {WIDTHS: 1, WIDTHS[:1]: 1})
        assert queue.take([0]) == [pinned]
        assert queue.view() == QueueView([3.0], [WIDTHS], {WIDTHS: 1}), "a kind that is gone is no kind any more"
        assert queue.take([]) == []

    asyncio.run(scenario())


def test_viewing_changes_nothing() -> None:
    async def scenario() -> None:
        queue, _ = filled(1.0, 2.0)
        assert queue.view() == queue.view()
        assert len(queue) == 2

    asyncio.run(scenario())


def test_whatever_happens_a_view_agrees_with_itself() -> None:
    """Many jobs come, settle, are taken and postponed; each is in the queue once or gone, in the order of deadlines."""

    async def scenario() -> None:
        chance, queue, inside = random.Random(0), RequestQueue(), list[Job]()
        for now in range(300):
            order_by = now + chance.choice((1.0, 5.0, 9.0))
            inside.append(job(order_by, order_by + chance.choice((0.0, 20.0)), chance.choice((WIDTHS, WIDTHS[1:]))))
            queue.put(inside[-1])
            if now % 3 == 0:
                chance.choice(inside).answer.cancel()
                await tick()
            if now % 4 == 0:
                queue.take(chance.sample(range(len(queue)), min(2, len(queue))))
            queue.postpone_overdue(lambda widths: now + 0.5)  # noqa: B023
            view = queue.view()
            assert len(view.due) == len(view.widths) == len(queue)
            assert list(view.due) == sorted(view.due)
            assert view.kinds == Counter(view.widths)
        assert len(queue) > 20

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


# -- requests without a budget


def test_who_is_late_already_makes_nobody_else_late() -> None:
    """Images without a budget may be late: past their place in the queue, they go behind earlier deadlines."""

    async def scenario() -> None:
        queue = RequestQueue()
        patient, urgent, later = job(1.0, deadline=10.0), job(2.0, deadline=2.0), job(11.0, deadline=11.0)
        for each in (patient, urgent, later):
            queue.put(each)
        queue.postpone_overdue(lambda widths: 0.9)
        assert queue.view().due == [1.0, 2.0, 11.0]
        queue.postpone_overdue(lambda widths: 1.1)
        assert queue.view().due == [2.0, 10.0, 11.0]
        assert queue.take(range(3)) == [urgent, patient, later]

    asyncio.run(scenario())


def test_who_was_let_in_for_his_deadline_only_is_ordered_by_it() -> None:
    async def scenario() -> None:
        queue = RequestQueue()
        urgent, patient = job(2.0, deadline=2.0), job(1.0, deadline=10.0)
        queue.put(patient, 10.0)
        queue.put(urgent)
        assert queue.view().due == [2.0, 10.0]
        assert queue.take(range(2)) == [urgent, patient]

    asyncio.run(scenario())


def test_an_image_is_postponed_when_its_own_widths_cannot_be_in_time() -> None:
    async def scenario() -> None:
        queue = RequestQueue()
        quick, slow = job(1.0, deadline=10.0), job(1.0, deadline=10.0, widths=WIDTHS[1:])
        for each in (slow, quick):
            queue.put(each)
        queue.postpone_overdue({WIDTHS: 0.9, WIDTHS[1:]: 1.2}.__getitem__)
        assert queue.take(range(2)) == [quick, slow]

    asyncio.run(scenario())


def test_a_budget_is_never_postponed() -> None:
    """Nor is an image that not even its deadline can save: it is for the policy to shed."""

    async def scenario() -> None:
        queue = RequestQueue()
        for each in (job(1.0, deadline=1.0), job(2.0, deadline=3.0)):
            queue.put(each)
        queue.postpone_overdue(lambda widths: 50.0)
        assert queue.view().due == [1.0, 3.0]
        queue.postpone_overdue(lambda widths: 60.0)
        assert queue.view().due == [1.0, 3.0]

    asyncio.run(scenario())


def test_a_postponed_image_leaves_like_any_other() -> None:
    async def scenario() -> None:
        queue = RequestQueue()
        patient, other = job(1.0, deadline=10.0), job(10.0, deadline=10.0)
        for each in (patient, other):
            queue.put(each)
        queue.postpone_overdue(lambda widths: 5.0)
        patient.answer.cancel()
        await tick()
        assert queue.take(range(len(queue))) == [other]

    asyncio.run(scenario())
