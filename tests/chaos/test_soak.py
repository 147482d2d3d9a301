"""A server at 80 % of what it can do, with bursts, for as long as one likes: nothing of it may grow, or grow slow.

Two minutes, or as many as ``SOAK_MINUTES`` says (``make soak``: thirty). The same judgement must find fault with a
server that leaks.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import psutil

from tests.chaos.conftest import Tally
from tests.chaos.judgement import LATE_S, Sample, complaints, trends
from tests.chaos.load import Outcome, play, poisson, saturate, serving_apart
from tests.service.service_process import Running

MINUTES = float(os.environ.get("SOAK_MINUTES", "2"))
# One period: callers without pause, then arrivals at 80 % of what those got, a tenth of the time at twice as much.
GAUGE_S, CYCLES, CALM_S, BURST_S = 1.5, 4, 1.8, 0.2
CALM, BURST = 2 / 3, 2.0
BUDGET_MS = 400  # twice as long as a burst
# It leaks 4 KiB, a descriptor and a thread at every so many batches; each image computes for longer, and the engine
# stands still for longer, in the end than a budget.
LEAKING_SERVER = """
import os, threading, time
from server import app
from server.lifecycle import run
from server.settings import Settings

engine_of, kept = app.engine_of, []

def leaking(*given):
    engine = engine_of(*given)
    works, started, stood = engine.run, None, 0.0

    def run_batch(pixels, width):
        nonlocal started, stood
        if not pixels.any():  # the images of the warm-up are black
            return works(pixels, width)
        started = started or time.monotonic()
        age_s = time.monotonic() - started
        kept.append(bytearray(4096))
        if len(kept) % 20 == 0:
            os.dup(1)
        if len(kept) % 200 == 0:
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        until = time.thread_time() + 0.00005 * age_s * len(pixels)
        while time.thread_time() < until:
            time.sleep(0)
        if time.monotonic() - stood > 1:
            time.sleep(age_s / 60)
            stood = time.monotonic()
        return works(pixels, width)

    engine.run = run_batch
    return engine

app.engine_of = leaking
run(Settings.load())
"""


async def arrive(server: Running, photos: list[bytes], capacity: float, seed: int) -> Outcome:
    """What becomes of a period's arrivals."""
    arrivals: list[float] = []
    for cycle in range(CYCLES):
        start_s = cycle * (CALM_S + BURST_S)
        arrivals += poisson(CALM * capacity, CALM_S, seed, start_s=start_s)
        arrivals += poisson(BURST * capacity, BURST_S, seed, start_s=start_s + CALM_S)
    return await play(server.port, photos, BUDGET_MS, arrivals)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def soak(server: Running, photos: list[bytes], seconds: float, tally: Tally) -> list[Sample]:
    samples: list[Sample] = []
    process, started, requests = psutil.Process(server.process.pid), time.monotonic(), 0
    while (elapsed_s := time.monotonic() - started) < seconds:
        before_s = cpu_s(process)
        capacity, gauged = asyncio.run(saturate(server.port, photos, 1, GAUGE_S))
        gauged_s = cpu_s(process) - before_s
        outcome = asyncio.run(arrive(server, photos, capacity, seed=len(samples)))
        requests += gauged.sent + outcome.sent
        # Who was himself held still for longer than connections are kept finds some of them closed.
        lost = gauged.unforeseen + outcome.unforeseen if outcome.lag_s < LATE_S else 0
        tally.requests(gauged.sent + outcome.sent, lost=lost)
        assert lost == 0, (gauged.statuses, outcome.statuses)
        time.sleep(0.3)  # the server sees that our connections are closed
        sample = Sample(
            at_s=elapsed_s,
            requests=requests,
            memory_mib=process.memory_info().rss / 2**20,
            descriptors=process.num_fds(),
            threads=process.num_threads(),
            throughput=capacity,
            cpu_ms=1000 * gauged_s / gauged.sent,
            attainment=outcome.met / max(1, outcome.sent + outcome.unsent),
            lag_s=outcome.lag_s,
        )
        samples.append(sample)
        print(json.dumps(asdict(sample)), flush=True)
    return samples


def test_nothing_grows_and_nothing_slows_down(photos: list[bytes], tally: Tally, tmp_path: Path) -> None:
    with serving_apart(tmp_path / "log") as server:
        samples = soak(server, photos, 60 * MINUTES, tally)
    found = trends(samples)
    print(json.dumps(asdict(found)))
    assert complaints(found) == []
    tally.rss_slope(found.mib)
    seen = (
        f"{samples[-1].requests:,} requests, {found.attainment:.1%} answered in time at the median sample; "
        f"{found.mib:+.3f} MiB and {found.descriptors:+.3f} descriptors per 10,000; from the first to the last of "
        f"{found.num_samples} samples throughput {-found.slower:+.1%}, attainment {-found.sinking:+.1%}"
    )
    tally.no_fault(f"{MINUTES:g} minutes at 80 % with bursts", seen)


def test_a_server_that_leaks_is_found_out(photos: list[bytes], tally: Tally, tmp_path: Path) -> None:
    with serving_apart(tmp_path / "log", command=("-c", LEAKING_SERVER)) as server:
        found = trends(soak(server, photos, 60, tally), warm_up=1000)
    print(json.dumps(asdict(found)))
    told = " ".join(complaints(found))
    for grown in (
        "memory grows",
        "descriptors grow",
        "threads grow",
        "more of the processor",
        "throughput fell",
        "attainment fell",
    ):
        assert grown in told, told
