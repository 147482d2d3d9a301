"""Policies beside each other: the same requests, in turns, paired one by one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from server.bench import compare as compare_module
from server.bench.compare import available_cpus, compare_policies, order_of_play, pinned
from server.bench.records import Records, joined
from server.bench.summary import gains
from tests.unit.bench_server import (
    NAN,
    PHOTOS,
    FakeServer,
    answer,
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
