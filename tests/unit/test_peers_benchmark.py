"""The benchmark of servers: its arithmetic, what it refuses, and that a bare handler answers in each of its forms."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.dated_file import Setting
from benchmarks.instant_server import InstantEngine
from benchmarks.peer_apps.bare_fastapi import FORMS, make_app
from benchmarks.peer_apps.classifier import Classifier, Options
from benchmarks.peer_load import Turn, turn_of
from benchmarks.peer_report import BARE, LIT, OURS, Overhead, Report, Row, as_json, markdown, ratio, table
from benchmarks.peer_servers import Contender, Running, started
from scala_model.width import Width
from tests.unit.toy import png, write_toy

NARROW, WIDE = Width(0.5), Width(1)


def turns(*rates: float, failed: int = 0) -> list[Turn]:
    return [Turn(rate, failed, 2.0, 10.0, 20.0) for rate in rates]


def report() -> Report:
    return Report(
        engine="fast 1",
        device="A chip",
        overhead=Overhead([0.5, 0.75, 0.625], [1.5, 4.0, 2.0]),
        rows=[
            Row(NARROW, OURS, "", "fixed", {}, turns(200, 300, 100)),
            Row(NARROW, BARE, "1", "sync", {"inline": 50.0, "sync": 60.0}, turns(100, 100, 100)),
            Row(NARROW, LIT, "not installed", "", {}, []),
            Row(WIDE, OURS, "", "fixed", {}, turns(50, 50, 50)),
            Row(WIDE, BARE, "1", "sync", {}, turns(40, 50, 100, failed=1)),
            Row(WIDE, LIT, "not installed", "", {}, []),
        ],
    )


def test_a_ratio_is_the_median_of_the_rounds() -> None:
    rows = report()
    assert ratio(rows.row(NARROW, OURS), rows.row(NARROW, BARE)) == 2.0  # of 2, 3 and 1
    assert ratio(rows.row(WIDE, OURS), rows.row(WIDE, BARE)) == 1.0  # of 1.25, 1 and 0.5
    assert ratio(rows.row(WIDE, OURS), rows.row(WIDE, LIT)) is None


def test_the_line_of_json_is_of_the_narrowest_width_and_invents_no_number() -> None:
    told = json.loads(json.dumps(as_json(report())))
    assert (told["overhead_p50_ms"], told["overhead_p99_ms"]) == (0.625, 2.0)
    assert (told["ratio_fastapi"], told["ratio_litserve"]) == (2.0, None)
    assert told["rows"][2] == {"width": 0.5, "server": LIT, "version": "not installed"}
    assert told["rows"][4] | {} == told["rows"][4] | {"rate": 50.0, "failed": 3, "rates": [40.0, 50.0, 100.0]}


def test_the_table_and_the_file_say_what_is_not_installed() -> None:
    heading, *lines = table(report())
    assert {len(line) for line in lines} == {len(heading)}
    assert lines[2] == ["0.5", LIT, "not installed", *["–"] * 6]
    setting = Setting("2026-11-23", "python", "abc", "a machine", {"numpy": "2"}, "a network")
    text = markdown(report(), setting, rounds=3, seconds=4)
    assert "| 0.5 | LitServe | not installed | – |" in text
    assert "inline: 50/s, sync: 60/s" in text
    assert "commit abc" in text


def test_what_failed_is_no_answer() -> None:
    line = '{"requests": 100, "seconds": 2.0, "failed": 20, "p50_ms": 1.5, "p99_ms": 3.0}'
    turn = turn_of(line, cpu_s=0.5)
    assert (turn.rate, turn.failed, turn.cpu_ms) == (40.0, 20, 5.0)
    with pytest.raises(ValueError, match="none of 20 requests"):
        turn_of(line.replace("100", "20"), cpu_s=0.5)


def test_without_wrk_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda program: None)
    with pytest.raises(SystemExit):
        peers.main([])
    assert "apt-get install wrk" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["ray", "django=python3", "ray=/no/such/python"])
def test_an_interpreter_that_cannot_be_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match="give NAME=INTERPRETER, with one of fastapi, litserve, bentoml, ray"):
        peers._interpreters([given])


def test_a_package_that_is_missing_has_no_version() -> None:
    assert peers._version(sys.executable, "no_such_package") is None
    assert peers._version(sys.executable, "pytest") == pytest.__version__


def test_a_server_that_ends_is_told_of() -> None:
    contender = Contender("it", "so", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(RuntimeError, match=r"it \(so\) does not serve"), started(contender, b""):
        pass


def num_stopped(running: Running) -> int:
    return [each.status() for each in running.processes()].count(psutil.STATUS_STOPPED)


def test_halting_holds_the_children_too() -> None:
    child = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = f"import subprocess; p = subprocess.Popen({child!r}); print('up', flush=True); p.wait()"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        running = Running(process.pid, 0, "/")
        assert num_stopped(running) == 0
        running.halt()
        until = time.monotonic() + 30  # a process stops when it gets a core next
        while num_stopped(running) < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert num_stopped(running) == 2
        running.go_on()
        assert num_stopped(running) == 0
        assert running.cpu_s() > 0
    finally:
        for each in Running(process.pid, 0, "/").processes():
            each.kill()
        process.communicate()


class Fake(Classifier):
    """Its classes' scores are the pixels' first row."""

    def __init__(self) -> None:
        self._labels, self._width = tuple("abcdef"), WIDE

    def decode(self, body: bytes) -> NDArray[np.uint8]:  # type: ignore[override]
        return np.frombuffer(body, np.uint8)

    def run(self, images: Sequence[NDArray[np.uint8]]) -> Any:
        return np.stack(images).astype(np.float32) / 100


@pytest.mark.parametrize("form", FORMS)
def test_a_bare_handler_answers_in_each_of_its_forms(form: str) -> None:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(Fake(), form))
        async with httpx.AsyncClient(transport=transport, base_url="http://it") as client:
            return await client.post("/classify", content=bytes(range(1, 7)), headers={"Content-Type": "image/jpeg"})

    reply = asyncio.run(ask())
    assert reply.status_code == 200
    assert [best["label"] for best in reply.json()["predictions"]] == list("fedcb")
    assert reply.json()["predictions"][0] == {"class_id": 5, "label": "f", "score": 0.06}


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ValueError, match="give one of inline, thread, sync"):
        make_app(Fake(), "async")


def test_the_instant_engine_answers_with_probabilities() -> None:
    rows = InstantEngine(10).run(np.zeros((3, 4, 4, 3), np.uint8), WIDE)
    assert rows.shape == (3, 10)
    assert rows.sum(-1) == pytest.approx(1)


def test_all_servers_run_our_engine_and_decoder(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    checkpoint = write_toy(tmp_path)
    words = f"--checkpoint {checkpoint} --width 0.5 --port 1 --max-batch 2"
    classifier = Classifier(Options.parse(words.split()))
    pixels = classifier.decode(png(7))
    one, other = classifier.run([pixels, pixels])
    assert one == pytest.approx(other, abs=1e-3)
    assert classifier.answer(one)["predictions"][0]["class_id"] == int(one.argmax())
