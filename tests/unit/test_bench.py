"""The load generator against a server of a few lines: what it sends, when, what it counts, and what it refuses."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from PIL import Image

from server.bench import compare as compare_module
from server.bench import play as play_module
from server.bench.client import Client, Reply, open_loop, until
from server.bench.command import address, bench
from server.bench.compare import available_cpus, compare_policies, order_of_play, pinned
from server.bench.photos import Photos
from server.bench.play import Played, increase, play, play_once, read_counters, run
from server.bench.plot import plot_run, run_figure
from server.bench.records import Records, joined, save
from server.bench.summary import Quantile, Summary, gains, quantile, table
from server.simulation.workload import Workload

CLASSES = ["cat", "dog"]
Answer = tuple[int, dict[str, Any]]
Answers = Callable[[bytes, dict[str, str]], Answer]  # of an image and a request's headers, in lower case


def load_of(arrivals_s: Sequence[float], budgets_ms: Sequence[float], images: Sequence[int] | None = None) -> Workload:
    count = len(arrivals_s)
    numbers = np.zeros(count, np.int64) if images is None else np.array(images)
    return Workload("by hand", np.array(arrivals_s, float), np.array(budgets_ms) / 1000, numbers)


PHOTOS = Photos({0: b"image of a cat", 1: b"image of a dog"}, np.array([0, 1]), CLASSES)


def answer(class_id: int, width: float = 0.5, *, met: bool = True) -> Answer:
    return 200, {"predictions": [{"class_id": class_id}], "width": width, "budget_met": met}


# -- a server


class FakeServer:
    """Answers with what it is told, after a while, on a loop in a thread of its own. ``requests`` are those it got."""

    def __init__(self, answers: Answers, delay_s: float = 0.0, *, raw: bytes | None = None) -> None:
        self.answers, self.delay_s, self.raw = answers, delay_s, raw
        self.requests: list[tuple[bytes, dict[str, str]]] = []
        self.connections: set[asyncio.Task[None]] = set()
        self.num_connections = self.num_scrapes = self.port = 0

    async def serve(self, ready: threading.Event, done: asyncio.Event) -> None:
        server = await asyncio.start_server(self.connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        ready.set()
        await done.wait()
        server.close()
        for connection in self.connections:
            connection.cancel()
        await asyncio.gather(*self.connections, return_exceptions=True)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.connections.add(task)
        self.num_connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                pairs = (line.split(": ", 1) for line in head[1:] if line)
                headers = {name.lower(): value for name, value in pairs}
                body = await reader.readexactly(int(headers["content-length"]))
                writer.write(self.raw or await self.reply(head[0].split()[1], body, headers))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            writer.close()

    async def reply(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        if path == "/v1/model":
            return http(200, json.dumps({"name": "toy", "classes": CLASSES}).encode())
        if path == "/metrics":
            self.num_scrapes += 1
            return http(200, f'# HELP x\nscala_budget_total{{outcome="met"}} {7 * self.num_scrapes}.0\n'.encode())
        assert path == "/v1/classify?top_k=1"
        self.requests.append((body, headers))
        await asyncio.sleep(self.delay_s)
        status, content = self.answers(body, headers)
        return http(status, json.dumps(content).encode())


def http(status: int, body: bytes) -> bytes:
    return (
        f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    )


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(fake.serve(ready, done),), daemon=True)
    thread.start()
    assert ready.wait(5)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join(5)
        loop.close()


def no_progress(num_sent: int, text: str) -> None:
    pass


def played(fake: FakeServer, workload: Workload, photos: Photos = PHOTOS) -> Records:
    async def main() -> Records:
        with closing(Client(fake.port)) as client:
            return await play(client, workload, photos, no_progress)

    with serving(fake):
        return run(main())


# -- playing


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
    assert found.counters == {'scala_budget_total{outcome="met"}': 7}
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
    fake = FakeServer(lambda body, headers: answer(0))
    played(fake, load_of([0.1 * i for i in range(4)], [5000] * 4))
    assert fake.num_connections < 4


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
    assert np.isnan(records.lag_s).tolist() == [False, False, False, True, True]
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
        "scala_requests_created 1.7e+09\nscala_queue_depth 3.0\npython_gc_total 9.0\nscala_plain_total 2.5\n"
    )

    class Metrics(Client):
        async def get(self, path: str) -> Reply:
            return Reply(200, {}, text.encode(), 0.0)

    before = asyncio.run(read_counters(Metrics(0)))
    assert before == {'scala_requests_total{route="/v1/classify",status="200"}': 5.0, "scala_plain_total": 2.5}
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


# -- figures


def records_of(
    status: Sequence[int],
    latency_ms: Sequence[float],
    budgets_ms: Sequence[float],
    correct: Sequence[int],
    width: Sequence[float],
    met: Sequence[int],
) -> Records:
    count = len(status)
    return Records(
        load_of([0.1 * (i + 1) for i in range(count)], budgets_ms),
        np.full(count, 0.0005),
        np.array(latency_ms) / 1000,
        np.array(status),
        np.array(width, float),
        np.array(correct, bool),
        np.array(met, bool),
    )


NAN = math.nan
HAND_MADE = records_of(
    #            right  late  wrong  shed  impossible  expired  lost  right
    status=[200, 200, 200, 429, 422, 504, 0, 200],
    latency_ms=[50, 120, 60, 3, 2, 105, NAN, 90],
    budgets_ms=[100, 100, 100, 100, 100, 100, 100, 90],
    correct=[1, 1, 0, 0, 0, 0, 0, 1],
    width=[1.0, 0.5, 0.5, NAN, NAN, NAN, NAN, 1.0],
    met=[1, 1, 1, 0, 0, 0, 0, 1],
)


def test_every_arrival_counts() -> None:
    summary = Summary.of(HAND_MADE, {})
    assert summary.requests == 8
    assert summary.rate == pytest.approx(10)
    assert summary.attainment == 3 / 8  # the last one came exactly in its budget
    assert summary.attainment_server == 4 / 8
    assert summary.attainment_admitted == 3 / 6
    assert summary.effective_accuracy == 2 / 8
    assert summary.mean_width == 0.75
    assert summary.widths == {0.5: 2, 1.0: 2}
    assert summary.statuses == {0: 1, 200: 4, 422: 1, 429: 1, 504: 1}
    assert summary.late == 1
    assert summary.latency_p50_ms is not None
    assert summary.latency_p50_ms.value == pytest.approx(60)
    assert summary.latency_p99_ms is not None
    assert summary.latency_p99_ms.value == pytest.approx(120)
    assert summary.latency_p99_ms.low == pytest.approx(90), "three of four lie below the p99 in 99.9 of 100 samples"
    assert summary.latency_p99_ms.high is None, "four are too few"
    assert summary.refusal_p99_ms is not None
    assert summary.refusal_p99_ms.value == pytest.approx(3)
    assert summary.wasted_engine_share is None
    # Wilson of 2 in 8, worked by hand with z = 1.96: centre (0.25 + 0.2401) / 1.4802, half 1.96 / 1.4802 x 0.2163
    assert summary.effective_accuracy_ci95 == pytest.approx((0.0715, 0.5907), abs=2e-4)


def test_engine_time_is_wasted_by_the_servers_own_count() -> None:
    counters = {'scala_engine_seconds_total{use="wasted"}': 1.0, 'scala_engine_seconds_total{use="answered"}': 4.0}
    assert Summary.of(HAND_MADE, counters).wasted_engine_share == 0.2


def test_a_run_without_answers_has_figures_too() -> None:
    nothing = records_of([429], [2.0], [100], [0], [NAN], [0])
    summary = Summary.of(nothing, {})
    assert (summary.attainment, summary.effective_accuracy) == (0, 0)
    assert (summary.attainment_admitted, summary.mean_width, summary.latency_p99_ms) == (None, None, None)
    assert "–" in table({"a": summary})[6]


def test_the_line_of_json_holds_every_figure_as_numbers() -> None:
    found = json.loads(json.dumps(Summary.of(HAND_MADE, {}).as_json(), allow_nan=False))
    assert found["attainment"] == 0.375
    assert found["statuses"] == {"0": 1, "200": 4, "422": 1, "429": 1, "504": 1}
    assert found["latency_p99_ms"] == {"value": 120.0, "low": 90.0, "high": None}
    assert found["lag_p99_ms"]["value"] == 0.5
    assert found["on_schedule"] is True


@pytest.mark.parametrize(
    ("lag_ms", "rate", "on_schedule"), [(0.9, 100, True), (1.1, 100, False), (1.9, 1200, True), (2.1, 1200, False)]
)
def test_late_requests_make_a_run_void(lag_ms: float, rate: float, on_schedule: bool) -> None:
    records = Records.blank(load_of([(i + 1) / rate for i in range(100)], [50] * 100))
    records.lag_s[:] = 0.0001
    records.lag_s[97:] = lag_ms / 1000
    assert Summary.of(records, {}).on_schedule is on_schedule
    records.lag_s[98] = 0.0001
    assert Summary.of(records, {}).on_schedule is on_schedule, "the p99 of a hundred is the last but one"
    records.lag_s[97:99] = 0.0001
    assert Summary.of(records, {}).on_schedule


def test_a_quantile_is_bounded_by_order_statistics() -> None:
    """For ten values the median lies from the second to the ninth: the sign test's 97.9 % interval."""
    assert quantile(np.arange(10.0, 0, -1), 0.5) == Quantile(5.0, 2.0, 9.0)
    assert quantile(np.array([]), 0.5) is None
    fewer, enough = (quantile(np.arange(1.0, 1 + count), 0.99) for count in (367, 368))
    assert fewer is not None
    assert fewer.high is None
    assert enough is not None
    assert enough.high == 368, "0.99^368, the chance that all lie below the p99, is just below 2.5 %"


def test_the_bounds_of_a_p99_hold_it_as_often_as_they_say() -> None:
    rng, truth, held = np.random.default_rng(0), -math.log(0.01), 0
    for _ in range(400):
        found = quantile(rng.exponential(size=1000), 0.99)
        assert found is not None
        assert found.low is not None
        held += found.low <= truth <= (math.inf if found.high is None else found.high)
    assert held / 400 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)
    assert held / 400 < 0.995, "nor are they wider than needed"


# -- pairing


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
    def fake_process(policy: str, cpus: Sequence[int]) -> Iterator[int]:
        started.append((policy, cpus))
        with serving(fakes[policy]) as fake:
            yield fake.port

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
    assert found["right"].counters == {'scala_budget_total{outcome="met"}': 14}
    assert (shown[-1][0], shown[-1][1].partition(":")[0]) == (12, "right"), "the second round goes backwards"
    assert sorted(available_cpus()) == cpus, "this process may go anywhere again"


def test_pinning_ends_where_it_began() -> None:
    before = available_cpus()
    with pinned([min(before)]):
        assert available_cpus() == {min(before)}
    assert available_cpus() == before


def test_a_server_that_does_not_start_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare_module, "POLL_EVERY_S", 0.01)
    monkeypatch.setenv("SCALA_PORTT", "1")
    sentence = "the server with policy 'fixed:1' ended with exit code 2: it says why above"
    with pytest.raises(ValueError, match=sentence), compare_module.serving("fixed:1", sorted(available_cpus())):
        pass
    assert "SCALA_PORTT is unknown" in capfd.readouterr().err


# -- files


def test_records_are_kept_as_they_are(tmp_path: Path) -> None:
    save(tmp_path / "run.npz", HAND_MADE)
    with np.load(tmp_path / "run.npz") as kept:
        assert kept["status"].tolist() == HAND_MADE.status.tolist()
        assert kept["arrivals_s"] == pytest.approx(HAND_MADE.workload.arrivals_s)
        assert set(kept) >= {"budgets_s", "images", "lag_s", "latency_s", "width", "correct", "met"}


def test_the_picture_shows_a_run_over_time(tmp_path: Path) -> None:
    count = 600
    records = Records.blank(load_of([0.1 * (i + 1) for i in range(count)], [100] * count))
    records.status[:] = 200
    records.latency_s[:] = 0.05
    records.width[:300], records.width[300:] = 1.0, 0.25
    records.correct[:] = True
    records.status[300:310] = 429
    figure = run_figure(records, "a run")
    mix, latency, attainment, accuracy = figure.axes
    legend = mix.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["0.25", "1", "none"]
    p50 = np.asarray(latency.lines[0].get_ydata(), float)
    assert np.nanmin(p50) == np.nanmax(p50) == pytest.approx(50)
    shares: NDArray[np.float64] = np.asarray(attainment.lines[0].get_ydata(), float)
    assert shares.min() < 20 < 100 == shares.max()
    assert accuracy.get_xlabel() == "time of arrival (s)"
    plot_run(tmp_path / "a.png", records, "a run")
    plot_run(tmp_path / "b.png", records, "a run")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# -- the command


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two validation images of each of two classes; their bytes tell them apart."""
    for name, shade in (("cat", 10), ("dog", 200)):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (8, 8), shade + i).save(tmp_path / "val" / name / f"{i}.png")
    return tmp_path


def test_the_command_plays_judges_and_tells(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.bench.summary.MAX_LAG_MS", 1000.0)
    cats = {(data / f"val/cat/{i}.png").read_bytes() for i in range(2)}
    fake = FakeServer(lambda body, headers: answer(0 if body in cats else 1))
    files = {"plot": tmp_path / "p.png", "json_file": tmp_path / "j.json", "save_records": tmp_path / "r.npz"}
    with serving(fake):
        bench(data=data, rate=200, seconds=0.2, budgets="5000", url=f"http://127.0.0.1:{fake.port}", **files)  # type: ignore[arg-type]
    out, err = capsys.readouterr()
    line = out.splitlines()[-1]
    found = json.loads(line)
    (figures,) = found["runs"].values()
    assert (figures["attainment"], figures["effective_accuracy"]) == (1.0, 1.0)
    assert figures["requests"] == len(fake.requests) > 20
    assert figures["counters"] == {'scala_budget_total{outcome="met"}': 7.0}
    assert found["gains"] == {}
    assert "effective accuracy, all" in out
    assert "in time" in err
    assert files["json_file"].read_text() == line + "\n"
    assert all(file.stat().st_size > 100 for file in files.values())


def test_the_command_fails_when_requests_left_late(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.bench.summary.MAX_LAG_MS", 0.0)
    fake = FakeServer(lambda body, headers: answer(0))
    with serving(fake), pytest.raises(typer.Exit) as ended:
        bench(data=data, rate=100, seconds=0.1, url=f"http://127.0.0.1:{fake.port}")
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1])["runs"][f"127.0.0.1:{fake.port}"]["on_schedule"] is False
    assert "requests left late, p99" in err
    assert "where 0 ms are allowed: keep a core free" in err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"url": "http://10.0.0.1:8000"}, "--url is 'http://10.0.0.1:8000', on another machine: add --remote"),
        ({"url": "http://example.org"}, "on another machine: add --remote if you may load it"),
        ({"url": "https://127.0.0.1"}, "it must look like http://127.0.0.1:8000, without TLS or a path"),
        ({"url": "http://127.0.0.1:80000"}, "it must look like http://127.0.0.1:8000"),
        ({"url": "http://127.0.0.1/v1/classify"}, "without TLS or a path"),
        ({"compare": "adaptive", "url": "http://127.0.0.1"}, "--compare starts its own servers: leave out --url"),
        ({"compare": "adaptive,adaptive"}, "--compare is 'adaptive,adaptive'; it must be different policies"),
        ({"compare": "adaptive", "server_cpus": "x"}, "--server-cpus is 'x'; it must be some of"),
        ({"server_cpus": "0"}, "--server-cpus is for the servers of --compare"),
        ({"plot": Path("/nowhere/p.png")}, r"/nowhere/p.png cannot be written: there is no folder /nowhere"),
        ({"arrivals": "sometimes"}, "arrivals 'sometimes' are unknown"),
        ({"data": Path("/nowhere")}, "no val images in /nowhere"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_sentence(data: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        bench(**{"data": data, "rate": 10.0, "seconds": 0.1, **options})


def test_loopback_is_allowed_and_the_rest_on_request() -> None:
    assert address("http://127.0.0.1:8000", remote=False) == ("127.0.0.1", 8000)
    assert address("http://localhost", remote=False) == ("localhost", 80)
    assert address("http://[::1]:9000/", remote=False) == ("::1", 9000)
    assert address("http://10.0.0.1:8000", remote=True) == ("10.0.0.1", 8000)


def test_rounds_of_one_policy_alone_have_no_rival() -> None:
    assert gains({"alone": Played(hits([1, 0]), {}).rounds}) == {}
