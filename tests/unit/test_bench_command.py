"""The command ``scala-serve bench``: what it tells, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from PIL import Image

from server.bench.command import address, bench
from tests.unit.bench_server import (
    FakeServer,
    answer,
    serving,
)


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
    monkeypatch.setattr("server.bench.summary.MAX_LAG_MS", 10_000.0)
    cats = {(data / f"val/cat/{i}.png").read_bytes() for i in range(2)}
    fake = FakeServer(lambda body, headers: answer(0 if body in cats else 1))
    files = {"plot": tmp_path / "p.png", "save_records": tmp_path / "r.npz"}
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
    assert all(file.stat().st_size > 100 for file in files.values())


def test_json_stands_alone_where_asked(
    data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.bench.summary.MAX_LAG_MS", 10_000.0)
    fake = FakeServer(lambda body, headers: answer(0))
    with serving(fake):
        bench(data=data, rate=100, seconds=0.1, url=f"http://127.0.0.1:{fake.port}", only_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["runs"]


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
