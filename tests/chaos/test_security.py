"""Requests that name files, addresses and programs, or carry what a log or a header could be forged with.

The server runs under an audit hook: what it opens, connects to, starts and unpickles while strangers ask is seen.
"""

from __future__ import annotations

import base64
import json
import os
import pickle
import re
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.conftest import Tally
from tests.chaos.well import healthy_after
from tests.service.service_process import ROOT, Running, serving
from tests.unit.toy import write_toy

pytestmark = [pytest.mark.service, pytest.mark.slow]
ROUTES = str(ROOT / "server" / "routes")
MACHINE = ("/proc", "/sys")  # what the monitor reads, several times a second
ARRAY_HEAD = "(b\"{'descr': "
PLANNER = repr([sys.executable, "-P", "-m", "server.planner"])
FORGED = "1999-12-31 23:59:59,999 CRITICAL scala.serve: forged"
ESCAPES = f"a\r\n{FORGED}\r\nX-Injected: 1\x1b[2J\u2028\u202e\x85b"
QUOTED = "".join(f"%{byte:02x}" for byte in ESCAPES.encode())


class Payload:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@dataclass(frozen=True)
class Audited:
    """A server, what it did and what it wrote."""

    running: Running
    audit: Path
    log: Path
    log_format: str

    def ask(self, head: str, body: bytes = b"") -> tuple[int, list[str], bytes]:
        """Status, lines of the head and body of the answer to a request, whose head may be any bytes in latin-1."""
        given = f"{head}\r\nHost: here\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", self.running.port), timeout=30) as connection:
            connection.sendall(given.encode("latin-1") + body)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        top, _, content = answer.partition(b"\r\n\r\n")
        first, *lines = top.decode("latin-1").split("\r\n")
        return int(first.split(" ")[1]), lines, content

    def events(self) -> list[str]:
        return self.audit.read_text().splitlines()


@pytest.fixture
def audited(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Audited]:
    """At its most talkative, with a checkpoint whose name and labels are hostile, too."""
    monkeypatch.setenv("AUDIT", str(tmp_path / "audit"))
    path = write_toy(tmp_path / "toy") / "config.json"
    card = json.loads(path.read_text()) | {"name": ESCAPES}
    for entry in card["classes"]:
        entry["label"] = ESCAPES
    path.write_text(json.dumps(card))
    with serving(
        tmp_path / "log",
        command=("-m", "tests.chaos.audited_server"),
        CHECKPOINT=str(tmp_path / "toy"),
        LOG_FORMAT=request.param,
        LOG_LEVEL="debug",
        ACCESS_LOG="on",
    ) as running:
        running.wait_measured()
        yield Audited(running, tmp_path / "audit", tmp_path / "log", request.param)


def form(content: bytes, disposition: str, more: str = "") -> bytes:
    return (
        f"--x\r\nContent-Disposition: form-data; {disposition}\r\n{more}\r\n".encode("latin-1")
        + content
        + b"\r\n--x--\r\n"
    )


def tensor(*data: str, **parameters: object) -> bytes:
    return json.dumps(
        {
            "id": "file:///etc/passwd",
            "inputs": [
                {
                    "name": "image",
                    "datatype": "BYTES",
                    "shape": [len(data), 1],
                    "data": data,
                    "parameters": parameters,
                }
            ],
            "parameters": {"config": "/etc/passwd", "file:1/model.pt": "AAAA"},
        }
    ).encode()


def requests_that_name_things(named: str, infer: str, photo: bytes) -> Iterator[tuple[str, bytes]]:
    """Heads and bodies that name a path or an address wherever there is a place for one."""
    quoted = named.replace("/", "%2f").replace(".", "%2e")
    for folder in ("", "/docs/assets/", "/playground/", "/v2/models/", "/v1/"):
        for path in (named, quoted, f"../../../../../../../..{named}", f"..%2f..%2f..%2f..%2f..%2f..%2f..{quoted}"):
            yield f"GET {folder}/{path} HTTP/1.1", b""
    yield f"GET {named} HTTP/1.1" if "://" in named else f"GET file://{named} HTTP/1.1", b""
    for query in ("file", "url", "image", "top_k", "path"):
        yield f"POST /v1/classify?{query}={named} HTTP/1.1", photo
    for name in ("X-Request-Id", "Content-Location", "Link", "Referer", "X-Original-URL", "Forwarded", "traceparent"):
        yield f"POST /v1/classify HTTP/1.1\r\n{name}: {named}", photo
    yield "POST /v1/classify HTTP/1.1", named.encode()
    as_json = "POST /v1/classify HTTP/1.1\r\nContent-Type: application/json"
    for image in (named, f"data:text/plain,{named}", base64.b64encode(named.encode()).decode()):
        yield as_json, json.dumps({"images": [image]}).encode()
    yield as_json, json.dumps({"url": named}).encode()
    yield as_json, json.dumps({"images": [{"$ref": named}]}).encode()
    as_form = "POST /v1/classify HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x"
    for disposition in (f'name="file"; filename="{named}"', f"name=\"file\"; filename*=UTF-8''{quoted}"):
        yield as_form, form(photo, disposition)
    outside = f'Content-Type: message/external-body; access-type=local-file; name="{named}"\r\n'
    yield as_form, form(b"", 'name="file"; filename="a"', outside)
    yield as_form, form(named.encode(), 'name="file"')
    for data in (named, base64.b64encode(named.encode()).decode()):
        yield f"POST {infer} HTTP/1.1", tensor(data)
    yield f"POST {infer} HTTP/1.1", tensor("", shared_memory_region=named, shared_memory_byte_size=8)
    yield "POST /v2/repository/models/x/load HTTP/1.1", tensor(named)
    yield f"POST /v2/systemsharedmemory/region/{quoted}/register HTTP/1.1", json.dumps({"key": named}).encode()


def files_that_lead_outside(named: str) -> Iterator[bytes]:
    """Kinds of images that programs are started, or other files opened, for."""
    yield f'<svg xmlns="http://www.w3.org/2000/svg"><image href="{named}"/></svg>'.encode()
    yield f'<!DOCTYPE svg [<!ENTITY x SYSTEM "{named}">]><svg>&x;</svg>'.encode()
    yield f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({named}) run\nshowpage\n".encode()
    yield f"push graphic-context\nimage over 0,0 0,0 '{named}'\npop graphic-context\n".encode()
    yield f"%PDF-1.7\n1 0 obj<</F({named})>>endobj\n".encode()


@pytest.mark.parametrize("audited", ["text"], indirect=True)
def test_nothing_that_a_request_names_is_opened_asked_or_started(
    audited: Audited, tally: Tally, photos: list[bytes], tmp_path: Path
) -> None:
    made, infer = tmp_path / "made", f"/v2/models/{QUOTED}/infer"
    secret = tmp_path / "secret.png"
    secret.write_bytes(photos[1])
    with socket.create_server(("127.0.0.1", 0)) as canary:
        address = f"http://127.0.0.1:{canary.getsockname()[1]}/x"
        named = [
            str(secret),
            address,
            "/etc/passwd",
            "/proc/self/environ",
            "\\\\127.0.0.1\\share",
            "|touch${IFS}" + str(made),
        ]
        asked = [request for each in named for request in requests_that_name_things(each, infer, photos[0])]
        pickled = [pickle.dumps(Payload(made), protocol) for protocol in range(6)]
        bodies = [*pickled, *(file for each in named for file in files_that_lead_outside(each))]
        for path in ("/v1/classify", infer):
            for kind in ("application/octet-stream", "image/png", "image/svg+xml", "application/x-python-pickle", ""):
                asked += [(f"POST {path} HTTP/1.1\r\nContent-Type: {kind}", body) for body in bodies]
            asked += [(f"POST {path} HTTP/1.1\r\nInference-Header-Content-Length: 0", body) for body in bodies]
        healthy_after(audited.running, photos[0])
        for path in (
            "/",
            "/docs",
            "/docs/assets/favicon.png",
            "/openapi.json",
            "/metrics",
        ):  # what is imported or read once, at first use
            assert audited.running.http.get(path).status_code == 200
        assert audited.ask(f"POST {infer} HTTP/1.1\r\nInference-Header-Content-Length: 0", photos[0])[0] == 200
        before = audited.events()
        answered = [audited.ask(head, body)[0] for head, body in asked]
        assert audited.running.http.get("/docs/assets/swagger-ui.css").status_code == 200
        recovery_s = healthy_after(audited.running, photos[0])
        canary.settimeout(0.1)
        with pytest.raises(TimeoutError):
            canary.accept()
        num_events = len(audited.events())
        audited.running.wait_until(lambda: any(MACHINE[0] in event for event in audited.events()[num_events:]))
    while_asked = audited.events()[len(before) :]
    assert any("model.safetensors" in event for event in before), "the hook sees what is opened"
    assert len(before) + len(while_asked) > num_events, "to the end"
    assert [event for event in while_asked if not allowed(event)] == []
    assert not made.exists()
    assert not set(answered) - {200, 400, 404, 405, 413, 415, 422}, set(answered)
    tally.inputs(len(asked))
    tally.requests(len(asked))
    seen = f"{len(asked)} requests: {', '.join(map(str, sorted(set(answered))))}; nothing opened, asked or started"
    tally.fault("requests that name files, addresses, programs or carry pickles", seen, recovery_s)


def allowed(event: str) -> bool:
    """What the server does whoever asks: it looks at the machine and plans. FastAPI reads the source of a route when
    that is first asked for, and numpy reads the head of a plan's arrays as a literal."""
    kind, _, given = event.partition(" ")
    if kind == "open":
        return given.startswith(tuple(f"('{folder}/" for folder in (*MACHINE, ROUTES)))
    if kind == "compile":
        return given.startswith(ARRAY_HEAD)
    return kind == "subprocess.Popen" and f"{PLANNER}," in given


@pytest.mark.parametrize("audited", ["text", "json"], indirect=True)
def test_no_request_can_forge_a_line_of_the_log_or_a_header(
    audited: Audited, tally: Tally, photos: list[bytes]
) -> None:
    allowed_in_heads = [
        "a b=c status=200",
        f'"{FORGED}"',
        "x" * 5000,
        "é\xa0\x85\xad",
        "%0d%0aX-Injected: 1",
        "a\tb",
        "{}",
    ]
    forbidden_in_heads = ["a\r\nX-Injected: 1\x00", "a\x1b[2J", "a\x00b", "a\rX-Injected: 1", "a\nX-Injected: 1"]
    asked: list[tuple[str, bytes]] = []
    for text in (*allowed_in_heads, *forbidden_in_heads):
        names = ("X-Request-Id", "User-Agent", "X-Latency-Budget-Ms", "X-Width", "Content-Type", "traceparent")
        asked += [(f"POST /v1/classify HTTP/1.1\r\n{name}: {text}", photos[0]) for name in names]
        asked.append((f"POST /v2/models/x/infer HTTP/1.1\r\nContent-Encoding: {text}", photos[0]))
    for path in ("/", "/v1/", "/v1/classify?top_k=", "/v1/quote?budget_ms=", "/playground/", "/v2/models/"):
        asked += [(f"{method} {path}{QUOTED} HTTP/1.1", photos[0]) for method in ("GET", "POST")]
    as_form = "POST /v1/classify HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=x"
    for text in (ESCAPES, *allowed_in_heads):
        latin = text.encode().decode("latin-1")
        asked.append((as_form, form(photos[0], f'name="file"; filename="{latin}"', f"Content-Type: {latin}\r\n")))
    asked.append((f"POST /v2/models/{QUOTED}/infer HTTP/1.1", tensor(base64.b64encode(photos[0]).decode())))
    answered: set[str] = set()
    for head, body in asked:
        status, lines, content = audited.ask(head, body)
        assert status < 500, head
        told = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        assert int(told["content-length"]) == len(content), "one answer, not two"
        answered |= told.keys()
    recovery_s = healthy_after(audited.running, photos[0])
    assert answered <= {
        *("date", "content-length", "content-type", "connection", "retry-after", "x-request-id"),
        *("x-content-type-options", "x-scala-width", "x-budget-met", "server-timing", "allow"),
    }, "no request can add a header"
    lines = audited.log.read_text(encoding="utf-8").splitlines()
    assert len(lines) > len(asked) / 2
    if audited.log_format == "json":
        entries = [json.loads(line) for line in lines]
        assert all({"timestamp", "level", "logger", "message"} <= entry.keys() for entry in entries)
        assert not [entry for entry in entries if entry["level"] == "CRITICAL" or entry["timestamp"].startswith("1999")]
    else:
        assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:|  ", line) for line in lines)
    assert all(line.isprintable() for line in lines)
    assert any("forged" in line for line in lines), "what was sent did come to the log"
    tally.inputs(len(asked))
    tally.requests(len(asked))
    seen = f"{len(asked)} requests answered below 500; every line of the log and every header the server's own"
    tally.fault(f"line ends, escapes and quotes wherever there is room, logs in {audited.log_format}", seen, recovery_s)
