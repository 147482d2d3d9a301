"""Bytes that are no good image, or no good request around one: at the decoder itself, and over HTTP."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import subprocess
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from random import Random
from signal import SIGUSR1
from subprocess import PIPE

import psutil
import pytest

from server.bench.client import Client, Reply
from tests.chaos.callers import expect_punctual, told_late
from tests.chaos.conftest import Tally
from tests.chaos.hostile_images import MIB, WRONGS, bombs, hostile_image
from tests.chaos.judgement import MAX_MIB, slope
from tests.chaos.seed import SEED
from tests.chaos.well import check_log, healthy_after
from tests.service.service_process import ROOT, Running, serving

HAS_ATHERIS = sys.platform == "linux" and find_spec("atheris") is not None
NUM_INPUTS = 100_000  # without those that follow coverage, and those of tests/chaos/test_hostile_connections.py
NUM_CHOSEN, NUM_OVER_HTTP = 8_000, 6_000
NUM_SOAKED, SOAKED_FROM, SAMPLED_EVERY = 30_000, 10_000, 2_000
QUIET_S = 0.2  # for what was still being decoded to end
NUM_RANDOM = NUM_INPUTS - NUM_CHOSEN - NUM_OVER_HTTP - NUM_SOAKED
GUIDED_RUNS, GUIDED_S = 15_000, 60  # whichever comes first: following coverage takes ten times as long
NUM_CALLERS = 8
MAX_KEPT_MIB = 64  # free, but not given back; measured 15 to 30
MAX_MORE_FILES = 10  # open for a moment, as for a new plan
MAX_REFUSED = 0.1  # of all, for load: what is refused on arrival tries nothing; measured 0
# 500 would be a bug, 503 a server that leaves; 429 and 504 are what a machine with others on it may come to.
EXPECTED = frozenset({200, 400, 413, 415, 422, 429, 504})
BUDGET_MS = 1000
WORST_MS = 250  # after it, of callers who make and check hostile bodies meanwhile; measured 83
PATIENCE_S = 120  # ten times the server's: the machine may hold all of this still for a while, for other work
MODEL = "scala-xs-tiny-imagenet"
BINARY = "Inference-Header-Content-Length"


@pytest.fixture(scope="module")
def attacks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The attacks on the decoder, side by side, each in a process of its own."""
    corpus = tmp_path_factory.mktemp("corpus")
    arguments = {"chosen": [str(NUM_CHOSEN)], "random": [str(NUM_RANDOM)]}
    if HAS_ATHERIS:
        arguments["guided"] = [str(corpus), str(GUIDED_RUNS), str(GUIDED_S)]
    command = [sys.executable, "-m", "tests.chaos.attack_decoder"]
    started = {}
    for kind, given in arguments.items():
        log = (corpus.parent / f"{kind}.log").open("w")
        started[kind] = subprocess.Popen([*command, kind, *given], cwd=ROOT, stdout=PIPE, stderr=log, text=True)
        log.close()
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = bombs(), _zeros("gzip"), _zeros("deflate")  # now: while a caller makes them, it would hear no answer
    assert all(made)
    log = tmp_path_factory.mktemp("server") / "log"
    with serving(log, command=("-m", "tests.chaos.tidy_server")) as running:
        running.wait_measured()
        yield running
        check_log(log)


# -- the decoder itself


@pytest.mark.parametrize(
    ("kind", "least", "how"),
    [
        pytest.param(
            "guided",
            1000,
            "mutated along the decoder's coverage",
            marks=pytest.mark.skipif(not HAS_ATHERIS, reason="atheris, which follows coverage, is for Linux on x86-64"),
        ),
        ("chosen", NUM_CHOSEN, "whose wrongs hypothesis chose"),
        ("random", NUM_RANDOM, "cut, flipped, swapped, mixed and inflated by chance"),
    ],
)
def test_the_decoder_answers_any_bytes(
    attacks: dict[str, subprocess.Popen[str]], tally: Tally, kind: str, least: int, how: str
) -> None:
    output, _ = attacks[kind].communicate(timeout=280)
    assert attacks[kind].returncode == 0, f"it broke: {output[-3000:]}"
    told = json.loads(output.splitlines()[-1])
    answers = ", ".join(f"{count:,} x {answer}" for answer, count in sorted(told["answers"].items()))
    tally.inputs(told["inputs"])
    tally.fault(f"images {how}, at the decoder", f"{answers}; the slowest took {told['slowest_s']:.2f} s", None)
    assert told["inputs"] >= least
    assert told["answers"].keys() == {"pixels", "BadRequest", "BrokenImage", "TooLarge", "UnsupportedImage"}


# -- over HTTP


@dataclass(frozen=True)
class Sent:
    path: str
    body: bytes
    headers: Mapping[str, str]


TYPES = (
    "image/jpeg", "image/png", "image/webp", "image/tiff", "image/svg+xml", "text/html", "application/json",
    "multipart/form-data; boundary=b", "multipart/form-data", "application/octet-stream", "x" * 500, "", "image/\x7f",
)  # fmt: skip
ODD_HEADERS = (
    {"X-Latency-Budget-Ms": "nan"}, {"X-Latency-Budget-Ms": "1e999"}, {"X-Latency-Budget-Ms": "-1"},
    {"X-Latency-Budget-Ms": "0.001"}, {"X-Width": "0.3"}, {"X-Width": "\u0661"}, {"X-Min-Accuracy": "2"},
    {"X-Request-Id": "\u00ff" * 200}, {"traceparent": "00-" + "f" * 500}, {"Accept-Encoding": "gzip;q=x, *;q=0.5"},
    {"Content-Encoding": "br"}, {"Content-Encoding": "gzip"}, {"Content-Encoding": "deflate"}, {"Expect": "what"},
)  # fmt: skip
ODD_JSON = (
    b"", b"{", b"null", b"[" * 100_000, b'{"a":' * 50_000, b'{"images": [' + b"1," * 100_000 + b"1]}",
    b'{"images": ["\\ud800"]}', b'{"images": "' + b"\\" * 600_000 + b'"}', b'{"images": [""]}',
    b'{"images": [' + b"9" * 5000 + b"]}", b'{"images": ["AAAA"], "images": 3}',
    b"\xef\xbb\xbf{}", b"\xff\xfe{\x00}\x00",
    b'{"inputs": [NaN, Infinity, 1e999]}', b'{"id": "\\ud800", "inputs": []}',
    b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [-1, 1], "data": []}]}',
    b'{"inputs": [{"name": "image", "datatype": "BYTES", "shape": [9223372036854775807, 1], "data": ["a"]}]}',
    b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 100000, 100000, 3], "data": []}]}',
    b'{"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [300, -1, 1.5]}]}',
    b'{"parameters": {"timeout": 1e30, "latency_budget_ms": [], "priority": -1}, "inputs": [{"name": "image"}]}',
)  # fmt: skip


def hostile_request(random: Random, bomb_share: float) -> Sent:
    """Half of the requests name a budget."""
    make = random.choice((_raw, _raw, _form, _json, _odd_json, _v2_binary, _v2_binary, _v2_json, _packed, _bomb_packed))
    sent = make(random, bomb_share)
    headers = dict(sent.headers) | (random.choice(ODD_HEADERS) if random.random() < 0.1 else {})
    if random.random() < 0.5:
        headers = {"X-Latency-Budget-Ms": str(BUDGET_MS)} | headers
    return Sent(sent.path, sent.body, headers)


def _raw(random: Random, bomb_share: float) -> Sent:
    query = random.choice(("", "", "?top_k=1", "?top_k=0", "?top_k=" + "9" * 50, "?%00=%ff", "?" + "a" * 5000))
    return Sent(f"/v1/classify{query}", hostile_image(random, bomb_share), {"Content-Type": random.choice(TYPES)})


def _form(random: Random, bomb_share: float) -> Sent:
    parts = b"".join(
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="\x00../%d"\r\n' % i
        + b"Content-Type: %s\r\n\r\n" % random.choice(TYPES).encode()
        + hostile_image(random, bomb_share)
        + b"\r\n"
        for i in range(random.randint(1, 3))
    )
    return Sent("/v1/classify", _perhaps_wrong(random, parts + b"--b--\r\n"), {"Content-Type": TYPES[7]})


def _json(random: Random, bomb_share: float) -> Sent:
    images = [base64.b64encode(hostile_image(random, bomb_share)).decode() for _ in range(random.randint(1, 3))]
    body = _perhaps_wrong(random, json.dumps({"images": images}).encode())
    return Sent("/v1/classify", body, {"Content-Type": "application/json"})


def _odd_json(random: Random, bomb_share: float) -> Sent:
    path = random.choice(("/v1/classify", _infer_path()))
    return Sent(path, random.choice(ODD_JSON), {"Content-Type": "application/json"})


def _v2_binary(random: Random, bomb_share: float) -> Sent:
    images = [hostile_image(random, bomb_share) for _ in range(random.randint(1, 3))]
    binary = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    size = random.choice((len(binary), len(binary), len(binary) + 1, 0, 2**63))
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(images), 1], "parameters": {"binary_data_size": size}}
    text = json.dumps({"inputs": [tensor]}).encode()
    num_bytes = random.choice((len(text), len(text), len(text) + 1, 0, 10**18))
    return Sent(_infer_path(), _perhaps_wrong(random, text + binary), {BINARY: str(num_bytes)})


def _v2_json(random: Random, bomb_share: float) -> Sent:
    image = base64.b64encode(hostile_image(random, bomb_share)).decode()
    shape = random.choice(([1, 1], [1], [2, 1], [1, -1], [], "x", [1.5, 1]))
    tensor = {"name": "image", "datatype": "BYTES", "shape": shape, "data": [image]}
    return Sent(_infer_path(), _perhaps_wrong(random, json.dumps({"inputs": [tensor]}).encode()), {})


def _packed(random: Random, bomb_share: float) -> Sent:
    sent = _v2_binary(random, bomb_share)
    coding = random.choice(("gzip", "deflate"))
    body = _perhaps_wrong(random, gzip.compress(sent.body, 1) if coding == "gzip" else zlib.compress(sent.body, 1))
    return Sent(sent.path, body, {**sent.headers, "Content-Encoding": coding})


def _bomb_packed(random: Random, bomb_share: float) -> Sent:
    """A thousand times its size, seldom; most of the time a packed body that is no request."""
    coding = random.choice(("gzip", "deflate"))
    body = _zeros(coding) if random.random() < 5 * bomb_share else _perhaps_wrong(random, gzip.compress(b"{}"))
    return Sent(_infer_path(), body, {"Content-Encoding": coding})


@cache
def _zeros(coding: str) -> bytes:
    return gzip.compress(bytes(200 * MIB)) if coding == "gzip" else zlib.compress(bytes(200 * MIB))


def _infer_path() -> str:
    return f"/v2/models/{MODEL}/infer"


def _perhaps_wrong(random: Random, body: bytes) -> bytes:
    return random.choice(WRONGS)(random, body) if random.random() < 0.3 else body


def check(sent: Sent, reply: Reply) -> None:
    """Every answer is one that the documentation names, in the form of its route."""
    told = (
        f"{sent.path} {sent.headers} {sent.body[:200]!r} ({len(sent.body)} bytes): {reply.status} {reply.body[:500]!r}"
    )
    assert reply.status in EXPECTED, told
    is_v2 = sent.path.startswith("/v2")
    if reply.status == 200:
        body = _unpacked(reply)
        answer = json.loads(body[: int(reply.headers.get(BINARY.lower(), len(body)))])
        assert "outputs" in answer if is_v2 else ("predictions" in answer) != ("results" in answer), told
        for result in answer.get("results", []):
            assert "predictions" in result or result["error"]["status"] in EXPECTED, told
    elif is_v2:
        assert list(reply.json()) == ["error"], told
    else:
        assert reply.headers["content-type"] == "application/problem+json", told
        assert reply.json().keys() >= {"type", "title", "status", "detail", "request_id"}, told
        assert reply.json()["status"] == reply.status, told


def _unpacked(reply: Reply) -> bytes:
    coding = reply.headers.get("content-encoding")
    if coding == "gzip":
        return gzip.decompress(reply.body)
    return zlib.decompress(reply.body) if coding == "deflate" else reply.body


@dataclass
class Campaign:
    """Some callers, each sending its next hostile request when the last was answered."""

    server: Running
    bomb_share: float
    random: Random
    looks_after_each: bool = False  # whether the server is ready
    statuses: Counter[int] = field(default_factory=Counter)
    num_lost: int = 0
    lateness_ms: list[float] = field(default_factory=list)  # of those with a budget

    async def run(self, count: int) -> None:
        client, started = Client(self.server.port), iter(range(count))

        async def caller() -> None:
            for _ in started:
                sent = hostile_request(self.random, self.bomb_share)
                try:
                    async with asyncio.timeout(PATIENCE_S):
                        reply = await client.request("POST", sent.path, sent.body, sent.headers)
                except (OSError, TimeoutError):
                    self.num_lost += 1
                    continue
                check(sent, reply)
                if self.looks_after_each:
                    assert (await client.request("GET", "/readyz", b"", {})).status == 200
                self.statuses[reply.status] += 1
                if sent.headers.get("X-Latency-Budget-Ms") == str(BUDGET_MS):
                    self.lateness_ms.append(1000 * reply.latency_s - BUDGET_MS)

        await asyncio.gather(*(caller() for _ in range(NUM_CALLERS)))
        client.close()

    def expect_tried(self) -> None:
        """All came to an answer, and few to one that anybody would have got."""
        assert self.num_lost == 0
        assert self.statuses.keys() >= {200, 400, 413, 415, 422}, self.statuses
        assert self.statuses[429] + self.statuses[504] <= MAX_REFUSED * self.statuses.total(), self.statuses

    def told(self) -> str:
        answers = ", ".join(f"{count:,} x {status}" for status, count in sorted(self.statuses.items()))
        return f"{answers}; of those with a budget {told_late(self.lateness_ms)}"


def test_hostile_requests_over_http(server: Running, photos: list[bytes], tally: Tally) -> None:
    for part in range(3):
        campaign = Campaign(server, bomb_share=0.01, random=Random(SEED - 1 + part), looks_after_each=True)
        asyncio.run(campaign.run(NUM_OVER_HTTP // 3))
        recovery_s = healthy_after(server, photos[0])
        tally.inputs(campaign.statuses.total() + campaign.num_lost)
        tally.requests(NUM_OVER_HTTP // 3, campaign.num_lost)
        tally.fault(f"hostile bodies on every route, part {part + 1} of 3", campaign.told(), recovery_s)
        campaign.expect_tried()
        expect_punctual(campaign.lateness_ms, worst_ms=WORST_MS)


def test_hostile_requests_leave_no_memory_behind(server: Running, photos: list[bytes], tally: Tally) -> None:
    """Looked at between requests, when nothing is kept in reserve, and after each bomb was there twice."""
    process, samples, held = psutil.Process(server.process.pid), list[tuple[int, float]](), list[float]()
    for bomb in 2 * bombs():
        assert server.http.post("/v1/classify", content=bomb).status_code in EXPECTED
    campaign, num_files = Campaign(server, bomb_share=0.0005, random=Random(SEED + 6)), process.num_fds()
    for done in range(SAMPLED_EVERY, NUM_SOAKED + 1, SAMPLED_EVERY):
        asyncio.run(campaign.run(SAMPLED_EVERY))
        time.sleep(QUIET_S)
        held.append(process.memory_info().rss / MIB)
        server.process.send_signal(SIGUSR1)
        server.wait_ready()
        if done >= SOAKED_FROM:
            samples.append((done, process.memory_info().rss / MIB))
    recovery_s = healthy_after(server, photos[0])
    grown = slope([done / 10_000 for done, _ in samples], [mib for _, mib in samples])
    assert campaign.statuses.total() + campaign.num_lost == NUM_SOAKED
    tally.inputs(NUM_SOAKED)
    tally.requests(NUM_SOAKED, campaign.num_lost)
    tally.rss_slope(grown)
    (_, before), (_, after) = samples[0], samples[-1]
    memory = (
        f"memory in use {before:.0f} MiB after the first {SOAKED_FROM:,}, {after:.0f} after all, "
        f"and with what was kept for the next requests {max(held):.0f} at most"
    )
    tally.fault(f"{NUM_SOAKED:,} hostile requests in a row", f"{campaign.told()}; {memory}", recovery_s)
    campaign.expect_tried()
    expect_punctual(campaign.lateness_ms, worst_ms=WORST_MS)
    assert process.num_fds() <= num_files + MAX_MORE_FILES
    assert grown <= MAX_MIB, samples
    assert max(held) < after + MAX_KEPT_MIB
