"""The benchmark of one replica: medians of rounds, what it shows of them, and what it refuses."""

from __future__ import annotations

import pytest

from benchmarks import capacity
from benchmarks.capacity import HEADING, Measured, Row, table
from benchmarks.peer_load import Turn


def row() -> Row:
    turns = [Turn(300, 0, 1, 10, 30), Turn(100, 2, 1, 20, 90), Turn(200, 1, 1, 60, 40)]
    return Row(2, "0.5", turns, {"1": {"p50": 0.5, "p99": 1.25}})


def test_a_row_is_the_median_of_its_rounds() -> None:
    heading, cells = table([row()])
    assert dict(zip(heading, cells, strict=True)) == {
        "cores": "2",
        "width": "0.5",
        "requests/s": "200",
        "least–most": "100–300",
        "p50 / p99 ms": "20 / 40",
        "batch of 1, p50 / p99 ms": "0.50 / 1.25",
        "of 16": "not measured",
        "failed": "3",
    }
    assert heading == HEADING


def test_the_line_of_json_holds_every_round_and_the_memory() -> None:
    told = Measured([row()], {2: 274.4}).as_json()
    assert told["memory_mib"] == {"2": 274}
    assert (told["rows"][0]["rate"], len(told["rows"][0]["turns"])) == (200, 3)
    assert Measured([], {2: 274.4}).sentences() == ["Resident with 2 cores: 274 MiB at most."]


@pytest.mark.parametrize("wrong", [["--cores", "0"], ["--cores", "1", "1"], ["--cores", "5000"], ["--rounds", "0"]])
def test_what_makes_no_sense_is_refused(wrong: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name)
    with pytest.raises(SystemExit) as refusal:
        capacity.main(wrong)
    assert refusal.value.code == 2


def test_without_wrk_it_says_where_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit):
        capacity.main([])
    assert "apt-get install wrk" in capsys.readouterr().err
