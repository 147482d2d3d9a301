"""Playing a workload: what is sent, when, and what is entered of the answers."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import closing

import numpy as np
import pytest

from server.bench import play as play_module
from server.bench.client import Client, Reply, open_loop, until
from server.bench.photos import Photos
from server.bench.play import increase, play_once, read_counters, run
from server.bench.summary import Summary
from tests.unit.bench_server import (
    CLASSES,
    PHOTOS,
    FakeServer,
    answer,
    http,
    load_of,
    no_progress,
    played,
    serving,
)


def test_each_arrival_is_one_request_with_its_own_image_and_budget() -> None:
    fake = FakeServer(lambda body, headers: answer(0, width=0.75))
    shown: list[tuple[int, str]] = []
    workload = load_of([0.0, 0.02, 0.04], [5000, 6000, 0.01], [0, 1, 0])
    with serving(fake):
        found = run(play_once(Client(fake.port), workload, PHOTOS, lambda *progress: shown.append(progress)))
    (records,) = found.rounds
    asked = {float(headers["x-latency-budget-ms"]): body for body, headers in fake.requests}
    assert asked == {5000: b"image of a cat", 6000: b"image of a dog", 0.01: b"image of a cat"}
    assert records.status.tolist() == [200, 200, 200]
    assert records.width.tolist() == [0.75] * 3
    assert records.correct.tolist() == [True, False, True]
    assert records.in_time.tolist() == [True, True, False], "the last budget is 10 microseconds"
    assert found.counters == {'scala_batch_size_bucket{le="2.0"}': 3, 'scala_budget_total{outcome="met"}': 7}
    assert shown[-1][0] == 3
    assert "in time" in shown[-1][1]


def test_a_slow_server_does_not_hold_up_those_who_come_later() -> None:
    fake = FakeServer(lambda body, headers: answer(0), delay_s=0.15)
    records = played(fake, load_of([0.0, 0.01, 0.02, 0.03], [100, 5000, 100, 5000]))
    assert fake.num_connections == 4, "all were open at once"
    assert (records.latency_s >= 0.15).all()
    assert records.in_time.tolist() == [False, True, False, True]
    assert records.correct.all(), "late, but right"
    assert records.effective.tolist() == [False, True, False, True]


def test_connections_are_used_again() -> None:
    async def main(port: int) -> None:
        with closing(Client(port)) as client:
            for _ in range(3):  # each ends when its request was answered
                await play_module.play(client, load_of([0.0], [5000]), PHOTOS, no_progress)

    fake = FakeServer(lambda body, headers: answer(0))
    with serving(fake):
        run(main(fake.port))
    assert (len(fake.requests), fake.num_connections) == (3, 1)


def test_refusals_and_errors_are_entered_as_such() -> None:
    by_budget = {"5000": answer(0), "5001": (429, {}), "5002": (504, {}), "5003": (422, {})}
    fake = FakeServer(lambda body, headers: by_budget[headers["x-latency-budget-ms"]])
    records = played(fake, load_of([0.0, 0.01, 0.02, 0.03], [5000, 5001, 5002, 5003]))
    assert records.status.tolist() == [200, 429, 504, 422]
    assert records.admitted.tolist() == [True, False, True, False]
    assert np.isnan(records.width[1:]).all()
    assert records.in_time.tolist() == [True, False, False, False]


def test_who_gets_no_answer_has_a_miss_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play_module, "PATIENCE_S", 0.05)
    silent = FakeServer(lambda body, headers: answer(0), delay_s=1.0)
    records = played(silent, load_of([0.0, 0.01], [50, 40]))
    assert records.status.tolist() == [0, 0]
    assert np.isnan(records.latency_s).all()
    assert not np.isnan(records.lag_s).any(), "they did leave"
    nonsense = FakeServer(lambda body, headers: answer(0), raw=b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    assert played(nonsense, load_of([0.0], [50])).status.tolist() == [0]


def test_so_many_wait_at_once_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(play_module, "MAX_OPEN", 3)
    fake = FakeServer(lambda body, headers: answer(0), delay_s=0.5)
    records = played(fake, load_of([0.0, 0.01, 0.02, 0.03, 0.04], [5000] * 5))
    assert records.status.tolist() == [200, 200, 200, 0, 0]
    assert records.unsent.tolist() == [False, False, False, True, True]
    assert Summary.of(records, {}).unsent == 2
    assert len(fake.requests) == 3


def test_a_request_that_was_held_up_tells_how_late_it_left() -> None:
    """The second request blocks everything for 40 ms, and the third is due 10 ms after it."""
    fake = FakeServer(lambda body, headers: answer(0))
    workload = load_of([0.0, 0.1, 0.11], [5000] * 3)
    encode = PHOTOS.encoded.__getitem__

    class Blocking(dict[int, bytes]):
        calls = 0

        def __missing__(self, image: int) -> bytes:
            self.calls += 1
            if self.calls == 2:
                time.sleep(0.04)
            return encode(image)

    blocking = Photos(Blocking(), PHOTOS.labels, CLASSES)
    lag_s = played(fake, workload, blocking).lag_s
    assert (lag_s >= 0).all()
    assert 0.03 <= lag_s[2] < 1


def test_waiting_ends_on_time_and_lets_others_run_even_when_it_is_late() -> None:
    async def main() -> tuple[float, list[str]]:
        seen: list[str] = []
        asyncio.get_running_loop().call_soon(seen.append, "another task")
        await until(time.monotonic() - 1)
        due = time.monotonic() + 0.03
        await until(due)
        return time.monotonic() - due, seen

    late_s, seen = run(main())
    assert 0 <= late_s < 0.02
    assert seen == ["another task"]


def test_an_open_loop_tells_how_late_each_left() -> None:
    async def main(port: int) -> list[Reply]:
        client = Client(port)
        replies = await open_loop(client, [b"a", b"b"], {"X-Latency-Budget-Ms": "100"}, [0.0, 0.01, 0.02])
        client.close()
        return replies

    fake = FakeServer(lambda body, headers: answer(0))
    fake.reply = lambda path, body, headers: _echo(body)  # type: ignore[method-assign]
    with serving(fake):
        replies = run(main(fake.port))
    assert [reply.json() for reply in replies] == ["a", "b", "a"]
    assert all(0 <= reply.lag_s < 1 for reply in replies)


async def _echo(body: bytes) -> bytes:
    return http(200, json.dumps(body.decode()).encode())


def test_counters_are_read_with_their_labels_and_compared() -> None:
    text = (
        "# TYPE scala_requests_total counter\n"
        'scala_requests_total{route="/v1/classify",status="200"} 5.0\n'
        'scala_batch_size_bucket{le="+Inf"} 4.0\nscala_batch_size_sum 5.0\n'
        "scala_requests_created 1.7e+09\nscala_queue_depth 3.0\npython_gc_total 9.0\nscala_plain_total 2.5\n"
    )

    class Metrics(Client):
        async def get(self, path: str) -> Reply:
            return Reply(200, {}, text.encode(), 0.0)

    before = asyncio.run(read_counters(Metrics(0)))
    assert before == {
        'scala_requests_total{route="/v1/classify",status="200"}': 5.0,
        'scala_batch_size_bucket{le="+Inf"}': 4.0,
        "scala_plain_total": 2.5,
    }
    assert increase(before, before | {"scala_plain_total": 4.0, "scala_new_total": 1.0}) == {
        "scala_new_total": 1.0,
        "scala_plain_total": 1.5,
    }


def test_a_server_of_other_classes_is_refused() -> None:
    fake = FakeServer(lambda body, headers: answer(0))
    strangers = Photos({0: b""}, np.array([0]), ["cat", "bird"])
    with serving(fake), pytest.raises(ValueError, match="other classes than the model toy: give those it was"):
        run(play_once(Client(fake.port), load_of([0.0], [50]), strangers, no_progress))
    assert fake.requests == []
