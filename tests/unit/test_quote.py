"""Quotes: what a budget would get now, and how their truth is judged."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.quote import Quoted, QuotingServer, joined, score, simulated
from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import Share
from server.policies.slackfit import slackfit
from server.policies.threshold import Threshold
from server.quote import QuoteBook, width_foreseen
from server.simulation.machines import built_in
from server.simulation.scenarios import Scenario
from server.simulation.simulator import simulate
from server.types import Decision, Load, QueueView
from tests.unit.decision_lines import NARROW, WIDE, make_profile
from tests.unit.simulated import Exact, traffic
from tests.unit.simulated import make_profile as profile_in_ticks

BOTH = (NARROW, WIDE)


# -- the width that is foreseen: 10 and 12 ms for 1 and 2 images at the narrow width, 40 and 48 at the wide one


def queue(*due: float, widths: tuple[Width, ...] = BOTH) -> QueueView:
    return QueueView(due, [widths] * len(due), {widths: len(due)} if due else {})


def foreseen(due: float, waiting: QueueView, *, starts_at: float = 0.0) -> Width:
    return width_foreseen(due, BOTH, waiting, Load(), make_profile(), slackfit, starts_at=starts_at)


@pytest.mark.parametrize(("due", "width"), [(0.05, WIDE), (0.04, WIDE), (0.039, NARROW), (0.001, NARROW)])
def test_alone_an_image_has_all_the_time_to_itself(due: float, width: Width) -> None:
    assert foreseen(due, queue()) == width


def test_a_busy_device_takes_of_the_time() -> None:
    assert foreseen(0.1, queue(), starts_at=0.06) == WIDE
    assert foreseen(0.1, queue(), starts_at=0.061) == NARROW


def test_who_is_more_urgent_goes_first() -> None:
    """Two at the wide width until 48 ms, then there are 40 ms, or less, for the image in question."""
    assert foreseen(0.0881, queue(0.05, 0.05)) == WIDE
    assert foreseen(0.0879, queue(0.05, 0.05)) == NARROW
    assert foreseen(0.04, queue(0.05, 0.05)) == WIDE, "it goes first itself"


def test_others_pins_and_shed_images_are_seen() -> None:
    pinned = QueueView([0.001, 0.045], [BOTH, (WIDE,)], {BOTH: 1, (WIDE,): 1})  # one is late: shed; 40 ms for the other
    assert foreseen(0.0801, pinned) == WIDE
    assert foreseen(0.0799, pinned) == NARROW


def test_the_policy_does_not_notice() -> None:
    policy = Threshold()
    busy = Load(busy=0.9)
    width = width_foreseen(9.0, BOTH, queue(), busy, make_profile(), policy, starts_at=1.0)
    assert width == NARROW, "a step down from the widest"
    assert policy(queue(9.0), Load(busy=0.6), make_profile(), 1.1).width == WIDE


@pytest.mark.parametrize(("widths", "width"), [(BOTH, WIDE), ((NARROW,), NARROW)])
def test_a_queue_without_end_is_not_followed_to_its_end(widths: tuple[Width, ...], width: Width) -> None:
    asked: list[int] = []

    def one_by_one(queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        asked.append(len(queue.due))
        return Decision(WIDE, [0], (), 0.04, "")

    waiting = queue(*(1.0 for _ in range(1000)))
    assert width_foreseen(2.0, widths, waiting, Load(), make_profile(), one_by_one, starts_at=0.0) == width
    assert asked == [1001, 1000, 999, 998]


def test_who_ran_or_was_shed_is_gone_from_the_next_decision() -> None:
    """The image in question, due at 3.5, allows the narrow width alone; its decision is the third."""
    narrow, wide = (NARROW,), (WIDE,)
    decisions = iter(
        [
            Decision(WIDE, [1], [0], 0.04, ""),  # 40 ms
            Decision(WIDE, [3, 0], (), 0.048, ""),  # 48 ms
            Decision(NARROW, [0], (), 0.01, ""),
        ]
    )
    seen = []

    def recorded(queue: QueueView, load: Load, profile: LatencyProfile, now: float) -> Decision:
        seen.append(([*queue.due], [*queue.widths], dict(queue.kinds), round(now, 6)))
        return next(decisions)

    waiting = QueueView([1, 2, 3, 4, 5], [BOTH, wide, BOTH, BOTH, wide], {BOTH: 3, wide: 2})
    load = Load(interference=2.0, hop_s=0.001)
    assert width_foreseen(3.5, narrow, waiting, load, make_profile(), recorded, starts_at=0.5) == NARROW
    assert seen == [
        ([1, 2, 3, 3.5, 4, 5], [BOTH, wide, BOTH, narrow, BOTH, wide], {BOTH: 3, wide: 2, narrow: 1}, 0.5),
        ([3, 3.5, 4, 5], [BOTH, narrow, BOTH, wide], {BOTH: 2, narrow: 1, wide: 1}, 0.581),
        ([3.5, 4], [narrow, BOTH], {narrow: 1, BOTH: 1}, 0.678),
    ]
    assert waiting == QueueView([1, 2, 3, 4, 5], [BOTH, wide, BOTH, BOTH, wide], {BOTH: 3, wide: 2})


# -- the chance


def test_without_quotes_the_chance_is_the_share_of_promises_kept() -> None:
    book, promises = QuoteBook(), Share()
    assert book.chance(True, promises, 0.0) == pytest.approx(0.99), "what is usual, before anything was seen"
    assert book.chance(False, promises, 0.0) == 0
    for kept in (True, False):
        for _ in range(45):
            promises.add(kept, 100.0)
    assert book.chance(True, promises, 100.0) == pytest.approx((45 + 9.9) / 100)
    assert book.chance(False, promises, 100.0) == 0
    faded = 90 * math.exp(-2)  # 10 s later, of a time constant of 5
    assert book.chance(True, promises, 110.0) == pytest.approx((faded / 2 + 9.9) / (faded + 10))
    assert book.chance(True, promises, 1000.0) == pytest.approx(0.99)


def test_quotes_are_held_against_the_next_request_of_their_budget() -> None:
    book, promises = QuoteBook(), Share()
    for _ in range(30):
        book.given(0.1, True, 5.0)
        book.given(0.05, False, 5.0)
        book.ended(0.07, 5.1, True, 5.2)  # of another budget
        book.ended(0.1, 4.9, True, 5.2)  # came before it
        book.ended(0.1, 5.1, False, 5.2)
        book.ended(0.1, 5.1, True, 5.2)  # whose quote it might have been is taken
        book.ended(0.05, 5.1, True, 5.2)
    assert book.chance(True, promises, 5.2) == pytest.approx(9.9 / 40)
    assert book.chance(False, promises, 5.2) == pytest.approx(30 / 40)
    book.given(0.1, True, 10.0)
    before = book.chance(True, promises, 20.0)
    book.ended(0.1, 11.1, True, 20.0)  # more than a second after it
    assert book.chance(True, promises, 20.0) == before


def test_quotes_that_nobody_follows_are_forgotten() -> None:
    book = QuoteBook()
    book.given(0.1, False, 5.0)
    for _ in range(100):
        book.given(0.2, False, 5.0)
    book.ended(0.1, 5.1, True, 5.2)
    assert book.chance(False, Share(), 5.2) == 0


# -- how quotes are judged


def columns(chance: list[float], success: list[bool], expected: list[float], got: list[float]) -> Quoted:
    return Quoted(np.array(chance), np.array(success), np.array(expected), np.array(got))


def test_the_scores_by_hand() -> None:
    nothing = math.nan
    judged = score(
        columns([0.9, 0.95, 0.0, 0.0], [True, False, False, True], [0.7, 0.6, nothing, 0.7], [0.5, 0.7, 0.5, nothing])
    )
    assert (judged.quotes, judged.base_rate) == (4, 0.5)
    assert judged.brier_skill == pytest.approx(1 - (0.01 + 0.9025 + 0 + 1) / 4 / 0.25)
    assert judged.calibration_error == pytest.approx(2 / 4 * abs(0.925 - 0.5) + 2 / 4 * abs(0.0 - 0.5))
    assert judged.accuracy_error == pytest.approx((0.2 - 0.1) / 2)
    assert judged.accuracy_off == pytest.approx(0.15)


def test_where_all_end_alike_there_is_nothing_to_foresee() -> None:
    judged = score(columns([1.0, 0.9], [True, True], [math.nan] * 2, [math.nan] * 2))
    assert judged.brier_skill is None
    assert judged.calibration_error == pytest.approx(0.05)
    assert judged.accuracy_error is None


def test_in_the_simulator_each_arrival_is_quoted_and_each_end_is_heard() -> None:
    """Decoding takes no time. In ticks: a batch of one at the wide width takes 40, at the narrow one 10."""
    server = QuotingServer(slackfit, profile_in_ticks())
    outcome = simulate(traffic((0, 100), (1, 5), (2, 100)), server, Exact())
    assert outcome.refused.tolist() == [False, True, False]
    assert server.chance == [pytest.approx(0.99), 0.0, pytest.approx(0.99)]
    assert server.width == [2, -1, 2]
    assert server.monitor.promises.all.value(0.1) > 0
    late = QuotingServer(slackfit, profile_in_ticks())
    simulate(traffic((0, 50), (500, 50)), late, Exact(2.0))  # 80 ticks instead of 40
    assert late.chance[1] == pytest.approx(9.9 / (10 + math.exp(-(420 / 1024) / 5)), abs=1e-3)


def test_quotes_of_a_mixed_load_are_true() -> None:
    machine = built_in("cpu")
    workload = Scenario("mixed", "budgets", "gamma:4", 2.0, 2.0, "bimodal:20-200:0.9").workload(machine, 3)
    judged = score(joined([simulated(machine, workload, seed=seed) for seed in (3, 4)]))
    assert judged.quotes == 2 * len(workload)
    assert judged.brier_skill is not None
    assert judged.brier_skill >= 0.3
    assert judged.calibration_error <= 0.03
