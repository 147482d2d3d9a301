"""The soak's judgement, on made-up samples."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from tests.chaos.judgement import Sample, complaints, trends

CHANCE = Random(0)
SOUND = [
    Sample(
        at_s=10.0 * i,
        requests=10_000 + 4000 * i,
        memory_mib=250.0 + CHANCE.random(),
        descriptors=20 + i % 3,
        threads=24,
        throughput=400 * (0.9 + 0.2 * CHANCE.random()),
        cpu_ms=2.0,
        attainment=0.9 + 0.1 * CHANCE.random(),
        lag_s=0.01,
    )
    for i in range(180)
]


def test_a_server_that_stays_as_it_is_may_go_on() -> None:
    assert complaints(trends(SOUND)) == []
    assert complaints(trends(SOUND[:16])) == []


@pytest.mark.parametrize(
    ("lost", "told"),
    [
        ({"throughput": 0.35}, "throughput fell"),
        ({"attainment": 0.25}, "attainment fell"),
        ({"cpu_ms": -0.5}, "more of the processor"),
    ],
)
def test_what_is_lost_over_half_an_hour_is_found(lost: dict[str, float], told: str) -> None:
    worse = [
        replace(sample, **{name: getattr(sample, name) * (1 - share * place / 180) for name, share in lost.items()})
        for place, sample in enumerate(SOUND)
    ]
    assert told in " ".join(complaints(trends(worse)))


def test_a_server_that_is_late_all_along_is_found() -> None:
    late = [replace(sample, attainment=0.7) for sample in SOUND]
    assert complaints(trends(late)) == ["only 70.0% were answered in time"]
