"""Ten times what the widest width serves: whoever cannot be served hears so at once, and when it is over it is over.

Twenty seconds, or as many as ``OVERLOAD_SECONDS`` says (``make soak``: sixty).
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from pathlib import Path

from benchmarks.heavier import EXTRA_DEPTH, MLP_FACTOR, heavier
from scala_model.checkpoint import default_checkpoint
from tests.chaos.conftest import Tally
from tests.chaos.load import Outcome, play, poisson, saturate, serving_apart
from tests.service.service_process import Running

SECONDS = float(os.environ.get("OVERLOAD_SECONDS", "20"))
TIMES, BUDGET_MS = 10, 200
CALM_S, EVERY_S = 5.0, 0.05  # after it, one request at a time
# All below hold with room on a core of the server's own. Neighbours take it for tenths of a second, now and then.
REFUSED_S = 0.05  # 99 in 100 refusals, at the server; measured 0.005 alone, 0.02 beside others
RECOVERED_S = 2.0  # measured 0.8
# The clock of a budget begins when the event loop reads a request, and while it has only half a core it is behind by up
# to a second at first, until enough are refused. So many may be later than that beyond their budget, as callers see it.
LATE_S, SETTLED_S = 0.05, 4.0
LATE_SHARE, LATE_AT_FIRST = 0.03, 0.25  # of those sent after it has settled, measured 0.003; and before, 0.1


def test_ten_times_too_much_is_refused_at_once_and_then_forgotten(
    photos: list[bytes], tally: Tally, tmp_path: Path
) -> None:
    """The network is heavy enough that a client in Python can send ten times what the device serves."""
    heavier(default_checkpoint(), tmp_path / "heavier", mlp_factor=MLP_FACTOR, extra_depth=EXTRA_DEPTH)
    with serving_apart(tmp_path / "log", CHECKPOINT=str(tmp_path / "heavier")) as server:
        capacity, _ = asyncio.run(saturate(server.port, photos, 1, 2))
        before = refusals(server)
        outcome = asyncio.run(play(server.port, photos, BUDGET_MS, poisson(TIMES * capacity, SECONDS, seed=0)))
        recovery_s = narrow_for(server, photos[0])
        refused_s = p99(before, refusals(server))
    tally.requests(outcome.sent, lost=outcome.unforeseen)
    seen = told(outcome, refused_s)
    print(f"{capacity:.0f}/s at full width; {seen}; wide again after {recovery_s:.2f} s; {outcome.statuses}")
    print(f"late: {late_share(outcome, 0, SETTLED_S):.4f} at first, then {late_share(outcome, SETTLED_S, SECONDS):.4f}")
    tally.fault(f"{TIMES} times what the widest width serves, for {SECONDS:g} s", seen, recovery_s)
    assert outcome.unforeseen == 0
    assert outcome.unsent <= 0.01 * outcome.sent, "or it was not ten times as much"
    assert set(outcome.statuses) <= {200, 429, 504}
    assert outcome.met > SECONDS * capacity / 2, "it goes on answering, narrower"
    assert refused_s <= REFUSED_S
    assert late_share(outcome, 0, SETTLED_S) <= LATE_AT_FIRST
    assert late_share(outcome, SETTLED_S, SECONDS) <= LATE_SHARE
    assert recovery_s < RECOVERED_S


def late_share(outcome: Outcome, begin_s: float, end_s: float) -> float:
    """Of the answers to what was sent in between."""
    took = [seconds for sent_s, seconds in outcome.latencies_s if begin_s <= sent_s < end_s]
    return sum(seconds > BUDGET_MS / 1000 + LATE_S for seconds in took) / len(took)


def narrow_for(server: Running, photo: bytes) -> float:
    """Seconds from now until the last request that was not answered at full width, of one caller who asks on."""
    started, narrow_s = time.monotonic(), 0.0
    while (elapsed_s := time.monotonic() - started) < CALM_S:
        reply = server.http.post("/v1/classify", content=photo, headers={"X-Latency-Budget-Ms": f"{BUDGET_MS}"})
        if reply.status_code != 200 or reply.json()["width"] < 1:
            narrow_s = elapsed_s
        time.sleep(EVERY_S)
    return narrow_s


def refusals(server: Running) -> dict[float, float]:
    """Refusals on arrival by the time they took at most, so far."""
    metrics = server.http.get("/metrics").text
    found = re.findall(r'scala_stage_duration_seconds_bucket{le="(.+?)",stage="refusal"} (\S+)', metrics)
    return {float(bound): float(count) for bound, count in found}


def p99(before: dict[float, float], after: dict[float, float]) -> float:
    """The least bound, in seconds, within which 99 in 100 refusals were."""
    counts = {bound: count - before.get(bound, 0) for bound, count in after.items()}
    return min(bound for bound, count in counts.items() if count >= 0.99 * counts[float("inf")])


def told(outcome: Outcome, refused_s: float) -> str:
    statuses = outcome.statuses
    return (
        f"{outcome.met / outcome.sent:.0%} answered in time, {statuses[429] / outcome.sent:.0%} refused (429), "
        f"99 in 100 of them within {1000 * refused_s:g} ms, {statuses[504]} ended at their deadline (504)"
    )
