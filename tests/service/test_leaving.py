"""A real server that is told to leave while it starts, and while clients still upload: who was let in is answered."""

from __future__ import annotations

import signal
import socket
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.service.service_process import Running, serving

pytestmark = pytest.mark.service
SIGTERM_CAUGHT = 1 << (signal.SIGTERM - 1)


class Upload:
    """A request whose body the client sends in pieces, as a slow one does."""

    def __init__(self, port: int, num_bytes: int, *headers: str, version: str = "1.1") -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        head = [f"POST /v1/classify HTTP/{version}", "Host: it", f"Content-Length: {num_bytes}", *headers, "", ""]
        self.send("\r\n".join(head).encode())

    def send(self, piece: bytes) -> None:
        self._socket.sendall(piece)

    def read(self) -> bytes:
        """What has come, at least a byte; nothing once the server has closed the connection."""
        return self._socket.recv(1 << 16)

    def close(self) -> None:
        self._socket.close()


def test_an_upload_that_began_before_the_grace_ended_is_served(photos: list[bytes], tmp_path: Path) -> None:
    with serving(tmp_path / "log", DRAIN_GRACE_S="0.3") as running:
        running.wait_ready()
        with closing(Upload(running.port, len(photos[0]))) as slow:
            slow.send(photos[0][:100])
            time.sleep(0.2)
            running.process.send_signal(signal.SIGTERM)
            running.wait_until(lambda: running.http.post("/v1/classify", content=photos[0]).status_code == 503)
            slow.send(photos[0][100:])
            assert slow.read().startswith(b"HTTP/1.1 200 ")
        assert running.process.wait(timeout=20) == 0


def test_a_refusal_reaches_a_client_that_goes_on_uploading(tmp_path: Path) -> None:
    with serving(tmp_path / "log") as running:
        running.wait_ready()
        running.process.send_signal(signal.SIGTERM)
        running.wait_until(lambda: running.http.get("/readyz").status_code == 503)
        check_refused_in_the_middle(running)


@pytest.mark.parametrize(("version", "header"), [("1.0", "Accept: */*"), ("1.1", "Connection: close")])
def test_so_it_does_where_the_client_wants_the_connection_closed(server: Running, version: str, header: str) -> None:
    """As proxies do by default that speak HTTP/1.0 to servers."""
    check_refused_in_the_middle(server, header, version=version)


def check_refused_in_the_middle(running: Running, *headers: str, version: str = "1.1") -> None:
    """A connection that the server closed would be reset by what comes after that."""
    with closing(Upload(running.port, 1_000_000, "X-Latency-Budget-Ms: 0.001", *headers, version=version)) as upload:
        upload.send(bytes(100_000))
        answer = upload.read()
        assert answer.startswith(b"HTTP/1.1 422 ")
        assert b"\r\nconnection: close\r\n" in answer.lower()
        for _ in range(9):
            time.sleep(0.02)
            upload.send(bytes(100_000))
        while piece := upload.read():
            answer += piece
        assert answer.endswith(b"}")


def test_an_upload_that_is_not_through_by_the_drain_timeout_is_told_so(tmp_path: Path) -> None:
    with serving(tmp_path / "log", DRAIN_GRACE_S="0.1", DRAIN_TIMEOUT_S="2") as running:
        running.wait_ready()
        with closing(Upload(running.port, 1_000_000, "X-Latency-Budget-Ms: 600000")) as slow:
            slow.send(bytes(1000))
            time.sleep(0.2)
            running.process.send_signal(signal.SIGTERM)
            answer = slow.read()
            while piece := slow.read():
                answer += piece
        assert running.process.wait(timeout=20) == 0
    head, _, body = answer.lower().partition(b"\r\n\r\n")
    assert head.startswith(b"http/1.1 503 ")
    for line in (b"connection: close", b"content-type: application/problem+json", b"x-content-type-options: nosniff"):
        assert line in head
    assert b"the server had to leave before the request was answered: draining; try again." in body
    assert b"x-request-id: " in head
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log


def test_a_signal_during_the_start_is_heard(tmp_path: Path) -> None:
    """The first process of a container ignores a signal for which it has no handler."""
    with serving(tmp_path / "log") as running:
        status = Path(f"/proc/{running.process.pid}/status")
        running.wait_until(lambda: caught_signals(status) & SIGTERM_CAUGHT != 0)
        assert not (tmp_path / "log").read_text(), "it imports still"
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=5) == 0


def test_a_server_that_is_not_ready_leaves_without_a_grace(tmp_path: Path) -> None:
    with serving(tmp_path / "log", DRAIN_GRACE_S="25") as running:
        running.wait_until(lambda: running.http.get("/readyz").status_code == 503)
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(timeout=20) == 0


def caught_signals(status: Path) -> int:
    (mask,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("SigCgt"))
    return int(mask, 16)
