"""An engine that raises, hangs, makes things up, runs out of memory or takes the whole interpreter with it.

What is promised: everyone hears an answer by the budget, none of them is made up, and the server is well again or
leaves for its supervisor to start another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.callers import calling, expect_in_time, left_after, tell, warmed, well_after
from tests.chaos.conftest import Tally
from tests.chaos.faulty_server import BLOCKED_S, STANDSTILL_S
from tests.service.service_process import Running, serving

pytestmark = pytest.mark.service
EX_SOFTWARE, EX_STANDSTILL = 70, 1
BUDGET_MS = 500.0
WIDE_AGAIN_S = 15.0  # memory is tried for again once a second, width by width: measured 5
CAUGHT_UP_S = 5.0  # measured 1.2 to 1.8
LEAVES_S = 10.0  # of which two are the watchdog's patience, for a batch that hangs: measured 0.9 to 3.1
FULL_WIDTH = {"X-Width": "1"}  # at one width an image has one class


@dataclass(frozen=True)
class Faulty:
    """A server and the file that tells its engine what to do."""

    server: Running
    fault: Path

    def has(self, name: str) -> None:
        self.fault.write_text(name)

    @property
    def has_failed(self) -> bool:
        """A fault that was for one batch has had it."""
        return not self.fault.read_text()


@contextmanager
def faulty_server(folder: Path) -> Iterator[Faulty]:
    fault = folder / "fault"
    fault.write_text("")
    command, profiles = ("-m", "tests.chaos.faulty_server", str(fault)), folder.parent / "profiles"
    with serving(folder / "log", command=command, PROFILE_DIR=str(profiles)) as server:
        yield Faulty(warmed(server), fault)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulty]:
    """One server for all faults that it survives."""
    with faulty_server(tmp_path_factory.mktemp("faulty")) as started:
        yield started


def classes(faulty: Faulty, photos: list[bytes]) -> set[int]:
    """The classes of these images at full width."""
    replies = [faulty.server.http.post("/v1/classify", content=photo, headers=FULL_WIDTH) for photo in photos]
    return {reply.json()["predictions"][0]["class_id"] for reply in replies}


@pytest.mark.parametrize("name", ["raises", "nan", "unnormalised", "negative", "narrow", "short"])
def test_a_batch_that_fails_is_the_only_one_and_nothing_is_made_up(
    faulty: Faulty, photos: list[bytes], tally: Tally, name: str
) -> None:
    known = classes(faulty, photos[:4])
    with calling(faulty.server, photos[:4], BUDGET_MS, headers=FULL_WIDTH) as seen:
        time.sleep(0.3)
        faulty.has(f"{name} once")
        faulty.server.wait_until(lambda: faulty.has_failed)
        recovery_s = well_after(faulty.server, photos[0])
        time.sleep(0.3)
    tell(tally, f"engine, one batch: {name}", seen, recovery_s)
    expect_in_time(seen)
    assert set(seen.statuses) <= {200, 500}, seen
    assert 1 <= seen.statuses[500] <= 4, "no more than there were callers"
    answered = [reply.json() for reply in seen.replies if reply.status == 200]
    assert {answer["predictions"][0]["class_id"] for answer in answered} <= known
    failures = [reply.json()["type"] for reply in seen.replies if reply.status == 500]
    assert set(failures) == {"urn:scala-serve:problem:engine-failed"}


@pytest.mark.parametrize("name", ["raises", "nan", "lost", "hangs", "full"])
def test_an_engine_that_does_not_come_back_ends_the_process_and_everyone_hears_so(
    tmp_path: Path, photos: list[bytes], tally: Tally, name: str
) -> None:
    with faulty_server(tmp_path) as faulty, calling(faulty.server, photos, BUDGET_MS) as seen:
        time.sleep(0.3)
        faulty.has(name)
        left_s = left_after(faulty.server, EX_SOFTWARE, LEAVES_S)
        log = (tmp_path / "log").read_text()
    tell(tally, f"engine, for good: {name}", seen, None, left_s)
    expect_in_time(seen)
    assert seen.statuses[503] > 0
    assert set(seen.statuses) <= {200, 429, 500, 503, 504}, seen
    assert seen.statuses[500] <= 3 * 4, "three batches of as many as there were callers"
    assert "the engine failed" in log, "the last lines are not lost"


def test_a_device_with_little_memory_serves_narrower_and_in_smaller_batches_until_it_has_more(
    faulty: Faulty, photos: list[bytes], tally: Tally
) -> None:
    with calling(faulty.server, photos, BUDGET_MS, callers=8) as seen:
        time.sleep(0.3)
        faulty.has("scarce")
        faulty.server.wait_until(
            lambda: faulty.server.http.post("/v1/classify", content=photos[0]).json().get("width", 1) <= 0.5
        )
        time.sleep(1)
        num_scarce = len(seen.replies)
        faulty.has("")
        recovery_s = well_after(faulty.server, photos[0], WIDE_AGAIN_S)
        time.sleep(0.3)
    tell(tally, "engine: memory for one image at half width only", seen, recovery_s)
    expect_in_time(seen)
    assert set(seen.statuses) <= {200, 429}, seen
    last_scarce = [reply.json() for reply in seen.replies[num_scarce - 20 : num_scarce] if reply.status == 200]
    assert last_scarce
    assert {answer["batch_size"] for answer in last_scarce} == {1}
    assert max(answer["width"] for answer in last_scarce) <= 0.5


def test_an_interpreter_that_stands_still_for_a_while_answers_late_and_goes_on(
    faulty: Faulty, photos: list[bytes], tally: Tally
) -> None:
    """While native code keeps the interpreter's lock nothing can be answered: the block comes on top of the budget."""
    with calling(faulty.server, photos, 100.0) as seen:
        time.sleep(0.3)
        faulty.has("stalls once")
        time.sleep(BLOCKED_S)
        recovery_s = well_after(faulty.server, photos[0], CAUGHT_UP_S)
        time.sleep(0.3)
    tell(tally, f"engine keeps the interpreter's lock for {BLOCKED_S:g} s", seen, recovery_s)
    expect_in_time(seen, 1000 * BLOCKED_S)
    assert seen.late_ms > 0, "it did stand still"
    assert set(seen.statuses) <= {200, 429, 504}, seen


def test_an_interpreter_that_stands_still_for_good_ends_and_says_where(
    tmp_path: Path, photos: list[bytes], tally: Tally
) -> None:
    """No watchdog of ours can run then. The last one needs no interpreter, and its exit code is 1."""
    with faulty_server(tmp_path) as faulty, calling(faulty.server, photos, BUDGET_MS) as seen:
        time.sleep(0.3)
        faulty.has("locks")
        left_s = left_after(faulty.server, EX_STANDSTILL, within_s=STANDSTILL_S + 2)
        log = (tmp_path / "log").read_text()
    tell(
        tally, f"engine keeps the interpreter's lock for good (the limit set to {STANDSTILL_S:g} s)", seen, None, left_s
    )
    assert left_s > STANDSTILL_S - 1.5
    assert len(seen.lost) <= 2 * 4, "those who were asking, and asked again before the door was closed"
    assert "Timeout (0:00:03)!" in log
    assert "faulty_server.py" in log, "it says where each thread was"
