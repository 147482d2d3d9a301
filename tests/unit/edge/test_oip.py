"""``/v2``: the Open Inference Protocol, as its clients see it."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from starlette.types import Message

from scala_model.width import Width
from server.oip import compression
from tests.unit.edge.application import BODY_LIMIT, IMAGE, PIXEL_LIMIT, Reply, Runner, Site, client, form, statuses
from tests.unit.toy import NUM_CLASSES, SIZE, png

MODEL = "/v2/models/toy"
INFER = f"{MODEL}/infer"
RAW = {"Inference-Header-Content-Length": "0"}


def asked(*images: bytes, **others: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request with binary images."""
    binary = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    tensor: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [len(images), 1]}
    tensor["parameters"] = {"binary_data_size": len(binary)}
    text = json.dumps({"inputs": [tensor], **others}).encode()
    return text + binary, {"Inference-Header-Content-Length": str(len(text))}


async def infer(site: Site, *images: bytes, headers: Mapping[str, str] = {}, **others: Any) -> Reply:
    body, form = asked(*images, **others)
    return await site.ask("POST", INFER, body, {**form, **headers})


async def ask_json(site: Site, document: Any, path: str = INFER) -> Reply:
    return await site.ask("POST", path, json.dumps(document).encode())


def pixels_of(array: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "UINT8", "shape": array.shape, "data": array.ravel().tolist()}


def grey(value: int, height: int = SIZE, width: int = SIZE) -> Any:
    return np.full((height, width, 3), value, np.uint8)


def tensors(reply: Reply) -> dict[str, Any]:
    """Every output of an answer as an array or a list of byte strings, wherever it was."""
    assert reply.status == 200, reply.body
    json_bytes = int(reply.headers.get("inference-header-content-length", len(reply.body)))
    found, rest = {}, reply.body[json_bytes:]
    for output in json.loads(reply.body[:json_bytes])["outputs"]:
        size = output.get("parameters", {}).get("binary_data_size")
        data: Any = output.get("data")
        if size is not None:
            data, rest = rest[:size], rest[size:]
            data = np.frombuffer(data, "<f4") if output["datatype"] == "FP32" else split(data)
        found[output["name"]] = np.array(data).reshape(output["shape"])
    assert not rest
    return found


def split(data: bytes) -> list[str]:
    elements = []
    while data:
        size = int.from_bytes(data[:4], "little")
        elements.append(data[4 : 4 + size].decode())
        data = data[4 + size :]
    return elements


def check_error(reply: Reply, status: int) -> str:
    """The text of an error, which must be in the only form that the protocol's clients parse."""
    assert reply.status == status, reply.body
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["x-request-id"]
    error = reply.json()
    assert error.keys() == {"error"}
    text: str = error["error"]
    assert text.endswith(".")
    return text


def test_health(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in ("/v2/health/ready", f"{MODEL}/ready", f"{MODEL}/versions/1/ready"):
            assert "starting" in check_error(await site.ask("GET", path), 503)
        assert (await site.ask("GET", "/v2/health/live")).json() == {"live": True}
        (entry,) = (await site.ask("POST", "/v2/repository/index")).json()
        assert (entry["state"], entry["reason"].partition(":")[0]) == ("UNAVAILABLE", "starting")
        reply = await site.ask("POST", "/v2/repository/index", b'{"ready":true}')
        assert reply.json() == []
        assert "starting" in check_error(await infer(site, IMAGE), 503)
        while not site.services.lifecycle.ready:
            await asyncio.sleep(0.1)
        assert (await site.ask("GET", "/v2/health/ready")).json() == {"ready": True}
        assert (await site.ask("GET", f"{MODEL}/ready")).json() == {"name": "toy", "ready": True}
        for body in (b"", b"{}", b'{"ready":true}', b'{"ready":false}'):
            reply = await site.ask("POST", "/v2/repository/index", body)
            assert reply.json() == [{"name": "toy", "version": "1", "state": "READY", "reason": ""}]
        site.services.lifecycle.draining = True
        check_error(await site.ask("GET", "/v2/health/ready"), 503)
        assert (await infer(site, IMAGE)).status == 200, "who has not noticed yet is served"

    site(scenario, warm=False)


def test_the_model_is_called_what_the_operator_says(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await site.ask("GET", "/v2/models/pets")).json()["name"] == "pets"
        assert (await site.ask("GET", "/v1/model")).json()["name"] == "pets"
        assert (await site.ask("GET", "/v1/settings")).json()["model_name"] == "pets"
        assert (await site.classify()).json()["model"] == "pets"
        body, headers = asked(IMAGE)
        assert (await site.ask("POST", "/v2/models/pets/infer", body, headers)).json()["model_name"] == "pets"
        assert "'toy'" in check_error(await site.ask("GET", MODEL), 404)
        assert 'scala_model_info{name="pets",' in (await site.ask("GET", "/metrics")).body.decode()

    site(scenario, model_name="pets")


def test_metadata_and_configuration_agree(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for path in ("/v2", "/v2/"):
            server = (await site.ask("GET", path)).json()
            assert server.keys() == {"name", "version", "extensions"}
            assert {"binary_tensor_data", "classification", "statistics"} <= set(server["extensions"])
        metadata = (await site.ask("GET", MODEL)).json()
        assert metadata == (await site.ask("GET", f"{MODEL}/versions/1")).json()
        assert (metadata["name"], metadata["versions"]) == ("toy", ["1"])
        assert {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]} == {
            "image": ("BYTES", [-1, 1]),
            "pixels": ("UINT8", [-1, -1, -1, 3]),
        }
        config = (await site.ask("GET", f"{MODEL}/config")).json()
        assert config == (await site.ask("GET", f"{MODEL}/versions/1/config")).json()
        assert config["max_batch_size"] == 256
        assert [each["optional"] for each in config["input"]] == [True, True]
        kinds = {"TYPE_STRING": "BYTES", "TYPE_UINT8": "UINT8", "TYPE_FP32": "FP32"}
        for described, configured in (("inputs", "input"), ("outputs", "output")):
            assert [
                {"name": each["name"], "datatype": kinds[each["data_type"]], "shape": [-1, *each["dims"]]}
                for each in config[configured]
            ] == metadata[described]

    site(scenario)


def test_a_raw_image(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for headers in ({}, {"Content-Type": "image/png"}, {"Content-Type": "application/octet-stream"}):
            reply = await site.ask("POST", INFER, png(7), RAW | headers)
            found = tensors(reply)
            assert reply.headers["content-type"] == "application/octet-stream"
            assert found["probabilities"].shape == (1, NUM_CLASSES)
            assert found["probabilities"][0].argmax() == 7
            assert found["probabilities"].sum() == pytest.approx(1)
            assert (found["label"].tolist(), found["width"].tolist()) == ([["class 7"]], [[1.0]])

    site(scenario)


def test_a_batch_is_one_answer_in_order(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        given = (9, 3, 200 - 1, 4, 0, 5, 6)
        reply = await infer(site, *map(png, given), id="some id", parameters={"latency_budget_ms": 1000})
        body = reply.json()
        assert (body["model_name"], body["model_version"], body["id"]) == ("toy", "1", "some id")
        assert body["parameters"] == {"budget_ms": 1000, "budget_met": True}
        found = tensors(reply)
        assert found["probabilities"].argmax(axis=1).tolist() == [*given]
        assert found["label"].ravel().tolist() == [f"class {i}" for i in given]
        assert reply.headers["content-type"] == "application/json"
        assert "inference-header-content-length" not in reply.headers
        assert (reply.headers["x-scala-width"], reply.headers["x-budget-met"]) == ("1", "true")
        timing = dict(stage.split(";dur=") for stage in reply.headers["server-timing"].split(", "))
        assert [*timing] == ["decode", "queue", "inference", "total"]
        assert float(timing["total"]) == pytest.approx(1000 * reply.seconds, abs=0.01)
        assert site.services.admission.images == 0
        assert max(len(images) for _, images in site.engine.served) > 1, "they were queued at the same moment"

    site(scenario)


def test_pixels_are_resized_like_images(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for height, width in ((SIZE, SIZE), (1, 1), (50, 20)):
            reply = await ask_json(
                site, {"inputs": [pixels_of(np.stack([grey(7, height, width), grey(8, height, width)]))]}
            )
            assert tensors(reply)["probabilities"].argmax(axis=1).tolist() == [7, 8]
        array, size = grey(9), SIZE * SIZE * 3
        tensor = {"name": "pixels", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3]}
        text = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": size}}]}).encode()
        reply = await site.ask(
            "POST", INFER, text + array.tobytes(), {"Inference-Header-Content-Length": str(len(text))}
        )
        assert tensors(reply)["label"].tolist() == [["class 9"]]

    site(scenario)


def test_only_the_outputs_that_were_asked_for_in_their_order_and_form(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        outputs = [
            {"name": "width", "parameters": {"binary_data": True}},
            {"name": "probabilities", "parameters": {"classification": 3}},
        ]
        reply = await infer(site, png(5), png(6), outputs=outputs, parameters={"binary_data_output": True})
        width, probabilities = json.loads(reply.body[: int(reply.headers["inference-header-content-length"])])[
            "outputs"
        ]
        assert width == {"name": "width", "datatype": "FP32", "shape": [2, 1], "parameters": {"binary_data_size": 8}}
        assert (probabilities["datatype"], probabilities["shape"]) == ("BYTES", [2, 3])
        assert probabilities["data"][::3] == ["0.900000:5:class 5", "0.900000:6:class 6"]
        assert probabilities["data"][1] == f"{0.1 / 199:.6f}:0:class 0"
        for binary in (True, False):
            most = {"name": "probabilities", "parameters": {"classification": 10**6, "binary_data": binary}}
            reply = await infer(site, png(5), outputs=[most])
            found = tensors(reply)["probabilities"]
            assert found.shape == (1, NUM_CLASSES), "no more than there are"
            assert found[0, 0] == "0.900000:5:class 5"

    site(scenario)


def test_the_smallest_budget_counts(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for header, parameters, budget_ms, width in (
            ("", {}, 1000, 1.0),
            ("", {"timeout": 29_000}, 29, 0.5),
            ("", {"latency_budget_ms": 29}, 29, 0.5),
            ("", {"latency_budget_ms": "19.5"}, 19.5, 0.25),
            ("39", {"timeout": 29_000, "latency_budget_ms": 19}, 19, 0.25),
            ("19", {"timeout": 29_000, "latency_budget_ms": 39}, 19, 0.25),
            ("39", {"timeout": 19_000}, 19, 0.25),
            ("39", {"timeout": 0, "priority": 0}, 39, 0.75),
            ("", {"timeout": 20_000_000}, 20_000, 1.0),
        ):
            headers = {"X-Latency-Budget-Ms": header} if header else {}
            reply = await infer(site, IMAGE, headers=headers, parameters=parameters)
            assert reply.json()["parameters"]["budget_ms"] == pytest.approx(budget_ms), parameters
            assert tensors(reply)["width"].tolist() == [[width]], parameters
        assert tensors(await infer(site, IMAGE, headers={"X-Width": "0.5"}))["width"].tolist() == [[0.5]]
        floor = {"X-Min-Accuracy": "0.6", "X-Latency-Budget-Ms": "39"}
        assert tensors(await infer(site, IMAGE, headers=floor))["width"].tolist() == [[0.75]]

    site(scenario)


def test_a_budget_that_no_width_can_meet_is_refused_with_what_can(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for reply in (
            await infer(site, IMAGE, parameters={"timeout": 5000}),
            await infer(site, IMAGE, headers={"X-Latency-Budget-Ms": "5"}),
        ):
            text = check_error(reply, 422)
            assert "5 ms" in text
            assert "10.0 ms" in text
        assert await site.metric('scala_budget_total{outcome="impossible"}') == 2

    site(scenario)


@pytest.mark.parametrize("parameters", [{"timeout": 60_000}, {"latency_budget_ms": 60}])
def test_the_deadline_that_the_body_names_ends_the_wait(site: Runner, parameters: dict[str, int]) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 5.0
        reply = await infer(site, png(1), png(2), parameters=parameters)
        assert "60 ms" in check_error(reply, 504)
        assert reply.seconds == pytest.approx(0.060, abs=0.001)
        assert await site.metric('scala_budget_total{outcome="expired"}') == 1
        assert len(site.services.queue) == site.services.admission.images == 0

    site(scenario)


def test_a_slow_upload_counts(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        body, headers = asked(IMAGE, parameters={"timeout": 100_000})
        slow = client((0.0, body[:50]), (0.075, body[50:]))
        reply = await site.ask("POST", INFER, headers=headers, receive=slow)
        assert tensors(reply)["width"].tolist() == [[0.5]], "25 ms are left"
        slow = client((0.0, body[:50]), (0.150, body[50:]))
        reply = await site.ask("POST", INFER, headers=headers, receive=slow)
        assert "100 ms" in check_error(reply, 504)
        assert reply.seconds == pytest.approx(0.150, abs=0.001), "nobody knew before"

    site(scenario)


def test_equals_go_by_priority(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        site.engine.seconds = lambda width, images: 0.02 * len(images)
        running = asyncio.create_task(infer(site, png(99)))
        await asyncio.sleep(0.001)
        pinned = {"X-Width": "1"}
        waiting = [
            infer(site, png(place), headers=pinned, parameters={"priority": priority, "timeout": 500_000})
            for place, priority in ((1, 0), (2, 3), (3, 1), (4, 0), (5, 2), (6, 1))
        ]
        assert statuses(await asyncio.gather(*waiting, running)) == {200: 7}
        served = [image for _, images in site.engine.served[1:] for image in images]
        assert served == [3, 6, 5, 2, 1, 4]

    site(scenario)


def test_one_failed_image_fails_its_request_and_is_named(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        text = check_error(await infer(site, png(1), IMAGE[:40], png(2)), 422)
        assert text.startswith("Image 1 (the first is 0) of 3: ")
        assert "Image 0" in check_error(await infer(site, b"no image", png(2)), 415)
        assert "Image 2" in check_error(await infer(site, png(1), png(2), b""), 400)
        assert "Image 1" in check_error(await infer(site, png(1), png(2, (101, 100))), 413)
        assert "Image" not in check_error(await infer(site, b"no image"), 415)
        described = {"name": "image", "datatype": "BYTES", "shape": [2, 1]}
        coded = base64.b64encode(png(1)).decode()
        reply = await ask_json(site, {"inputs": [described | {"data": [coded, "no base64!"]}]})
        assert check_error(reply, 400).startswith("Image 1 (the first is 0) of 2: The image is not base64")
        array = grey(1, 101, 100)[None]
        tensor = {
            "name": "pixels",
            "datatype": "UINT8",
            "shape": array.shape,
            "parameters": {"binary_data_size": 30_300},
        }
        head = json.dumps({"inputs": [tensor]}).encode()
        reply = await site.ask(
            "POST", INFER, head + array.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
        )
        assert str(PIXEL_LIMIT) in check_error(reply, 413)
        assert site.engine.served == [], "the others of the batch are not run for nothing"
        assert len(site.services.queue) == site.services.admission.images == site.services.admission.inflight_bytes == 0

    site(scenario)


def test_a_batch_that_cannot_all_be_in_time_is_refused_as_a_whole(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await infer(site, *[png(1)] * 60, parameters={"timeout": 100_000})
        check_error(reply, 429)
        assert int(reply.headers["retry-after"]) >= 1
        await asyncio.sleep(0)
        assert len(site.services.queue) == site.services.admission.images == 0
        await asyncio.sleep(1)
        assert sum(len(images) for _, images in site.engine.served) <= 4, "at most what was on the device"
        assert await site.metric('scala_budget_total{outcome="shed"}') == 1

    site(scenario)


def test_places_and_bytes_are_bounded(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        assert (await infer(site, *[IMAGE] * 3)).status == 200
        assert "4 images" in check_error(await infer(site, *[IMAGE] * 4), 413)
        body, headers = asked(bytes(BODY_LIMIT))
        assert str(BODY_LIMIT) in check_error(await site.ask("POST", INFER, body, headers), 413)

        async def never() -> Message:
            raise AssertionError("read")

        declared = {"Content-Length": str(BODY_LIMIT + 1)}
        check_error(await site.ask("POST", INFER, headers=declared, receive=never), 413)

    site(scenario, max_queue=3)


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_requests(site: Runner, coding: str, pack: Any) -> None:
    async def scenario(site: Site) -> None:
        body, headers = asked(png(3), png(4))
        headers["Content-Encoding"] = coding
        reply = await site.ask("POST", INFER, pack(body), headers)
        assert tensors(reply)["label"].ravel().tolist() == ["class 3", "class 4"]
        assert "content-encoding" not in reply.headers
        check_error(await site.ask("POST", INFER, pack(body)[:-5], headers), 400)
        check_error(await site.ask("POST", INFER, body, headers), 400)
        bomb = pack(bytes(20 * BODY_LIMIT))
        assert len(bomb) < BODY_LIMIT / 10
        assert str(BODY_LIMIT) in check_error(await site.ask("POST", INFER, bomb, headers), 413)
        assert site.services.admission.inflight_bytes == 0

    site(scenario)


@pytest.mark.parametrize(("coding", "unpack"), [("gzip", gzip.decompress), ("deflate", zlib.decompress)])
def test_compressed_answers(site: Runner, coding: str, unpack: Any) -> None:
    async def scenario(site: Site) -> None:
        accepting = {"Accept-Encoding": f"br, {coding}"}
        for parameters in ({}, {"binary_data_output": True}):
            reply = await infer(site, *[png(3)] * 4, headers=accepting, parameters=parameters)
            assert reply.headers["content-encoding"] == coding
            assert int(reply.headers["content-length"]) == len(reply.body)
            plain = Reply(reply.status, reply.headers, unpack(reply.body), 0)
            assert tensors(plain)["probabilities"].shape == (4, NUM_CLASSES)
        small = await infer(site, png(3), headers=accepting, outputs=[{"name": "label"}])
        assert "content-encoding" not in small.headers, "what fits into a packet gains nothing"
        for error in (await infer(site, b"", headers=accepting), await site.ask("GET", MODEL, headers=accepting)):
            assert "content-encoding" not in error.headers, "clients unpack answers of infer alone"

    site(scenario)


def test_a_large_answer_is_written_beside_the_event_loop(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        reply = await infer(site, *[png(1)] * 60, headers={"X-Width": "0.25"})
        assert tensors(reply)["probabilities"].shape == (60, NUM_CLASSES)

    site(scenario)


def test_writing_a_large_answer_takes_of_the_budget(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Site) -> None:
        def slowly(body: bytes, coding: str) -> bytes:
            site.clock.spend(0.7)
            return compression.pack(body, coding)

        monkeypatch.setattr("server.routes.oip.pack", slowly)
        asking = {"X-Width": "0.25", "Accept-Encoding": "gzip"}  # 375 ms on the engine
        reply = await infer(site, *[png(1)] * 60, headers=asking | {"X-Latency-Budget-Ms": "600"})
        assert "600 ms" in check_error(reply, 504)
        assert reply.seconds == pytest.approx(0.6, abs=0.001), "whatever is still being written"
        reply = await infer(site, *[png(1)] * 60, headers=asking)
        told = json.loads(gzip.decompress(reply.body))["parameters"]
        assert (told["budget_met"], reply.headers["x-budget-met"]) == (False, "false")
        total_ms = float(reply.headers["server-timing"].rpartition("=")[2])
        assert total_ms == pytest.approx(1000 * reply.seconds, abs=0.01)
        for outcome in ("expired", "missed"):
            assert await site.metric(f'scala_budget_total{{outcome="{outcome}"}}') == 1
        assert site.services.admission.images == 0

    site(scenario)


def test_every_error_has_the_protocols_form(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for method, path, status in (
            ("GET", "/v2/nothing", 404),
            ("GET", "/v2/models", 404),
            ("GET", "/v2/models/other", 404),
            ("GET", "/v2/models/other/ready", 404),
            ("GET", f"{MODEL}/versions/2", 404),
            ("GET", f"{MODEL}/versions/1/nothing", 404),
            ("POST", "/v2/models/other/infer", 404),
            ("POST", f"{MODEL}/versions/2/infer", 404),
            ("GET", INFER, 405),
            ("POST", "/v2", 405),
            ("DELETE", MODEL, 405),
            ("POST", INFER, 400),
            ("POST", "/v2/repository/models/toy/load", 400),
            ("POST", "/v2/repository/models/toy/unload", 400),
        ):
            check_error(await site.ask(method, path), status)
        assert "'other'" in check_error(await site.ask("GET", "/v2/models/other"), 404)
        for body in (b"[]", b"{", b'{"ready":1}'):
            check_error(await site.ask("POST", "/v2/repository/index", body), 400)
        check_error(await site.ask("POST", "/v2/repository/index", bytes(2000)), 413)
        for headers, status in (
            ({"Content-Type": "text/plain"}, 415),
            ({"Content-Type": "multipart/form-data"}, 415),
            ({"Content-Encoding": "br"}, 415),
            ({"Inference-Header-Content-Length": "x"}, 400),
            ({"Inference-Header-Content-Length": "-1"}, 400),
            ({"Inference-Header-Content-Length": "1000"}, 400),
            ({"X-Latency-Budget-Ms": "x"}, 400),
            ({"X-Width": "0.3"}, 422),
            ({"X-Min-Accuracy": "0.9"}, 422),
        ):
            assert next(iter(headers.values())) in check_error(await site.ask("POST", INFER, b"{}", headers), status)
        problem = (await site.ask("GET", "/v2x")).json()
        assert problem["status"] == 404, "what only looks like the protocol's"
        site.engine.seconds = lambda width, images: 1 / 0
        check_error(await infer(site, IMAGE), 500)

    site(scenario)


BAD_PARAMETERS: dict[str, list[Any]] = {
    "timeout": [-1, 1.5, "5", True, 600_000_001, 10**400],
    "priority": [-1, 1.0, "1", False, 2**32],
    "latency_budget_ms": [0, -5, "soon", True, None, [], 600_001, "nan", "1_0"],
    "binary_data_output": [1],
}


def test_a_parameter_that_makes_no_sense_is_named_with_its_value(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        for name, values in BAD_PARAMETERS.items():
            for value in values:
                text = check_error(await infer(site, IMAGE, parameters={name: value}), 400)
                assert name in text, (name, value)
                assert str(value)[:10] in text, (name, value)
        for output, named in (
            ({"name": "logits"}, "'logits'"),
            ({"name": "label", "parameters": {"classification": 2}}, "label"),
            ({"name": "width", "parameters": {"classification": 1}}, "width"),
        ):
            assert named in check_error(await infer(site, IMAGE, outputs=[output]), 400)
        assert "more than once" in check_error(await infer(site, IMAGE, outputs=[{"name": "label"}] * 2), 400)
        assert site.engine.served == []

    site(scenario)


def test_no_text_that_comes_back_is_long(site: Runner) -> None:
    """It would be written and compressed on the event loop: an id of 20 MB held it for 0.7 s."""

    async def scenario(site: Site) -> None:
        longest = "x" * 256
        assert (await infer(site, IMAGE, id=longest)).json()["id"] == longest
        assert "id: String should have at most 256" in check_error(await infer(site, IMAGE, id=longest + "x"), 400)
        tensor = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [""]}
        for name in ("name", "datatype"):
            text = check_error(await ask_json(site, {"inputs": [tensor | {name: "x" * 50_000}]}), 400)
            assert f"inputs.0.{name}: String should have at most 256" in text
            assert len(text) < 300
        text = check_error(await infer(site, IMAGE, outputs=[{"name": "x" * 50_000}]), 400)
        assert "outputs.0.name: String should have at most 256" in text
        assert site.engine.served[1:] == []

    site(scenario)


def test_a_bug_shows_nothing_of_itself(site: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(site: Site) -> None:
        monkeypatch.setattr("server.oip.codec.read_request", lambda *given: 1 / 0)
        assert "division" not in check_error(await infer(site, IMAGE), 500)

    site(scenario)


def test_who_leaves_is_not_run(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        running = asyncio.create_task(infer(site, png(99)))
        await asyncio.sleep(0.001)
        body, headers = asked(png(1), png(2))
        await site.ask("POST", INFER, headers=headers, receive=client((0.0, body), leaves_after=0.005))
        assert (await running).status == 200
        await asyncio.sleep(1)
        assert [images for _, images in site.engine.served] == [[99]]
        assert await site.metric("scala_cancelled_before_dispatch_total") == 2
        assert await site.metric('scala_budget_total{outcome="cancelled"}') == 1

    site(scenario)


def test_statistics_count_every_route(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        (fresh,) = (await site.ask("GET", "/v2/models/stats")).json()["model_stats"]
        assert (fresh["inference_count"], fresh["execution_count"], fresh["last_inference"]) == (0, 0, 0)
        pinned = {"X-Width": "0.5"}
        await site.classify(headers=pinned)
        await infer(site, png(1), png(2), png(3), png(4), headers=pinned, parameters={"timeout": 500_000})
        await infer(site, IMAGE, parameters={"timeout": 5000})
        await site.classify(*form(b"broken", b"broken"))
        paths = ("/v2/models/stats", f"{MODEL}/stats", f"{MODEL}/versions/1/stats")
        first, *others = [(await site.ask("GET", path)).json() for path in paths]
        assert others == [first, first]
        (found,) = first["model_stats"]
        assert (found["name"], found["version"]) == ("toy", "1")
        assert (found["inference_count"], found["execution_count"]) == (5, 1 + len(site.engine.served) - 1)
        assert found["last_inference"] > 1_600_000_000_000
        durations = found["inference_stats"]
        assert (durations["success"]["count"], durations["fail"]["count"]) == (2, 1)
        assert durations["compute_infer"]["count"] == durations["queue"]["count"] == 5
        spent = sum(0.5 * 0.02 * (1 + len(images)) for _, images in site.engine.served)
        by_size = found["batch_stats"]
        assert sum(each["compute_infer"]["count"] for each in by_size) == len(site.engine.served)
        assert sum(each["batch_size"] * each["compute_infer"]["count"] for each in by_size) == 5
        assert sum(each["compute_infer"]["ns"] for each in by_size) == pytest.approx(1e9 * spent)
        assert {width for width, _ in site.engine.served} == {Width(0.5)}

    site(scenario)


def test_requests_are_counted_like_those_of_other_routes(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        await infer(site, png(1), png(2), parameters={"timeout": 200_000})
        await site.ask("POST", f"{MODEL}/versions/1/infer", png(7), RAW)
        await site.ask("POST", "/v2/models/other/infer", png(7), RAW)
        await site.ask("GET", INFER)
        route = "/v2/models/{model}/infer"  # of a success as of a refusal
        for status in (200, 404, 405):
            assert await site.metric(f'scala_requests_total{{route="{route}",status="{status}"}}') == 1
        versioned = 'route="/v2/models/{model}/versions/{version}/infer",status="200"'
        assert await site.metric(f"scala_requests_total{{{versioned}}}") == 1
        assert await site.metric('scala_budget_total{outcome="met"}') == 2
        assert await site.metric("scala_width_selected_total") == 3
        assert await site.metric("scala_inflight_bytes") == 0

    site(scenario)


def test_the_protocol_is_documented(site: Runner) -> None:
    async def scenario(site: Site) -> None:
        document = (await site.ask("GET", "/openapi.json")).json()
        paths, schemas = document["paths"], document["components"]["schemas"]
        infer = paths["/v2/models/{model}/infer"]["post"]
        assert {"200", "400", "404", "413", "415", "422", "429", "503", "504"} <= infer["responses"].keys()
        assert {"application/json", "application/octet-stream"} == infer["requestBody"]["content"].keys()
        schema = infer["requestBody"]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/InferenceRequest"}
        assert schemas["RequestInput"]["properties"]["name"]["enum"] == ["image", "pixels"]
        named = {parameter["name"] for parameter in infer["parameters"]}
        assert {"model", "Inference-Header-Content-Length", "X-Latency-Budget-Ms"} <= named
        assert "/v2/models/{model}/versions/{version}/infer" in paths

    site(scenario)
