"""An answer depends on its image, its width and its own request: on nobody who came before, and on nobody beside it.

What engines promise is in ``server/engine/contract.py``: the same batch gives the same bits again, and in another one
an image's row may differ by rounding.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from scala_model.checkpoint import Checkpoint, default_checkpoint, read_checkpoint
from scala_model.width import Width
from server.bench.client import Client, Reply
from server.engine.contract import Engine
from server.engine.cuda_graphs import CudaGraphsEngine
from server.engine.openvino_engine import OpenVinoEngine
from server.engine.torch_engine import TorchEngine
from tests.service.service_process import Running, draw_photos, serving
from tests.service.test_observability import attributes, collecting

ENGINES: dict[str, Callable[[Checkpoint, int], Engine]] = {
    "openvino": lambda checkpoint, threads: OpenVinoEngine(checkpoint, threads=threads, max_batch=16),
    "torch": lambda checkpoint, threads: TorchEngine(checkpoint, device="cpu", threads=threads, max_batch=16),
}
# Graphs are captured on a GPU alone; on a processor the same engine runs what it would have captured.
ALL_ENGINES = ENGINES | {
    "cuda_graphs": lambda checkpoint, threads: CudaGraphsEngine(checkpoint, device="cpu", max_batch=16)
}
ROUNDING = 1e-5  # of a probability in another batch, as the contract has it
DIGITS = 1e-6  # of a score in JSON
ROUNDING_BF16 = 2e-3  # the same where weights and products are bfloat16; measured 4e-4 on a processor
WIDTHS = (0.25, 1.0)  # few, for only those of one width can share a batch
KINDS = ("bytes", "form", "json", "v2")
MODEL = "scala-xs-tiny-imagenet"
CALLERS, ASKED = 24, 10  # requests each


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return read_checkpoint(default_checkpoint())


def pixels_of(photos: list[bytes], size: int) -> NDArray[np.uint8]:
    return np.stack([np.asarray(Image.open(io.BytesIO(photo)).resize((size, size))) for photo in photos])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ALL_ENGINES)
def test_a_row_depends_on_its_image_alone(checkpoint: Checkpoint, photos: list[bytes], name: str, threads: int) -> None:
    engine, pixels = ALL_ENGINES[name](checkpoint, threads), pixels_of(photos, checkpoint.config.image_size)
    for width in checkpoint.config.widths:
        engine.load(width, engine.max_batch)
    chance = np.random.default_rng(0)
    rounding = ROUNDING_BF16 if name == "cuda_graphs" else ROUNDING
    for width in checkpoint.config.widths:
        alone = rows_alone(engine, pixels, width)
        for batch in range(1, engine.max_batch + 1):
            chosen = chance.integers(0, len(pixels), batch)
            together = engine.run(pixels[chosen], width)
            np.testing.assert_allclose(together, alone[chosen], atol=rounding, rtol=0)
            assert np.array_equal(together, engine.run(pixels[chosen], width)), "the same batch, the same bits"
        assert np.array_equal(alone, rows_alone(engine, pixels, width)), "after all others, the same bits"
        apart = np.abs(alone[:1] - alone[1:]).max(1)
        assert apart.min() > 10 * rounding, "images are told apart, or the bound says nothing"


def rows_alone(engine: Engine, pixels: NDArray[np.uint8], width: Width) -> NDArray[np.float32]:
    return np.concatenate([engine.run(pixels[i : i + 1], width) for i in range(len(pixels))])


# -- a real server, whose callers are all different


@dataclass(frozen=True)
class Ask:
    """One request, unlike those beside it in all that a request can say, and in how it says it."""

    name: str
    photo: int
    width: float
    top_k: int
    budget_ms: float
    broken: bool
    kind: str

    def parts(self, photo: bytes) -> tuple[str, bytes, dict[str, str]]:
        """Its path, body and headers."""
        headers = {
            "X-Request-Id": self.name,
            "X-Width": f"{self.width:g}",
            "X-Latency-Budget-Ms": f"{self.budget_ms:g}",
        }
        path, text = f"/v1/classify?top_k={self.top_k}", base64.b64encode(photo).decode()
        match self.kind:
            case "form":
                head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
                headers["Content-Type"] = "multipart/form-data; boundary=b"
                return path, head + photo + b"\r\n--b--\r\n", headers
            case "json":
                headers["Content-Type"] = "application/json"
                return path, json.dumps({"images": [text]}).encode(), headers
            case "v2":
                image = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [text]}
                output = {"name": "probabilities", "parameters": {"classification": self.top_k}}
                body = {"id": self.name, "inputs": [image], "outputs": [output]}
                return f"/v2/models/{MODEL}/infer", json.dumps(body).encode(), headers
            case _:
                headers["Content-Type"] = "image/jpeg"
                return path, photo, headers


def asks(caller: int, num_photos: int) -> Iterator[Ask]:
    chance = random.Random(caller)
    for i in range(ASKED):
        yield Ask(
            name=f"caller-{caller}-{i}",
            photo=chance.randrange(num_photos),
            width=chance.choice(WIDTHS),
            top_k=chance.randint(1, 9),
            budget_ms=float(20_000 + 100 * caller + i),
            broken=chance.random() < 0.1,
            kind=KINDS[(caller + i) % len(KINDS)],
        )


async def together(port: int, photos: list[bytes]) -> list[tuple[Ask, Reply]]:
    """What all callers heard, who each ask one after the other on shared connections."""
    answered: list[tuple[Ask, Reply]] = []
    with closing(Client(port)) as client:

        async def caller(number: int) -> None:
            for ask in asks(number, len(photos)):
                photo = photos[ask.photo][:200] if ask.broken else photos[ask.photo]
                answered.append((ask, await client.request("POST", *ask.parts(photo))))

        await asyncio.gather(*(caller(number) for number in range(CALLERS)))
    return answered


def alone(server: Running, photos: list[bytes]) -> dict[tuple[int, float], dict[int, float]]:
    """Every photo's best nine classes and their scores at every width, asked one at a time."""
    scores = {}
    for photo in range(len(photos)):
        for width in WIDTHS:
            headers = {"X-Width": f"{width:g}", "X-Latency-Budget-Ms": "20000"}
            reply = server.http.post("/v1/classify?top_k=9", content=photos[photo], headers=headers).json()
            assert reply["batch_size"] == 1
            scores[photo, width] = {found["class_id"]: found["score"] for found in reply["predictions"]}
    return scores


@pytest.mark.service
@pytest.mark.parametrize("name", ENGINES)
def test_nothing_of_a_request_is_in_anothers_answer(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, photos = tmp_path / "log", draw_photos(12)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
        with serving(log, ENGINE=name, LOG_FORMAT="json", ACCESS_LOG="on", DRAIN_GRACE_S="0") as server:
            server.wait_ready()
            server.wait_until(
                lambda: all("8" in w["latency_ms"] for w in server.http.get("/v1/model").json()["widths"])
            )
            expected, labels = alone(server, photos), server.http.get("/v1/model").json()["classes"]
            answered = asyncio.run(together(server.port, photos))
            plain = server.http.post("/v1/classify", content=photos[0]).json()
            assert alone(server, photos[:3]).items() <= expected.items(), "after all others, the same answers"
            server.process.terminate()
            assert server.process.wait(30) == 0
    assert len(answered) == CALLERS * ASKED
    bodies = [(ask, said(ask, reply)) for ask, reply in answered if not ask.broken]
    for ask, reply in answered:
        assert (reply.status, reply.headers["x-request-id"]) == (422 if ask.broken else 200, ask.name)
    for ask, body in bodies:
        is_own(ask, body, expected[ask.photo, ask.width], labels)
    assert max(body.get("batch_size", 1) for _, body in bodies) > 1, "or nobody was beside anybody"
    assert (plain["budget_ms"], len(plain["predictions"])) == (1000.0, 5), "who asks for nothing gets the defaults"
    assert plain["request_id"] not in {ask.name for ask, _ in answered}
    asked = {ask.name: ask for ask, _ in answered}
    told_in_log(log, asked)
    told_in_traces([attributes(span) | {"span": span} for span in collector.spans], asked)


def said(ask: Ask, reply: Reply) -> dict[str, Any]:
    """An answer in the form of /v1/classify to one image."""
    body: dict[str, Any] = reply.json()
    if ask.kind != "v2":
        return {**body, **body.get("results", [{}])[0]}
    found = (one.split(":", 2) for one in body["outputs"][0]["data"])
    return {
        "request_id": body["id"],
        "budget_ms": body["parameters"]["budget_ms"],
        "width": float(reply.headers["x-scala-width"]),
        "predictions": [{"score": float(value), "class_id": int(i), "label": label} for value, i, label in found],
    }


def is_own(ask: Ask, body: dict[str, Any], scores: dict[int, float], labels: list[str]) -> None:
    assert (body["request_id"], body["budget_ms"], body["width"]) == (ask.name, ask.budget_ms, ask.width)
    assert len(body["predictions"]) == ask.top_k
    for found in body["predictions"]:
        # Two classes of the same score but for rounding may change places, the last of them even with one unseen.
        known = scores.get(found["class_id"], min(scores.values()))
        assert found["score"] == pytest.approx(known, abs=ROUNDING + DIGITS)
        assert found["label"] == labels[found["class_id"]]
    assert body["predictions"][0]["class_id"] == max(scores, key=lambda one: scores[one])


def told_in_log(log: Path, asked: dict[str, Ask]) -> None:
    """One line a request, with its own status and width."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    access = [line for line in lines if line["logger"] == "scala.access" and line["request_id"] in asked]
    assert sorted(line["request_id"] for line in access) == sorted(asked)
    for line in access:
        ask = asked[line["request_id"]]
        told = (line["status"], line.get("width"))
        assert told == ((422, None) if ask.broken else (200, f"{ask.width:g}"))


def told_in_traces(spans: list[dict[str, Any]], asked: dict[str, Ask]) -> None:
    """One trace a request, with its own budget, and its own width in the span of its own inference."""
    requests = {span["span"].trace_id: asked.get(span.get("scala.request_id", "")) for span in spans}
    for span in spans:
        if ask := asked.get(span.get("scala.request_id", "")):
            requests[span["span"].trace_id] = ask
    assert sum(ask is not None for ask in requests.values()) == len(asked)
    for span in spans:
        ask = requests[span["span"].trace_id]
        if ask is None:
            continue
        if span["span"].name == "inference":
            assert span["scala.width"] == ask.width
        elif span["span"].name.startswith("POST"):
            assert (span["scala.request_id"], span["scala.budget_ms"]) == (ask.name, ask.budget_ms)
    inferences = [span["span"].trace_id for span in spans if span["span"].name == "inference"]
    own = [trace for trace in inferences if requests[trace] is not None]
    assert len(own) == len(set(own)) == sum(not ask.broken for ask in asked.values())
