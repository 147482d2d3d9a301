"""Secrets stay out of all that a server writes, and administration out of its callers' reach."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from server.api_keys import line_for, new_key
from tests.service.service_process import Running, free_port, serving

pytestmark = pytest.mark.service
UPGRADE = (
    "GET /v1/model HTTP/1.1\r\nHost: here\r\nConnection: Upgrade, close\r\nUpgrade: websocket\r\n"
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    "Authorization: Bearer {key}\r\n\r\n"
)
PASSWORD = "hunter2-of-the-tls-key"


@dataclass(frozen=True)
class Keeper:
    """A server that has secrets, and all that it has written."""

    running: Running
    key: str
    log: Path


@pytest.fixture
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keeper]:
    folder, key = tmp_path_factory.mktemp("keeper"), new_key()
    (folder / "keys").write_text(line_for("alice", key))
    with serving(
        folder / "log",
        API_KEYS_FILE=str(folder / "keys"),
        LOG_LEVEL="debug",
        ACCESS_LOG="on",
        DECISION_LOG=str(folder / "decisions"),
        DRAIN_GRACE_S="0",
    ) as running:
        running.wait_ready()
        yield Keeper(running, key, folder / "log")


def ask_raw(port: int, request: str) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(request.encode("latin-1"))
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode("latin-1")


def test_a_key_is_written_nowhere_even_at_debug_level(keeper: Keeper, photos: list[bytes]) -> None:
    """A WebSocket library would log all headers of a request that asks for it. The server ends with this test."""
    http, headers = keeper.running.http, {"Authorization": f"Bearer {keeper.key}"}
    assert http.post("/v1/classify", content=photos[0], headers=headers).status_code == 200
    assert http.post("/v1/classify", content=b"no image", headers=headers).status_code == 415
    assert http.get("/v1/settings", headers=headers).status_code == 200
    assert ask_raw(keeper.running.port, UPGRADE.format(key=keeper.key)).startswith("HTTP/1.1 200 ")
    assert ask_raw(keeper.running.port, UPGRADE.format(key="another")).startswith("HTTP/1.1 403 ")
    keeper.running.process.terminate()  # a server that has left has written all it had to say
    assert keeper.running.process.wait(timeout=60) == 0
    assert keeper.log.read_text().count("INFO scala.access: answered") >= 5, "the requests did leave lines"
    assert (keeper.log.parent / "decisions").stat().st_size > 0
    for path in keeper.log.parent.rglob("*"):
        assert not path.is_file() or keeper.key.encode() not in path.read_bytes(), path


def write_certificate(folder: Path) -> trustme.CA:
    """``cert.pem`` and ``key.pem``, which is encrypted."""
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), password=None)
    encryption = serialization.BestAvailableEncryption(PASSWORD.encode())
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(pem, pkcs8, encryption))
    return ca


@pytest.mark.parametrize("source", ["file", "environment"])
def test_the_password_of_the_tls_key_is_told_to_nobody(source: str, tmp_path: Path) -> None:
    """Nor to ``ps``, by the server or what it starts: there is no flag for it, and none is passed on."""
    ca, trusting = write_certificate(tmp_path), ssl.create_default_context()
    ca.configure_trust(trusting)
    (tmp_path / "scala.toml").write_text(f'tls_key_password = "{PASSWORD}"\n')
    given: dict[str, Any] = (
        {"CONFIG": str(tmp_path / "scala.toml")} if source == "file" else {"TLS_KEY_PASSWORD": PASSWORD}
    )
    with (
        serving(
            tmp_path / "log",
            TLS_CERT=str(tmp_path / "cert.pem"),
            TLS_KEY=str(tmp_path / "key.pem"),
            LOG_LEVEL="debug",
            DRAIN_GRACE_S="0",
            **given,
        ) as running,
        httpx.Client(base_url=f"https://127.0.0.1:{running.port}", verify=trusting) as http,
    ):
        running.wait_until(lambda: http.get("/readyz").status_code == 200)
        told = [http.get(path).text for path in ("/v1/settings", "/metrics", "/openapi.json", "/docs", "/v1/nothing")]
        server = psutil.Process(running.process.pid)
        told += [" ".join(each.cmdline()) for each in (server, *server.children(recursive=True))]
        running.process.terminate()
        assert running.process.wait(timeout=60) == 0
    assert '"tls_key_password":"**********"' in told[0]
    assert "ready" in (log := (tmp_path / "log").read_text())
    assert not [text for text in (*told, log) if PASSWORD in text]


def test_administration_listens_at_an_address_of_its_own(tmp_path: Path, photos: list[bytes]) -> None:
    port = free_port()
    with (
        serving(tmp_path / "log", ADMIN_ADDRESS=f"127.0.0.2:{port}") as running,
        httpx.Client(base_url=f"http://127.0.0.2:{port}") as admin,
    ):
        running.wait_ready()
        assert running.http.post("/v1/classify", content=photos[0]).status_code == 200
        for path in ("/", "/docs", "/metrics", "/v1/settings", "/v1/events", "/v2/models/stats"):
            assert running.http.get(path).status_code == 404, path
        assert 'scala_requests_total{route="/v1/classify",status="200"} 1.0' in admin.get("/metrics").text
        assert admin.get("/v1/settings").json()["admin_address"] == f"127.0.0.2:{port}"
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port), timeout=5)
        running.process.terminate()
        assert running.process.wait(timeout=60) == 0


def test_an_address_that_is_taken_ends_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with serving(tmp_path / "log", ADMIN_ADDRESS=f"127.0.0.1:{port}") as running:
            assert running.process.wait(timeout=60) == 1
    assert "admin_address: " in (tmp_path / "log").read_text()
