"""The benchmark of quotes against a running server: what it asks for, and what it refuses."""

from __future__ import annotations

import json

import pytest

from benchmarks.quote import live, main
from server.bench.client import Client
from server.bench.play import run
from tests.unit.bench_server import FakeServer, answer, http, load_of, serving


class Quoting(FakeServer):
    """Quotes a chance of 0.9 and answers, or answers every question for a quote with ``status``."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(lambda body, headers: answer(0))
        self.status = status

    async def reply(self, path: str, body: bytes, headers: dict[str, str]) -> bytes:
        if path == "/v1/quote?budget_ms=50":
            quote = {"chance": 0.9, "expected_accuracy": 0.7} if self.status == 200 else {"title": "Unavailable"}
            return http(self.status, json.dumps(quote).encode())
        assert (path, headers["x-latency-budget-ms"]) == ("/v1/classify", "50")
        met = http(200, json.dumps({"expected_accuracy": 0.5}).encode())
        return met.replace(b"\r\n", b"\r\nx-budget-met: true\r\n", 1)


def test_each_request_is_asked_about_and_sent() -> None:
    with serving(Quoting()) as fake:
        quoted = run(live(Client(fake.port), load_of([0.0, 0.01], [50, 50])))
    assert quoted.chance.tolist() == [0.9, 0.9]
    assert quoted.success.tolist() == [True, True]
    assert (quoted.expected.tolist(), quoted.got.tolist()) == ([0.7, 0.7], [0.5, 0.5])


@pytest.mark.parametrize("status", [404, 503])
def test_a_server_without_quotes_is_told_of_in_one_sentence(status: int) -> None:
    sentence = rf"127.0.0.1:\d+ answers /v1/quote\?budget_ms=50 with {status}: give a scala-serve server that is ready"
    with serving(Quoting(status)) as fake, pytest.raises(ValueError, match=sentence):
        run(live(Client(fake.port), load_of([0.0, 0.01], [50, 50])))


def test_no_server_at_all_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Quoting()) as fake:
        port = fake.port
    with pytest.raises(SystemExit) as ended:
        main(["--live", f"http://127.0.0.1:{port}", "--seconds", "0.1"])
    assert ended.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
