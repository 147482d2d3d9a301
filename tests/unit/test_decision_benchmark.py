"""The benchmark of decisions: situations that a server could be in, and a report that can be read."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from itertools import islice

import pytest

from benchmarks import decision
from server.policies.adaptive import Adaptive
from server.policies.deadlines import lanes_in_time, lanes_of
from server.types import Load
from tests.unit.situations import ALL, PROFILE, WIDE

LOAD = Load(arrival_rate=50.0, hop_s=0.001, respond_s=0.002)


@pytest.mark.parametrize("kinds", [[ALL], [ALL, ALL, (WIDE,)]])
def test_everybody_in_a_situation_would_have_been_let_in(kinds: decision.Kinds) -> None:
    drawn = list(islice(decision.situations(kinds, LOAD, PROFILE, 20, random.Random(0)), 10))
    for queue in drawn:
        assert len(queue.due) == len(queue.widths) == 20
        lanes, sizes = lanes_of(queue.widths, LOAD, PROFILE)
        assert lanes_in_time(queue.due, lanes, 0.003, sizes)
        assert queue.kinds == Counter(queue.widths)
        assert set(queue.widths) <= set(kinds)
    again = list(islice(decision.situations(kinds, LOAD, PROFILE, 20, random.Random(0)), 10))
    assert drawn == again


def test_each_situation_counts_once() -> None:
    drawn = decision.situations([ALL], LOAD, PROFILE, 5, random.Random(0))
    taken_us, hurried = decision.measure(Adaptive(), drawn, LOAD, PROFILE, 7, 3)
    assert (len(taken_us), hurried) == (7, 1.0), "without a plan every decision is a hurried one"
    assert all(us > 0 for us in taken_us)


def test_the_last_line_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decision, "MACHINES", ("cpu",))
    monkeypatch.setattr(decision, "RATES", (1.0,))
    monkeypatch.setattr(sys, "argv", ["decision", "--waiting", "5", "--situations", "3", "--repeats", "1"])
    decision.main()
    *table, last = capsys.readouterr().out.splitlines()
    told = json.loads(last)
    assert (told["waiting"], told["situations"]) == (5, 3)
    assert told["decisions"].keys() == {"cpu, uniform, 1x", "cpu, mixed, 1x"}
    assert all(entry["p99_us"] >= entry["median_us"] > 0 for entry in told["decisions"].values())
    assert len(table) == 3
