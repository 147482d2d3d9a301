"""The contract of ``/v1/classify`` over real HTTP: answers, and what each kind of bad input gets."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from scala_model import load_checkpoint
from scala_model.checkpoint import default_checkpoint, read_checkpoint
from scala_model.normalise import normalise
from scala_model.preprocess import to_pixels
from tests.service.service_process import Running

pytestmark = pytest.mark.service


def png_that_declares(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels, of which it holds a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def test_every_answer_is_the_offline_answer_at_the_width_it_names(server: Running, photos: list[bytes]) -> None:
    checkpoint, model = read_checkpoint(default_checkpoint()), load_checkpoint(default_checkpoint())
    for i, photo in enumerate(photos):
        width = model.config.widths[i % len(model.config.widths)]
        reply = server.http.post("/v1/classify", content=photo, headers={"X-Width": str(width)})
        assert reply.status_code == 200, reply.text
        assert reply.json()["width"] == float(width)
        assert reply.headers["X-Scala-Width"] == str(width)
        pixels = to_pixels(Image.open(io.BytesIO(photo)), checkpoint.preprocessing)
        with torch.inference_mode():
            images = normalise(torch.from_numpy(pixels)[None], checkpoint.preprocessing)
            expected = model(images, width).softmax(-1)[0]
        best = reply.json()["predictions"][0]
        # The engine computes in bfloat16 where the processor has it: see tests/golden/test_engines.py for how near.
        assert best["score"] == pytest.approx(float(expected[best["class_id"]]), abs=0.02)
        assert float(expected.max() - expected[best["class_id"]]) < 0.02


def test_an_idle_server_with_a_loose_budget_answers_at_the_most_accurate_width(
    server: Running, photos: list[bytes]
) -> None:
    reply = server.http.post("/v1/classify", content=photos[0], headers={"X-Latency-Budget-Ms": "5000"})
    body = reply.json()
    widths = server.http.get("/v1/model").json()["widths"]
    assert body["width"] == max(widths, key=lambda w: w["accuracy"])["width"]
    assert body["expected_accuracy"] == max(w["accuracy"] for w in widths)
    assert body["budget_met"] is True
    assert reply.headers["X-Budget-Met"] == "true"
    assert len(body["predictions"]) == 5
    assert 0 < body["timing_ms"]["inference"] <= body["timing_ms"]["total"]
    assert {part.split(";")[0].strip() for part in reply.headers["Server-Timing"].split(",")} == {
        "decode",
        "queue",
        "inference",
        "total",
    }


def test_several_files_each_get_their_own_answer_or_error(server: Running, photos: list[bytes]) -> None:
    files = [("file", ("a.jpg", photos[0])), ("file", ("b.jpg", photos[1][:200])), ("file", ("c.jpg", photos[2]))]
    body = server.http.post("/v1/classify?top_k=1", files=files).json()
    first, broken, last = body["results"]
    assert len(first["predictions"]) == len(last["predictions"]) == 1
    assert broken["error"]["status"] == 422


@pytest.mark.parametrize("kind", ["L", "RGBA", "P", "CMYK"])
def test_any_kind_of_image_is_classified(server: Running, kind: str) -> None:
    image = Image.fromarray(np.full((80, 60, 3), 90, np.uint8)).convert(kind)
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if kind == "CMYK" else "PNG")
    assert server.http.post("/v1/classify", content=buffer.getvalue()).status_code == 200


BAD_BODIES = [
    ("empty", b"", {}, 400),
    ("text", b"hello, server", {}, 415),
    ("declared text", b"hello, server", {"Content-Type": "text/plain"}, 415),
    ("bomb", png_that_declares(20_000, 20_000), {}, 413),
    ("50 MB", bytes(50_000_000), {"Content-Type": "image/jpeg"}, 413),
    ("bad multipart", b"no parts", {"Content-Type": "multipart/form-data; boundary=x"}, 400),
    ("no boundary", b"no parts", {"Content-Type": "multipart/form-data"}, 400),
]


@pytest.mark.parametrize(("name", "body", "headers", "status"), BAD_BODIES, ids=[case[0] for case in BAD_BODIES])
def test_a_bad_body_gets_its_status(
    server: Running, name: str, body: bytes, headers: dict[str, str], status: int
) -> None:
    assert_problem(server, body, headers, status)


def test_a_truncated_image_is_a_broken_image(server: Running, photos: list[bytes]) -> None:
    assert_problem(server, photos[0][: len(photos[0]) // 2], {}, 422)


def test_a_one_pixel_image_is_an_image(server: Running) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (1, 1), "red").save(buffer, "PNG")
    assert server.http.post("/v1/classify", content=buffer.getvalue()).status_code == 200


BAD_HEADERS = [
    ("X-Latency-Budget-Ms", "abc", 400),
    ("X-Latency-Budget-Ms", "-5", 400),
    ("X-Latency-Budget-Ms", "0", 400),
    ("X-Latency-Budget-Ms", "nan", 400),
    ("X-Latency-Budget-Ms", "1e9", 400),
    ("X-Latency-Budget-Ms", "0.01", 422),
    ("X-Min-Accuracy", "2", 400),
    ("X-Min-Accuracy", "0.99", 422),
    ("X-Width", "wide", 400),
    ("X-Width", "0.3", 422),
    ("X-Width", "7", 422),
]


@pytest.mark.parametrize(("header", "value", "status"), BAD_HEADERS)
def test_a_bad_header_gets_its_status(
    server: Running, photos: list[bytes], header: str, value: str, status: int
) -> None:
    problem = assert_problem(server, photos[0], {header: value}, status)
    if status == 422:
        assert problem["widths"], "what can be had is listed"


def test_unknown_paths_and_methods_are_problems_too(server: Running) -> None:
    for reply, status in ((server.http.get("/nothing"), 404), (server.http.get("/v1/classify"), 405)):
        assert reply.status_code == status
        assert reply.headers["Content-Type"] == "application/problem+json"


def assert_problem(server: Running, body: bytes, headers: dict[str, str], status: int) -> dict[str, object]:
    """The status, one clear sentence, no internals; and the server is well afterwards."""
    reply = server.http.post("/v1/classify", content=body, headers=headers)
    assert reply.status_code == status, reply.text
    assert reply.headers["Content-Type"] == "application/problem+json"
    problem: dict[str, object] = reply.json()
    assert problem["status"] == status
    assert str(problem["detail"]).endswith(".")
    assert "Traceback" not in reply.text
    assert problem["request_id"] == reply.headers["X-Request-Id"]
    assert server.http.get("/readyz").status_code == 200
    return problem
