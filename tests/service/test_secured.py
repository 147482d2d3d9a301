"""HTTPS, client certificates, API keys, a rate and other origins: all of it on, over a real socket."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import trustme

from server.api_keys import line_for, new_key
from tests.service.service_process import serving

pytestmark = pytest.mark.service


@dataclass(frozen=True)
class Secured:
    """A server on all of it, and what a client needs to reach it."""

    url: str
    trusting: ssl.SSLContext
    known: ssl.SSLContext
    key: str
    busy_key: str
    log: Path

    def client(self, *, known: bool = True, key: str | None = None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, verify=self.known if known else self.trusting, headers=headers)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder, ca, key, busy_key = tmp_path_factory.mktemp("secured"), trustme.CA(), new_key(), new_key()
    issued = ca.issue_cert("127.0.0.1")
    issued.cert_chain_pems[0].write_to_path(folder / "cert.pem")
    issued.private_key_pem.write_to_path(folder / "key.pem")
    ca.cert_pem.write_to_path(folder / "ca.pem")
    (folder / "keys").write_text(f"{line_for('alice', key)}\n{line_for('bob', busy_key)}\n")
    trusting, known = ssl.create_default_context(), ssl.create_default_context()
    for context in (trusting, known):
        ca.configure_trust(context)
    ca.issue_cert("client").configure_cert(known)
    with serving(
        folder / "log",
        TLS_CERT=str(folder / "cert.pem"),
        TLS_KEY=str(folder / "key.pem"),
        TLS_CLIENT_CA=str(folder / "ca.pem"),
        API_KEYS_FILE=str(folder / "keys"),
        RATE_LIMIT="20/minute",
        CORS_ORIGINS="https://app.example",
    ) as running:
        site = Secured(f"https://127.0.0.1:{running.port}", trusting, known, key, busy_key, folder / "log")
        with site.client() as http:
            running.wait_until(lambda: http.get("/readyz").status_code == 200)
        yield site


def test_who_has_certificate_and_key_is_answered(secured: Secured, photos: list[bytes]) -> None:
    with secured.client(key=secured.key) as http:
        reply = http.post("/v1/classify", content=photos[0], headers={"Origin": "https://app.example"})
        assert reply.status_code == 200, reply.text
        assert reply.headers["Access-Control-Allow-Origin"] == "https://app.example"


def test_who_asks_too_often_is_told_when_to_come_back(secured: Secured) -> None:
    with secured.client(key=secured.busy_key) as http:
        replies = [http.get("/v1/model") for _ in range(30)]
    assert {reply.status_code for reply in replies[:20]} == {200}
    assert replies[-1].status_code == 429
    assert 1 <= int(replies[-1].headers["Retry-After"]) <= 3


def test_who_has_no_key_is_not(secured: Secured, photos: list[bytes]) -> None:
    with secured.client() as http:
        assert http.post("/v1/classify", content=photos[0]).status_code == 401
        assert http.get("/v1/settings").status_code == 401
    with secured.client(key=new_key()) as http:
        assert http.post("/v1/classify", content=photos[0]).status_code == 403
    assert secured.key not in secured.log.read_text()


def test_who_has_no_certificate_is_not_even_heard(secured: Secured) -> None:
    with secured.client(known=False) as http, pytest.raises(httpx.TransportError):
        http.get("/livez")
    with httpx.Client() as http, pytest.raises(httpx.TransportError):
        http.get(secured.url.replace("https", "http") + "/livez")
