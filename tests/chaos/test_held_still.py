"""The whole process stands still for seconds, as containers do that are paused and machines that are moved."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from server.bench.client import Client
from tests.chaos.conftest import Tally
from tests.chaos.load import FORESEEN
from tests.service.service_process import Running, serving

CALLERS, HALTS = 24, 4
HELD_S, BETWEEN_S = 2.5, 2.0  # the watchdog's patience is 2 s, and it may have begun at any time before
BUDGET_MS = 500


async def held_still(server: Running, photos: list[bytes]) -> tuple[Counter[int], float]:
    """What the callers heard, and seconds from the end of a halt until the first answer, at most."""
    heard, answered_at, went_on_at = Counter[int](), list[float](), list[float]()
    headers = {"X-Latency-Budget-Ms": f"{BUDGET_MS}", "X-Width": "1"}
    until = time.monotonic() + HALTS * (BETWEEN_S + HELD_S) + BETWEEN_S
    with closing(Client(server.port)) as client:

        async def caller(number: int) -> None:
            while time.monotonic() < until:
                reply = await client.classify(photos[number], headers)
                heard[reply.status] += 1
                if reply.status == 200:
                    answered_at.append(time.monotonic())
                else:
                    await asyncio.sleep(0.05)

        callers = asyncio.gather(*(caller(number) for number in range(CALLERS)))
        for _ in range(HALTS):
            await asyncio.sleep(BETWEEN_S)
            server.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(HELD_S)
            went_on_at.append(time.monotonic())
            server.process.send_signal(signal.SIGCONT)
        await callers
    return heard, max(min(at - went_on for at in answered_at if at > went_on) for went_on in went_on_at)


def test_a_process_that_was_held_still_goes_on(photos: list[bytes], tally: Tally, tmp_path: Path) -> None:
    """It takes no halt for a hang of its engine, ends those whose budget is over, and serves the others."""
    with serving(tmp_path / "log") as server:
        server.wait_ready()
        server.wait_until(lambda: "warmed" in (tmp_path / "log").read_text())
        heard, first_s = asyncio.run(held_still(server, photos))
        assert server.process.poll() is None, (tmp_path / "log").read_text()
        assert server.http.get("/readyz").status_code == 200
    tally.requests(heard.total(), lost=sum(count for status, count in heard.items() if status not in FORESEEN))
    assert set(heard) <= {200, 429, 504}, heard
    assert heard[200] > heard[504]
    assert first_s < BETWEEN_S
    seen = f"{heard[200]} answered, {heard[504]} ended at their deadline (504), {heard[429]} refused (429)"
    tally.fault(f"{HALTS} times the process is held still for {HELD_S:g} s", seen, first_s)
