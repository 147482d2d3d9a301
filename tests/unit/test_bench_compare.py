"""Policies beside each other: the same requests, in turns, paired one by one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from server.bench import compare as compare_module
from server.bench.compare import Running, available_cpus, compare_policies, order_of_play, pinned, urgent
from server.bench.play import run
from server.bench.records import Records, joined
from server.bench.summary import gains
from server.settings import Settings
from tests.unit.bench_server import (
    NAN,
    PHOTOS,
    FakeServer,
    answer,
    http,
    load_of,
    records_of,
    serving,
)


def hits(*effective: Sequence[int]) -> list[Records]:
    """Rounds in which the requests with a 1 were answered correctly and in time."""
    return [
        records_of([200] * len(r), [10] * len(r), [50] * len(r), r, [1.0] * len(r), [1] * len(r)) for r in effective
    ]


def test_policies_are_paired_request_by_request() -> None:
    """Over 200 requests ``ours`` gains 30 and loses 10: d has mean 0.1; the two added ones make it n = 202."""
    ours = [1] * 30 + [0] * 10 + [1] * 160
    other = [0] * 30 + [1] * 10 + [1] * 160
    found = gains({"ours": hits(ours), "other": hits(other)})
    mean = 20 / 202
    half = 1.959964 * math.sqrt((42 / 202 - mean**2) / 202)
    assert found == {"other": pytest.approx((0.1, mean - half, mean + half))}


def test_rounds_of_one_policy_alone_have_no_rival() -> None:
    assert gains({"alone": hits([1, 0])}) == {}


def test_a_request_counts_once_however_many_the_rounds() -> None:
    a, b = [1, 1, 0, 0] * 25, [0, 1, 0, 0] * 25
    once = gains({"a": hits(a), "b": hits(b)})["b"]
    twice = gains({"a": hits(a, a), "b": hits(b, b)})["b"]
    assert twice == pytest.approx(once)
    half = gains({"a": hits(a, b), "b": hits(b, b)})["b"]
    assert half[0] == pytest.approx(once[0] / 2)


def test_rounds_are_joined_in_time() -> None:
    one = records_of([200, 429], [10, 1], [50, 50], [1, 0], [1.0, NAN], [1, 0])
    both = joined([one, one])
    assert both.workload.arrivals_s == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert both.status.tolist() == [200, 429, 200, 429]
    assert both.effective.tolist() == [True, False, True, False]


def test_everyone_takes_turns_every_other_round_backwards() -> None:
    assert order_of_play(["a", "b", "c"], 3) == ["a", "b", "c", "c", "b", "a", "a", "b", "c"]


def test_all_policies_play_the_same_on_servers_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = FakeServer(lambda body, headers: answer(0)), FakeServer(lambda body, headers: answer(1))
    fakes = {"right": right, "wrong": wrong}
    started: list[tuple[str, Sequence[int]]] = []

    @contextmanager
    def fake_process(policy: str, cpus: Sequence[int]) -> Iterator[Running]:
        started.append((policy, cpus))
        with serving(fakes[policy]) as fake:
            yield Running(fake.port, 1)

    monkeypatch.setattr(compare_module, "serving", fake_process)
    monkeypatch.setattr(compare_module, "REST_S", 0.0)
    shown: list[tuple[int, str]] = []
    cpus = sorted(available_cpus())
    found = compare_policies(
        ["right", "wrong"],
        load_of([0.01, 0.02, 0.03], [5000] * 3),
        PHOTOS,
        num_rounds=2,
        server_cpus=cpus[:1],
        progress=lambda *told: shown.append(told),
    )
    assert started == [("right", cpus[:1]), ("wrong", cpus[:1])]
    assert [sum(one.effective.sum() for one in found[name].rounds) for name in ("right", "wrong")] == [6, 0]
    assert [len(fake.requests) for fake in (right, wrong)] == [6, 6]
    assert found["right"].counters == {
        'scala_batch_size_bucket{le="2.0"}': 6,
        'scala_budget_total{outcome="met"}': 14,
    }
    assert (shown[-1][0], shown[-1][1].partition(":")[0]) == (12, "right"), "the second round goes backwards"
    assert sorted(available_cpus()) == cpus, "this process may go anywhere again"


def test_pinning_ends_where_it_began() -> None:
    before = available_cpus()
    with pinned([min(before)]):
        assert available_cpus() == {min(before)}
    assert available_cpus() == before


def test_a_server_that_does_not_start_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_module, "POLL_EVERY_S", 0.01)
    monkeypatch.setenv("SCALA_CHECKPOINT", str(tmp_path))
    sentence = "the server with policy 'fixed:1' ended with exit code 2: it says why above"
    with pytest.raises(ValueError, match=sentence), compare_module.serving("fixed:1", sorted(available_cpus())):
        pass
    assert "config.json" in capfd.readouterr().err


def test_settings_that_are_wrong_start_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALA_PORTT", "1")
    with pytest.raises(ValueError, match="SCALA_PORTT is unknown"), compare_module.serving("fixed:1", [0]):
        pass


def test_each_policy_logs_its_decisions_into_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[str | None] = []

    def popen(command: Sequence[str], *, env: dict[str, str], stdout: int) -> Any:
        folders.append(env.get("SCALA_DECISION_LOG"))
        return SimpleNamespace(pid=7, kill=lambda: None, wait=lambda: None)

    async def warm(*told: object) -> None:
        pass

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(compare_module, "_warm", warm)
    for log in ("", str(tmp_path)):
        monkeypatch.setenv("SCALA_DECISION_LOG", log)
        for policy in ("adaptive", "fixed:0.5"):
            with compare_module.serving(policy, sorted(available_cpus())) as server:
                assert server.pid == 7
    assert folders == ["", "", f"{tmp_path}/adaptive", f"{tmp_path}/fixed-0.5"]


# -- until a server is warm


class Growing(FakeServer):
    """A server that has measured what ``stages`` say, a step on with each look at its card and the last for ever:
    the largest batch of each of two widths, or nothing while it is not ready."""

    def __init__(self, *stages: tuple[int, int] | None, gpu_bytes: int = 0) -> None:
        super().__init__(lambda body, headers: answer(0))
        self.stages, self.gpu_bytes = list(stages), gpu_bytes

    async def reply(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        if path == "/metrics":
            return http(200, f"scala_gpu_memory_bytes {self.gpu_bytes}.0\n".encode())
        if path == "/readyz":
            ready = self.stages[0] is not None
            if not ready:
                self.stages.pop(0)
            return http(200 if ready else 503, b"{}")
        largest = self.stages.pop(0) if len(self.stages) > 1 else self.stages[0]
        assert largest is not None
        widths = [{"latency_ms": {str(2**k): 1.0 for k in range(9) if 2**k <= size}} for size in largest]
        return http(200, json.dumps({"widths": widths}).encode())


def looks_until_warm(fake: Growing, monkeypatch: pytest.MonkeyPatch, max_batch: int | None = None) -> float:
    """Seconds that it took."""
    monkeypatch.setattr(compare_module, "POLL_EVERY_S", 0.001)
    process: Any = SimpleNamespace(poll=lambda: None)
    started = time.monotonic()
    with serving(fake):
        run(compare_module._warm(process, fake.port, Settings(max_batch=max_batch)))
    return time.monotonic() - started


def test_a_server_is_warm_once_every_width_has_its_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long one of them takes, and however even they are meanwhile."""
    for stages, gpu_bytes, max_batch in (
        ([None, None, (1, 0), (8, 8), (8, 8), (8, 8), (16, 8), (16, 16)], 0, None),
        ([(16, 16), (16, 16), (256, 128), (256, 256)], 10**9, None),
        ([(2, 2), (4, 2), (4, 4)], 0, 4),
    ):
        fake = Growing(*stages, gpu_bytes=gpu_bytes)
        assert looks_until_warm(fake, monkeypatch, max_batch) < 20, "and does not wait for what cannot come"
        assert fake.stages == stages[-1:]


def test_a_width_without_memory_is_not_waited_for_any_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "SETTLED_S", 0.05)
    assert looks_until_warm(Growing((16, 4)), monkeypatch) >= 0.05
    monkeypatch.setattr(compare_module, "TIMEOUT_S", 0.2)
    with pytest.raises(TimeoutError, match=r"the server with policy 'adaptive' was not warm in 0\.2 s"):
        looks_until_warm(Growing((16, 0)), monkeypatch)


def test_a_sender_is_urgent_only_while_it_sends_and_starts_nothing_urgent() -> None:
    if not hasattr(os, "sched_getscheduler"):
        pytest.skip("this system has no schedulers to choose from")
    before = os.sched_getscheduler(0)
    with urgent() as permitted:
        if not permitted:
            pytest.skip("this user may not run at real-time priority")
        assert os.sched_getscheduler(0) & os.SCHED_RR
        ask = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]
        child = subprocess.run(ask, capture_output=True, text=True, check=True)
    assert int(child.stdout) == os.SCHED_OTHER
    assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == before & ~os.SCHED_RESET_ON_FORK
