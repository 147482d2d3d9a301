"""Callers who keep asking while something breaks, and what they saw of it."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from server.bench.client import Client, Reply
from tests.chaos.conftest import Tally
from tests.service.service_process import Running

# How much later than its budget an answer may come, as promised: under a fault, and without one.
LATE_MS, QUIET_MS = 50, 10
# Two cores are shared with the callers' own event loop and with other work: so many answers may be later than that, and
# none by more than this. Measured where nothing stood still: at most 3 ms later than its budget.
LATE_SHARE, WORST_MS = 0.01, 150
GIVE_UP_S = 30.0
PAUSE_S = 0.005  # between two requests of a caller: what is measured is the fault, not a load
SERVED = 0.9  # of all answers, where a fault is nothing to callers; measured 1
WELL_S = 3.0  # after a fault that leaves nothing to mend; measured 0.01 to 0.1, and 0.5 with other work on both cores


@dataclass
class Seen:
    """``lost``: requests whose connection ended before an answer; ``refused``: connections that were not taken at all,
    as of a server that has left."""

    budget_ms: float
    replies: list[Reply] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    refused: int = 0

    @property
    def statuses(self) -> Counter[int]:
        return Counter(reply.status for reply in self.replies)

    @property
    def lateness_ms(self) -> list[float]:
        """By how much each answer came after its budget; negative if it came before."""
        return [1000 * reply.latency_s - self.budget_ms for reply in self.replies]

    @property
    def late_ms(self) -> float:
        return max(self.lateness_ms)

    def __str__(self) -> str:
        counts = ", ".join(f"{status} x {count}" for status, count in sorted(self.statuses.items()))
        latest = f"latest answer {self.late_ms:+.0f} ms from its budget of {self.budget_ms:g} ms"
        return f"{counts}; {len(self.lost)} without an answer; {latest}"


@contextmanager
def calling(
    server: Running,
    images: Sequence[bytes],
    budget_ms: float,
    *,
    callers: int = 4,
    headers: Mapping[str, str] | None = None,
) -> Iterator[Seen]:
    """Callers with this budget, from before the block until after it.

    They come back when a 503 tells them to: whoever does not wait meets the instant at which a leaving server closes
    its door, and is cut off. A refused connection ends its caller.
    """
    seen, stop = Seen(budget_ms), threading.Event()
    asked = {"X-Latency-Budget-Ms": str(budget_ms), **(headers or {})}
    thread = threading.Thread(target=lambda: asyncio.run(_call(server.port, images, asked, callers, seen, stop)))
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join(GIVE_UP_S + 10)
    assert not thread.is_alive(), "a request was left hanging"


async def _call(
    port: int, images: Sequence[bytes], headers: Mapping[str, str], callers: int, seen: Seen, stop: threading.Event
) -> None:
    client, supply = Client(port), itertools.cycle(images)

    async def caller() -> None:
        while not stop.is_set():
            pause_s = PAUSE_S
            try:
                reply = await asyncio.wait_for(client.classify(next(supply), headers), GIVE_UP_S)
                seen.replies.append(reply)
                if reply.status == 503:
                    pause_s = float(reply.headers["retry-after"])
            except ConnectionRefusedError:
                seen.refused += 1
                return
            except (OSError, TimeoutError) as error:
                seen.lost.append(repr(error))
            await asyncio.sleep(pause_s)

    await asyncio.gather(*(caller() for _ in range(callers)))
    client.close()


def well_after(server: Running, photo: bytes, within_s: float = WELL_S) -> float:
    """Seconds from now until the server is ready, and gives an image the widest network again, which it has to."""
    started = time.monotonic()
    widest = max(entry["width"] for entry in server.http.get("/v1/model").json()["widths"])
    while True:
        assert server.process.poll() is None, "the server ended"
        assert time.monotonic() - started < within_s, f"the server is not well again after {within_s:g} s"
        ready = server.http.get("/readyz").status_code == 200
        reply = server.http.post("/v1/classify", content=photo, headers={"X-Latency-Budget-Ms": "1000"})
        if ready and reply.status_code == 200 and reply.json()["width"] == widest:
            return time.monotonic() - started
        time.sleep(0.005)


def left_after(server: Running, code: int, within_s: float, *, or_code: int | None = None) -> float:
    """Seconds from now until the process left with this code, or the other, which it has to."""
    started = time.monotonic()
    assert server.process.wait(timeout=within_s) in (code, or_code)
    return time.monotonic() - started


def warmed(server: Running) -> Running:
    """Once every width runs every batch size."""
    server.wait_measured()
    return server


def tell(tally: Tally, name: str, seen: Seen, recovery_s: float | None, left_s: float | None = None) -> None:
    tally.fault(name, str(seen), recovery_s, left_s)
    tally.requests(len(seen.replies) + len(seen.lost), len(seen.lost))


def expect_in_time(seen: Seen, fault_ms: float = 0.0) -> None:
    """``fault_ms``: for how long the fault itself keeps everything from being answered."""
    assert not seen.lost, seen.lost[:3]
    expect_punctual([late_ms - fault_ms for late_ms in seen.lateness_ms])


def expect_served(seen: Seen) -> None:
    """In time, and not by refusing: all but a few are answered, and none with another status."""
    expect_in_time(seen)
    assert set(seen.statuses) <= {200, 429}, seen
    assert seen.statuses[200] >= SERVED * len(seen.replies), seen


def expect_punctual(
    lateness_ms: Sequence[float], within_ms: float = LATE_MS, share: float = LATE_SHARE, worst_ms: float = WORST_MS
) -> None:
    """All answers but such a share came so soon after their budgets, and none later than the worst."""
    assert late_share(lateness_ms, within_ms) <= share, told_late(lateness_ms, within_ms)
    assert max(lateness_ms) < worst_ms, told_late(lateness_ms, within_ms)


def late_share(lateness_ms: Sequence[float], within_ms: float = LATE_MS) -> float:
    return sum(late_ms > within_ms for late_ms in lateness_ms) / len(lateness_ms)


def told_late(lateness_ms: Sequence[float], within_ms: float = LATE_MS) -> str:
    share = late_share(lateness_ms, within_ms)
    return f"{share:.2%} later than their budget + {within_ms:g} ms, the latest {max(lateness_ms):+.0f} ms from it"
