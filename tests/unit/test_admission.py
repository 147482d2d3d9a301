"""Admission: exact bounds, everything given back, and who is told "never" and who "not now". The clock stands still."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from unittest import mock

import numpy as np
import pytest

from scala_model.width import Width
from server.admission import (
    MAX_INFLIGHT_BODIES,
    MAX_REQUESTS_PER_IMAGE,
    MIN_UPLOAD_S,
    RESERVED_BODIES,
    SMALL_SHARE,
    Admission,
    Permit,
)
from server.device import Device
from server.errors import Impossible, RequestError, Shed, TooLarge, Unavailable
from server.latency_profile import LatencyProfile
from server.lifecycle import Lifecycle
from server.load_monitor import LoadMonitor
from server.request_queue import RequestQueue
from server.routes.visit import Visit
from server.types import Job, Terms
from tests.unit.fake_engine import FakeEngine
from tests.unit.virtual_time import Clock

NARROW, MIDDLE, WIDE = Width(0.25), Width(0.5), Width(1.0)
ALL = (NARROW, MIDDLE, WIDE)
BODY, IMAGES = 100, 4


class Desk:
    """An admission and what it looks at. One image takes 10, 20 or 40 ms, four take 16, 32 or 64: p50 = p99."""

    def __init__(self, clock: Clock, max_images: int = IMAGES) -> None:
        self.clock, self.queue, self.monitor = clock, RequestQueue(), LoadMonitor()
        self.profile = LatencyProfile({NARROW: 0.5, MIDDLE: 0.6, WIDE: 0.7}, 4)
        for width in ALL:
            for batch, ms in {1: 40, 2: 48, 4: 64}.items():
                self.profile.record(width, batch, [float(width) * ms / 1000] * 20)
        self.device = Device(FakeEngine(clock), Lifecycle(), 200)
        self.admission = Admission(
            self.queue, self.profile, self.monitor, self.device, max_images=max_images, max_body_bytes=BODY
        )

    def terms(self, budget_ms: float, widths: tuple[Width, ...] = ALL) -> Terms:
        due = self.clock.now + budget_ms / 1000
        return Terms(self.clock.now, due, due, widths)

    def in_time(self, budget_ms: float, widths: tuple[Width, ...] = ALL, *, undecoded_bytes: int | None = None) -> bool:
        try:
            self.admission.check_in_time(self.terms(budget_ms, widths), undecoded_bytes=undecoded_bytes)
        except Shed:
            return False
        return True

    @property
    def held(self) -> tuple[int, int, int]:
        return self.admission.requests, self.admission.images, self.admission.inflight_bytes


NOTHING = (0, 0, 0)


@pytest.fixture
def desk() -> Iterator[Desk]:
    clock = Clock()
    with mock.patch("time.monotonic", clock):
        yield Desk(clock)


# -- bytes


def test_a_body_may_have_exactly_the_limit(desk: Desk) -> None:
    with desk.admission.permit(BODY) as permit:
        permit.add_bytes(BODY - 1)
        permit.add_bytes(1)
        assert desk.held == (1, 0, BODY)
        with pytest.raises(TooLarge, match=f"limit is {BODY}"):
            permit.add_bytes(1)
        assert desk.held == (1, 0, BODY), "what was refused is not counted"


def test_what_comes_out_of_a_compressed_body_has_the_same_limit_and_both_are_held(desk: Desk) -> None:
    with desk.admission.permit(BODY // 2) as permit:
        permit.add_bytes(BODY // 2)
        permit.unpack()
        permit.add_bytes(BODY)
        assert desk.held == (1, 0, BODY // 2 + BODY)
        with pytest.raises(TooLarge):
            permit.add_bytes(1)
    assert desk.held == NOTHING


def test_a_declared_size_over_the_limit_is_refused_before_anything_is_held(desk: Desk) -> None:
    with pytest.raises(TooLarge, match=str(BODY + 1)), desk.admission.permit(BODY + 1):
        pytest.fail("let in")
    assert desk.held == NOTHING


def test_all_bodies_together_are_bounded(desk: Desk) -> None:
    admission = Desk(desk.clock, max_images=100).admission
    with ExitStack() as inside:
        fill(inside, admission)
        large = inside.enter_context(admission.permit(None))
        large.add_bytes(SMALL)
        with pytest.raises(Shed, match="bytes"):
            large.add_bytes(1)
        with pytest.raises(Shed, match=f"more than {7 * BODY} bytes"), admission.permit(SMALL + 1):
            pytest.fail("let in")
    with admission.permit(BODY) as permit:
        permit.add_bytes(BODY)


SMALL = BODY // SMALL_SHARE


def fill(inside: ExitStack, admission: Admission, end_upload: Callable[[], object] | None = None) -> list[Permit]:
    """As many large bodies as there may be, by default bodies that are in."""
    permits = [inside.enter_context(admission.permit(BODY)) for _ in range(MAX_INFLIGHT_BODIES - RESERVED_BODIES)]
    for permit in permits:
        permit.end_upload = end_upload
        permit.add_bytes(BODY)
    return permits


def test_large_bodies_leave_room_for_small_ones(desk: Desk) -> None:
    admission = Desk(desk.clock, max_images=100).admission
    with ExitStack() as inside:
        fill(inside, admission)
        for _ in range(RESERVED_BODIES * BODY // SMALL):
            inside.enter_context(admission.permit(SMALL)).add_bytes(SMALL)
        with pytest.raises(Shed, match="bytes"), admission.permit(SMALL):
            pytest.fail("let in")
        assert MAX_INFLIGHT_BODIES * BODY - SMALL < admission.inflight_bytes <= MAX_INFLIGHT_BODIES * BODY


def test_an_upload_that_takes_long_ends_for_others_who_need_its_room(desk: Desk) -> None:
    """First the one that has held most for longest, and nobody who needs not."""
    admission, ended = Desk(desk.clock, max_images=100).admission, list[int]()
    with ExitStack() as inside:
        permits = fill(inside, admission)
        for number, permit in enumerate(permits):
            permit.end_upload = partial(ended.append, number)
        permits[2].since -= 0.5  # seconds
        permits[3].end_upload = None  # it is in by now
        late = inside.enter_context(admission.permit(None))
        desk.clock.now += 0.9 * MIN_UPLOAD_S - 0.5
        with pytest.raises(Shed, match="bytes"), admission.permit(BODY):
            pytest.fail("let in")
        desk.clock.now += 0.2 * MIN_UPLOAD_S
        late.add_bytes(BODY)
        assert ended == [2]
        with pytest.raises(Shed, match="of the uploads that have taken more than 1 s this one held most"):
            permits[2].add_bytes(1)
        desk.clock.now += MIN_UPLOAD_S
        for _ in range(MAX_INFLIGHT_BODIES - RESERVED_BODIES - 2):
            inside.enter_context(admission.permit(BODY)).add_bytes(BODY)
        assert sorted(ended) == [0, 1, 2, 4, 5, 6]
        with pytest.raises(Shed, match="bytes"), admission.permit(BODY):
            pytest.fail("let in")
    assert (admission.requests, admission.images, admission.inflight_bytes) == NOTHING


# -- images


def test_the_queue_has_exactly_as_much_room_as_configured(desk: Desk) -> None:
    with ExitStack() as inside:
        early = inside.enter_context(desk.admission.permit(None))
        for _ in range(IMAGES):
            inside.enter_context(desk.admission.permit(None)).set_images(1)
        with pytest.raises(Shed, match=r"full \(SCALA_MAX_QUEUE is 4 images\)"):
            early.set_images(1)
        with pytest.raises(Shed, match=r"full \(SCALA_MAX_QUEUE is 4 images\)"), desk.admission.permit(None):
            pytest.fail("let in")
        assert desk.held == (IMAGES + 1, IMAGES, 0)
    assert desk.held == NOTHING


def test_who_still_sends_takes_nobodys_place(desk: Desk) -> None:
    with ExitStack() as inside:
        for _ in range(2 * IMAGES):
            inside.enter_context(desk.admission.permit(None)).add_bytes(1)
        assert desk.admission.images == 0
        inside.enter_context(desk.admission.permit(None)).set_images(IMAGES)


def test_there_are_not_endlessly_many_who_still_send(desk: Desk) -> None:
    with ExitStack() as inside:
        for _ in range(MAX_REQUESTS_PER_IMAGE * IMAGES):
            inside.enter_context(desk.admission.permit(None))
        with (
            pytest.raises(Shed, match=f"{MAX_REQUESTS_PER_IMAGE * IMAGES} uploads are open"),
            desk.admission.permit(None),
        ):
            pytest.fail("let in")
    with desk.admission.permit(None):
        assert desk.held == (1, 0, 0)


def test_an_idle_upload_ends_for_another_when_there_are_too_many(desk: Desk) -> None:
    ended, most = list[int](), MAX_REQUESTS_PER_IMAGE * IMAGES
    with ExitStack() as inside:
        for number in range(most):
            inside.enter_context(desk.admission.permit(None)).end_upload = partial(ended.append, number)
            desk.clock.now += 1.1 * MIN_UPLOAD_S / most
        inside.enter_context(desk.admission.permit(None))
        assert (ended, desk.admission.requests) == ([0], most)
    assert desk.held == NOTHING


def test_an_upload_that_gave_way_gets_no_new_deadline(desk: Desk) -> None:
    """That of a V2 body, which came in whole at the same moment; nobody counted its bytes any more."""
    visit = Visit(mock.Mock(), desk.terms(1000), mock.Mock(), {})
    with desk.admission.permit(None) as visit.permit:
        visit.permit.end_upload = mock.Mock()
        desk.admission.end(visit.permit)
        with pytest.raises(TimeoutError):
            visit.narrow(desk.terms(500))


def test_a_request_may_hold_as_many_images_as_the_queue(desk: Desk) -> None:
    with desk.admission.permit(None) as permit:
        permit.set_images(IMAGES)
        assert desk.admission.images == IMAGES
    assert desk.held == NOTHING


@pytest.mark.parametrize("images", [IMAGES + 1, IMAGES + 2, 1000])
def test_a_request_that_can_never_fit_is_too_large_rather_than_shed(desk: Desk, images: int) -> None:
    with desk.admission.permit(None) as permit, pytest.raises(TooLarge, match="fewer"):
        permit.set_images(images)
    assert desk.held == NOTHING


def test_a_request_that_fits_later_is_shed(desk: Desk) -> None:
    with desk.admission.permit(None) as other, desk.admission.permit(None) as permit:
        other.set_images(1)
        with pytest.raises(Shed):
            permit.set_images(IMAGES)
        permit.set_images(IMAGES - 1)
    assert desk.held == NOTHING


@pytest.mark.parametrize("error", [RuntimeError, Shed, asyncio.CancelledError, KeyboardInterrupt])
def test_a_permit_gives_everything_back_however_it_ends(desk: Desk, error: type[BaseException]) -> None:
    ended = Shed("x", retry_after_s=1) if error is Shed else error()
    with pytest.raises(error), desk.admission.permit(None) as permit:  # noqa: PT012
        permit.add_bytes(50)
        permit.set_images(3)
        raise ended
    assert desk.held == NOTHING


@pytest.mark.parametrize("refused", [lambda permit: permit.add_bytes(BODY), lambda permit: permit.set_images(99)])
def test_a_permit_gives_everything_back_after_a_refusal_of_its_own(
    desk: Desk, refused: Callable[[Permit], None]
) -> None:
    with pytest.raises(RequestError), desk.admission.permit(None) as permit:  # noqa: PT012
        permit.add_bytes(50)
        refused(permit)
    assert desk.held == NOTHING


# -- pins and floors


def test_without_pin_and_floor_every_trained_width_is_allowed(desk: Desk) -> None:
    assert desk.admission.widths_for(None, None) == ALL


@pytest.mark.parametrize(
    ("pinned", "floor", "widths"),
    [
        (None, 0.0, ALL),
        (None, 0.6, (MIDDLE, WIDE)),
        (None, 0.601, (WIDE,)),
        (None, 0.7, (WIDE,)),
        (MIDDLE, None, (MIDDLE,)),
        (MIDDLE, 0.6, (MIDDLE,)),
    ],
)
def test_a_pin_and_a_floor_narrow_the_choice(
    desk: Desk, pinned: Width | None, floor: float | None, widths: tuple[Width, ...]
) -> None:
    assert desk.admission.widths_for(pinned, floor) == widths


def test_equal_wishes_are_one_object(desk: Desk) -> None:
    """Policies tell them apart as objects: to hash or to compare them would take most of a decision's time."""
    assert desk.admission.widths_for(None, 0.61) is desk.admission.widths_for(WIDE, None)
    assert desk.admission.widths_for(None, 0.1) is desk.admission.widths_for(None, None)
    fixed = fixed_desk(MIDDLE)
    assert fixed.widths_for(None, None) is fixed.widths_for(None, 0.1) is fixed.widths_for(MIDDLE, None)


def test_a_floor_above_all_widths_is_impossible_and_the_answer_lists_what_there_is(desk: Desk) -> None:
    with pytest.raises(Impossible, match=r"at least 0\.71; the most accurate has 0\.7000") as refusal:
        desk.admission.widths_for(None, 0.71)
    assert refusal.value.extra["widths"] == [
        {"width": 0.25, "accuracy": 0.5, "latency_ms": 10.0},
        {"width": 0.5, "accuracy": 0.6, "latency_ms": 20.0},
        {"width": 1.0, "accuracy": 0.7, "latency_ms": 40.0},
    ]


def test_a_listed_latency_is_a_budget_that_is_let_in(desk: Desk) -> None:
    """The list counts what an image takes beside the engine, too: 1.2 ms."""
    now = desk.clock.now
    desk.monitor.hop.observe(0.0005, now)
    desk.monitor.respond.observe(0.0007, now)
    with pytest.raises(Impossible) as refusal:
        desk.admission.check_possible(ALL, 0.0111)
    listed = refusal.value.extra["widths"]
    assert isinstance(listed, list)
    assert [entry["latency_ms"] for entry in listed] == pytest.approx([11.2, 21.2, 41.2], abs=0.002)
    desk.admission.check_possible(ALL, listed[0]["latency_ms"] / 1000)


def test_a_pinned_width_below_the_floor_is_impossible(desk: Desk) -> None:
    with pytest.raises(Impossible, match=r"at least 0\.7 at width 0\.5"):
        desk.admission.widths_for(MIDDLE, 0.7)


def fixed_desk(width: Width) -> Admission:
    desk = Desk(Clock())
    return Admission(
        desk.queue, desk.profile, desk.monitor, desk.device, max_images=IMAGES, max_body_bytes=BODY, fixed=width
    )


@pytest.mark.parametrize(
    ("pinned", "floor", "width"),
    [
        (None, None, MIDDLE),
        (None, 0.5, MIDDLE),
        (None, 0.6, MIDDLE),
        (None, 0.65, WIDE),
        (WIDE, None, WIDE),
        (NARROW, 0.1, NARROW),
    ],
)
def test_a_fixed_width_is_for_all_but_those_whose_pin_or_floor_forbids_it(
    pinned: Width | None, floor: float | None, width: Width
) -> None:
    """They get the narrowest that they allow."""
    assert fixed_desk(MIDDLE).widths_for(pinned, floor) == (width,)


def test_no_fixed_width_makes_a_floor_possible_that_is_none(desk: Desk) -> None:
    with pytest.raises(Impossible):
        fixed_desk(NARROW).widths_for(None, 0.71)


# -- impossible: not even on an idle machine


def test_a_width_that_is_still_being_warmed_is_neither_impossible_nor_refused_for_load(desk: Desk) -> None:
    cold = Width(0.75)
    desk.profile.widths = (*ALL, cold)
    desk.profile.accuracy[cold] = 0.65
    with pytest.raises(Unavailable, match=r"Width 0\.75 is not on offer now"):
        desk.admission.check_possible((cold,), 10.0)
    desk.admission.check_possible((cold, WIDE), 0.040)


def test_a_budget_is_possible_from_the_fastest_allowed_width_on(desk: Desk) -> None:
    desk.admission.check_possible(ALL, 0.010)
    desk.admission.check_possible((MIDDLE, WIDE), 0.020)
    with pytest.raises(Impossible, match=r"9\.9 ms cannot be met .* the fastest takes 10\.0 ms"):
        desk.admission.check_possible(ALL, 0.0099)
    with pytest.raises(Impossible, match=r"the fastest takes 20\.0 ms") as refusal:
        desk.admission.check_possible((MIDDLE, WIDE), 0.0199)
    assert refusal.value.extra["widths"], "remedies"


def test_one_image_is_possible_from_the_quickest_width_on_though_batches_are_faster_at_another(desk: Desk) -> None:
    """A GPU: full width takes 9 ms for one image from now on, less than the narrowest, which is better at four."""
    desk.profile.record(WIDE, 1, [0.009] * 200)
    desk.admission.check_possible(ALL, 0.0091)
    with pytest.raises(Impossible, match=r"the fastest takes 9\.0 ms"):
        desk.admission.check_possible(ALL, 0.0089)
    with desk.admission.permit(None):
        assert desk.in_time(9.1)
        assert not desk.in_time(8.9)


def test_load_makes_nothing_impossible(desk: Desk) -> None:
    desk.monitor.see_machine(20, 1, 2)
    desk.device.free_by = desk.clock.now + 100
    with desk.admission.permit(None):
        desk.admission.check_possible(ALL, 0.010)
        assert not desk.in_time(10)


def test_what_an_image_costs_beside_the_engine_is_part_of_what_is_possible(desk: Desk) -> None:
    """In about the best case seen: 1 ms to decode, 2 to the engine's thread, 3 back to the caller."""
    for allowance, ms in ((desk.monitor.small, 1), (desk.monitor.hop, 2), (desk.monitor.respond, 3)):
        allowance.observe(ms / 1000, desk.clock.now)
    desk.admission.check_possible(ALL, 0.0161)
    with pytest.raises(Impossible, match=r"the fastest takes 16\.0 ms"):
        desk.admission.check_possible(ALL, 0.0159)


# -- shed: late just now


@pytest.mark.parametrize(("widths", "ms"), [(ALL, 10), ((MIDDLE, WIDE), 20), ((WIDE,), 40)])
def test_on_an_idle_machine_the_fastest_allowed_width_decides(desk: Desk, widths: tuple[Width, ...], ms: int) -> None:
    with desk.admission.permit(None):
        assert desk.in_time(ms + 0.1, widths)
        assert not desk.in_time(ms - 0.1, widths)


def test_alone_the_median_must_fit_and_behind_others_there_is_room_for_a_slow_batch(desk: Desk) -> None:
    """Or a cell whose samples were bad would never get better ones."""
    for batch in (1, 2):
        desk.profile.record(NARROW, batch, [0.030] * 10)  # of thirty samples: p99 is 30 ms, p50 still 10 and 12
    with desk.admission.permit(None):
        assert desk.in_time(10.1)
        desk.admission.preparing = 1
        assert not desk.in_time(37.9)
        assert desk.in_time(38.1)  # twice 10, and the 18 by which two in a batch may take longer


def test_the_running_batch_is_waited_for(desk: Desk) -> None:
    desk.device.free_by = desk.clock.now + 0.030
    with desk.admission.permit(None):
        assert desk.in_time(40.1)
        assert not desk.in_time(39.9)


def test_interference_and_the_way_back_count(desk: Desk) -> None:
    desk.monitor.see_machine(5, 1, 2)  # x 3
    desk.monitor.respond.observe(0.002, desk.clock.now)
    with desk.admission.permit(None):
        assert desk.in_time(32.1)
        assert not desk.in_time(31.9)


def test_the_time_of_decoding_counts_until_it_is_done(desk: Desk) -> None:
    desk.monitor.small.observe(0.005, desk.clock.now)
    desk.monitor.large.observe(0.080, desk.clock.now)
    with desk.admission.permit(None):
        assert desk.in_time(15.1, undecoded_bytes=2000)
        assert not desk.in_time(14.9, undecoded_bytes=2000)
        assert not desk.in_time(89.9, undecoded_bytes=2_000_000), "a large body takes as long as other large ones"
        assert desk.in_time(10.1)


@pytest.mark.parametrize(("preparing", "ms"), [(0, 10), (1, 20), (2, 22), (4, 26), (8, 42)])
def test_images_that_are_being_decoded_are_waited_for(desk: Desk, preparing: int, ms: float) -> None:
    """They run in the best batches of the fastest width: one takes 10 ms, two 12, four 16, eight two batches."""
    desk.admission.preparing = preparing
    with desk.admission.permit(None):
        assert desk.in_time(ms + 0.1)
        assert not desk.in_time(ms - 0.1)


def test_a_backlog_begins_now_however_long_the_device_has_been_idle(desk: Desk) -> None:
    desk.device.free_by = desk.clock.now - 3600
    desk.admission.preparing = 2
    with desk.admission.permit(None):
        assert desk.in_time(22.1)
        assert not desk.in_time(21.9)


@pytest.mark.parametrize(
    ("waiting_ms", "least_ms"),
    [
        ([500], 10),  # who is due later runs later
        ([21, 500], 10),
        ([19], 12),  # alone first, he would make the other one late; both together take 12
        ([11], 20),
        ([16.5] * 4, 26),
        ([5, 9, 500], 10),  # who is late already
    ],
)
def test_nobody_who_was_let_in_is_made_late(waiting_ms: list[float], least_ms: float) -> None:
    async def scenario() -> None:
        desk = Desk(Clock(), max_images=10)
        with mock.patch("time.monotonic", desk.clock), ExitStack() as inside:
            for budget_ms in waiting_ms:
                inside.enter_context(desk.admission.permit(None))
                desk.queue.put(Job(desk.terms(budget_ms), np.zeros((1, 1, 3), np.uint8), desk.clock.now))
            inside.enter_context(desk.admission.permit(None))
            assert desk.in_time(least_ms + 0.1)
            assert not desk.in_time(least_ms - 0.1)

    asyncio.run(scenario())


def test_who_names_no_budget_may_come_later(desk: Desk) -> None:
    """By his place in the queue he would be late, not by his deadline."""
    now = desk.clock.now
    desk.device.free_by = now + 0.200
    with desk.admission.permit(None):
        assert desk.admission.check_in_time(Terms(now, now + 0.100, now + 1.0, ALL)) == now + 1.0
        assert desk.admission.check_in_time(Terms(now, now + 0.220, now + 1.0, ALL)) == now + 0.220
        with pytest.raises(Shed):
            desk.admission.check_in_time(Terms(now, now + 0.100, now + 0.209, ALL))


def test_the_hop_of_every_batch_counts(desk: Desk) -> None:
    desk.monitor.hop.observe(0.006, desk.clock.now)
    with desk.admission.permit(None):
        assert desk.in_time(16.1)
        assert not desk.in_time(15.9)
        desk.admission.preparing = 1
        assert desk.in_time(32.1)
        assert not desk.in_time(31.9)


# -- when to come back


def retry_after(desk: Desk) -> float:
    with desk.admission.permit(None), pytest.raises(Shed) as refusal:
        desk.admission.check_in_time(desk.terms(1))
    assert f"try again in {refusal.value.retry_after_s} s" in refusal.value.detail
    return refusal.value.retry_after_s


def test_retry_after_is_whole_positive_and_spread(desk: Desk) -> None:
    """Or all who were refused at one moment would come back at another."""
    seen = {retry_after(desk) for _ in range(50)}
    assert all(isinstance(seconds, int) and seconds >= 1 for seconds in seen)
    assert seen == {1, 2}


def test_retry_after_grows_with_what_is_inside(desk: Desk) -> None:
    desk.monitor.see_machine(1999, 1, 2)  # x 1000: 12 s for two images
    desk.admission.preparing = 2
    assert all(12 < retry_after(desk) <= 14 for _ in range(20))


def test_retry_after_counts_each_image_at_the_width_that_it_needs(desk: Desk) -> None:
    """Two at the narrowest width take 12 ms and two at full width 48, here 1000 times as long: half of both."""
    desk.monitor.see_machine(1999, 1, 2)

    async def scenario() -> None:
        for widths in (ALL, (WIDE,)):
            desk.queue.put(Job(desk.terms(1000, widths), np.zeros((1, 1, 3), np.uint8), desk.clock.now))
        assert all(30 < retry_after(desk) <= 32 for _ in range(20))

    asyncio.run(scenario())


def test_nothing_is_refused_without_a_finite_time_to_come_back(desk: Desk) -> None:
    with ExitStack() as inside:
        for _ in range(IMAGES):
            inside.enter_context(desk.admission.permit(None)).set_images(1)
        with pytest.raises(Shed) as refusal:
            inside.enter_context(desk.admission.permit(None))
    assert math.isfinite(refusal.value.retry_after_s)
