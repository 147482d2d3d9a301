"""A real server under a burst and on its way out: refused at once, narrower, never lost, and wide again afterwards."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from server.bench.client import Client, Reply, open_loop
from tests.service.service_process import Running, draw_photos, serving

pytestmark = pytest.mark.service


def test_a_burst_is_narrowed_and_shed_and_then_forgotten(server: Running, photos: list[bytes]) -> None:
    widest = max(w["width"] for w in server.http.get("/v1/model").json()["widths"])
    capacity_s = [w["latency_ms"]["16"]["p50"] / 16_000 for w in server.http.get("/v1/model").json()["widths"]]
    rate = 3 / capacity_s[-1]  # three times what the engine alone could do at full width
    arrivals = [i / rate for i in range(int(1.5 * rate))]

    replies = asyncio.run(burst(server.port, photos, arrivals, {"X-Latency-Budget-Ms": "200"}))

    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) <= {200, 429, 504}, statuses
    assert statuses[429] > 0, statuses
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in replies if reply.status == 429)
    answered = [reply.json() for reply in replies if reply.status == 200]
    assert min(body["width"] for body in answered) < widest
    time.sleep(2)
    calm = server.http.post("/v1/classify", content=photos[0], headers={"X-Latency-Budget-Ms": "1000"})
    assert calm.json()["width"] == widest
    metrics = server.http.get("/metrics").text
    assert f'scala_budget_total{{outcome="shed"}} {float(statuses[429])}' in metrics


def test_sigterm_loses_no_request_and_exits_with_zero(tmp_path: Path) -> None:
    with serving(tmp_path / "log", DRAIN_GRACE_S="1") as running:
        running.wait_ready()
        replies, ready_after = asyncio.run(leave_under_load(running))
        assert running.process.wait(timeout=20) == 0, (tmp_path / "log").read_text()
    statuses = Counter(reply.status for reply in replies)
    assert set(statuses) <= {200, 503}, statuses
    assert statuses[200] > 0
    assert all(reply.headers["connection"] == "close" for reply in replies if reply.status == 503)
    assert ready_after == 503


async def burst(port: int, photos: list[bytes], arrivals: list[float], headers: dict[str, str]) -> list[Reply]:
    client = Client(port)
    try:
        return await open_loop(client, photos, headers, arrivals)
    finally:
        client.close()


async def leave_under_load(running: Running) -> tuple[list[Reply], int]:
    """Callers without pause while the server is told to leave; each stops at its first refusal."""
    photos, client, replies = draw_photos(4), Client(running.port), []

    async def caller() -> None:
        while True:
            try:
                reply = await client.classify(photos[0], {"X-Latency-Budget-Ms": "5000"})
            except ConnectionRefusedError:  # it has left; nothing was sent
                return
            replies.append(reply)
            if reply.status != 200:
                return

    callers = [asyncio.create_task(caller()) for _ in range(4)]
    await asyncio.sleep(0.5)
    running.process.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.3)
    ready_after = await client.get("/readyz")
    await asyncio.gather(*callers)
    client.close()
    return replies, ready_after.status
