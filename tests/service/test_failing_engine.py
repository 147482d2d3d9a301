"""A real server whose engine fails while requests wait: everyone gets an answer, and the process leaves with 70."""

from __future__ import annotations

import threading
from pathlib import Path

import httpx
import pytest

from tests.service.service_process import Running, serving

pytestmark = pytest.mark.service
CLIENTS, AFTER_BATCHES = 12, 5
EX_SOFTWARE = 70
# The engine is the embedded checkpoint's; from the given batch of real images on it fails.
SERVER = """
import sys, time
from server import app
from server.engine.contract import DeviceLost
from server.lifecycle import run
from server.settings import Settings

fault, after = sys.argv[1], int(sys.argv[2])
engine_of = app.engine_of

def failing(*given):
    engine = engine_of(*given)
    works, batches = engine.run, 0

    def run_batch(pixels, width):
        nonlocal batches
        batches += bool(pixels.any())  # the images of the warm-up are black
        if batches <= after:
            return works(pixels, width)
        if fault == "lost":
            raise DeviceLost("an illegal memory access was encountered")
        time.sleep(3600)

    engine.run = run_batch
    return engine

app.engine_of = failing
run(Settings.load())
"""


@pytest.mark.parametrize("fault", ["lost", "hangs"])
def test_nobody_is_left_without_an_answer(fault: str, photos: list[bytes], tmp_path: Path) -> None:
    outcomes: list[list[int]] = [[] for _ in range(CLIENTS)]

    def client(server: Running, seen: list[int]) -> None:
        with httpx.Client(base_url=server.http.base_url, timeout=20) as http:
            while 503 not in seen:
                reply = http.post("/v1/classify", content=photos[0], headers={"X-Latency-Budget-Ms": "20000"})
                seen.append(reply.status_code)
                assert reply.json()["predictions" if reply.status_code == 200 else "detail"]

    with serving(tmp_path / "log", command=("-c", SERVER, fault, str(AFTER_BATCHES))) as server:
        server.wait_ready()
        clients = [threading.Thread(target=client, args=(server, seen)) for seen in outcomes]
        for thread in clients:
            thread.start()
        assert server.process.wait(timeout=25) == EX_SOFTWARE
        for thread in clients:
            thread.join(timeout=5)
            assert not thread.is_alive(), "a request was left hanging"
    for seen in outcomes:
        assert set(seen) <= {200, 503}
        assert seen[-1] == 503, "everyone who waited heard of it"
    assert any(200 in seen for seen in outcomes)
