"""``scala-serve classify``: what it sends, what it shows of answers and errors, and how it ends."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from server.cli import main

Answer = tuple[int, object]


class Sent(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes


class FakeServer(ThreadingHTTPServer):
    """Answers by ``reply``, a function of the body; keeps what was sent, and how many requests were there at once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.sent: list[Sent] = []
        self.reply: Callable[[bytes], Answer] = lambda body: (200, answer(body.decode()))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        server = self.server
        assert isinstance(server, FakeServer)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server.sent.append(Sent(self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        status, content = server.reply(body)
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: Any) -> None: ...


def answer(*labels: str, accuracy: float | None = 0.31) -> dict[str, object]:
    predictions = [{"class_id": i, "label": label, "score": 0.9 / (i + 1)} for i, label in enumerate(labels)]
    timing = {"decode": 0.1, "queue": 0.2, "inference": 3.0, "total": 4.25}
    return {
        "predictions": predictions,
        "width": 0.5,
        "expected_accuracy": accuracy,
        "budget_met": True,
        "timing_ms": timing,
    }


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def rows(self) -> list[list[str]]:
        return [[cell.strip() for cell in line.split("│")[1:-1]] for line in self.out.splitlines() if "│" in line]


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def run(fake: FakeServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the command in this process, by default with the fake server's address."""
    for name in [name for name in os.environ if name.startswith("SCALA_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object, url: str | None = None) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main(["classify", *map(str, arguments), "--url", url or fake.url])
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two images, one of them in a folder of the folder; a text is no image. Their bytes are their labels."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.jpg").write_text("bus")
    (tmp_path / "sub" / "a.PNG").write_text("cat")
    (tmp_path / "notes.txt").write_text("none")
    return tmp_path


def test_a_folders_images_are_asked_about_and_shown(run: Any, fake: FakeServer, photos: Path) -> None:
    outcome = run(photos)
    assert outcome.code == 0
    assert outcome.rows == [
        [str(photos / "b.jpg"), "bus", "0.900", "0.5", "0.310", "4.2", "yes"],
        [str(photos / "sub" / "a.PNG"), "cat", "0.900", "0.5", "0.310", "4.2", "yes"],
    ]
    assert {sent.body for sent in fake.sent} == {b"bus", b"cat"}
    assert {sent.path for sent in fake.sent} == {"/v1/classify?top_k=1"}
    for sent in fake.sent:
        assert not sent.headers.keys() & {"x-latency-budget-ms", "x-min-accuracy", "x-width", "authorization"}


def test_what_is_asked_for_is_sent(run: Any, fake: FakeServer, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wishes = ("--budget-ms", 120.5, "--min-accuracy", 0.25, "--width", 0.75, "--top-k", 2, "--api-key", "k-1")
    fake.reply = lambda body: (200, answer("cat", "lynx", accuracy=None))
    outcome = run(photos / "notes.txt", *wishes)
    (sent,) = fake.sent
    assert sent.path == "/v1/classify?top_k=2"
    assert (
        sent.headers.items()
        >= {
            "x-latency-budget-ms": "120.5",
            "x-min-accuracy": "0.25",
            "x-width": "0.75",
            "authorization": "Bearer k-1",
        }.items()
    )
    assert [row[1:5] for row in outcome.rows] == [["cat", "0.900", "0.5", "–"], ["lynx", "0.450", "", ""]]
    monkeypatch.setenv("SCALA_API_KEY", "from-environment")
    run(photos / "notes.txt")
    assert fake.sent[-1].headers["authorization"] == "Bearer from-environment"


def test_json_stands_alone_in_the_order_of_the_files(run: Any, fake: FakeServer, photos: Path) -> None:
    def reply(body: bytes) -> Answer:
        return (200, answer("cat")) if body == b"cat" else (429, {"status": 429, "detail": "Too many."})

    fake.reply = reply
    outcome = run(photos, photos / "missing.jpg", "--json")
    assert outcome.code == 1
    (line,) = outcome.out.splitlines()
    found = json.loads(line)
    refused, cat, missing = found.pop("results")
    assert found == {"answered": 1, "failed": 2}
    assert refused == {"file": str(photos / "b.jpg"), "error": {"status": 429, "detail": "Too many."}}
    assert cat == {"file": str(photos / "sub" / "a.PNG"), **answer("cat")}
    assert missing["error"] == {"detail": "cannot be read: No such file or directory"}


def test_files_can_be_told_apart_on_a_narrow_terminal(
    run: Any, fake: FakeServer, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert "".join(row[0] for row in run(photos).rows) == f"{photos / 'b.jpg'}{photos / 'sub' / 'a.PNG'}"


def test_errors_stand_in_the_table(run: Any, fake: FakeServer, photos: Path) -> None:
    replies: dict[bytes, Answer] = {b"bus": (502, b"<h1>Bad gateway</h1>"), b"cat": (422, {"detail": "Damaged."})}
    fake.reply = lambda body: replies[body]
    outcome = run(photos)
    assert outcome.code == 1
    assert [row[1] for row in outcome.rows] == ["502: what answers is no scala-serve", "422: Damaged."]
    fake.reply = lambda body: (200, {"hello": "world"})
    assert run(photos / "b.jpg").rows[0][1] == "200: what answers is no scala-serve"


def test_a_server_that_is_not_there(run: Any, photos: Path) -> None:
    outcome = run(photos / "b.jpg", url="http://127.0.0.1:9")
    assert outcome.code == 1
    assert "gives no answer: " in outcome.rows[0][1]
    assert "refused" in outcome.rows[0][1]


def test_hostile_names_and_labels_are_text(run: Any, fake: FakeServer, tmp_path: Path) -> None:
    hostile = tmp_path / "[red]x\x1b[2J.jpg"
    hostile.write_text("x")
    fake.reply = lambda body: (200, answer("[bold]cat\n\x1b[31m"))
    outcome = run(hostile)
    assert outcome.rows[0][:2] == [str(tmp_path / r"[red]x\x1b[2J.jpg"), r"[bold]cat\n\x1b[31m"]
    assert "\x1b" not in outcome.out


def test_no_more_requests_at_a_time_than_asked_for(run: Any, fake: FakeServer, tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.png").write_text(str(i))
    inside, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(3)

    def reply(body: bytes) -> Answer:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        together.wait(5)
        with lock:
            inside -= 1
        return 200, answer(body.decode())

    fake.reply = reply
    outcome = run(tmp_path, "--concurrency", 3)
    assert outcome.code == 0
    assert most == 3
    assert [row[1] for row in outcome.rows] == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "Missing argument"),
        (("x.jpg", "--budget-ms", "0"), "Invalid value for '--budget-ms'"),
        (("x.jpg", "--min-accuracy", "31"), "Invalid value for '--min-accuracy'"),
        (("x.jpg", "--api-key", "a\nb"), "--api-key holds a character that no key has"),
    ],
)
def test_wrong_usage_ends_with_2(run: Any, fake: FakeServer, arguments: tuple[str, ...], sentence: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert sentence in outcome.err
    assert "a\nb" not in outcome.err
    assert not fake.sent


def test_a_folder_without_images_and_a_wrong_address(run: Any, tmp_path: Path) -> None:
    outcome = run(tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith(f"scala-serve: {tmp_path} holds no image: ")
    for url in ("127.0.0.1:8000", "ftp://x", "http://", "http://x/?a=1", "http://x:y"):
        outcome = run(tmp_path / "x.jpg", url=url)
        assert outcome == Outcome(2, "", f"scala-serve: --url is {url!r}; it must look like http://127.0.0.1:8000\n")
