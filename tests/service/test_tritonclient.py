"""The Open Inference Protocol's own clients, synchronous and asyncio, against a real server."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from tests.service.service_process import Running

pytestmark = pytest.mark.service
OUTPUTS = ("probabilities", "label", "width")


@pytest.fixture
def client(server: Running) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        yield client


@pytest.fixture
def model(server: Running) -> str:
    return str(server.http.get("/v1/model").json()["name"])


def images(*encoded: bytes) -> list[Any]:
    """The input of a request that holds these images."""
    tensor = triton.InferInput("image", [len(encoded), 1], "BYTES")
    return [tensor.set_data_from_numpy(np.array(encoded, np.object_).reshape(-1, 1))]


def pixels(encoded: bytes, *, binary: bool) -> list[Any]:
    array = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGB"))[None]
    return [triton.InferInput("pixels", array.shape, "UINT8").set_data_from_numpy(array, binary_data=binary)]


def wanted(*, binary: bool, **parameters: int) -> list[Any]:
    return [triton.InferRequestedOutput(name, binary_data=binary, **parameters) for name in OUTPUTS]


def classified(server: Running, photo: bytes, **headers: str) -> dict[str, Any]:
    """What the server's own route says of an image."""
    answer: dict[str, Any] = server.http.post("/v1/classify", content=photo, headers=headers).json()
    return answer


def asyncio_client(server: Running, scenario: Callable[[Any], Any]) -> Any:
    async def whole() -> Any:
        async with aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
            return await scenario(client)

    return asyncio.run(whole())


def test_what_the_server_says_of_itself(server: Running, client: Any, model: str) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(model)
    assert client.is_model_ready(model, "1")
    assert not client.is_model_ready("other")
    assert "statistics" in client.get_server_metadata()["extensions"]
    metadata, config = client.get_model_metadata(model), client.get_model_config(model, "1")
    assert [each["name"] for each in metadata["outputs"]] == [each["name"] for each in config["output"]] == [*OUTPUTS]
    assert config["max_batch_size"] > 0
    assert client.get_model_repository_index() == [{"name": model, "version": "1", "state": "READY", "reason": ""}]

    async def scenario(client: Any) -> list[Any]:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(model)
        assert not await client.is_model_ready(model, "2")
        return [
            await client.get_model_metadata(model),
            await client.get_model_config(model, "1"),
            await client.get_model_repository_index(headers={"X-Request-Id": "abc"}),
        ]

    assert asyncio_client(server, scenario) == [metadata, config, client.get_model_repository_index()]


@pytest.mark.parametrize("binary", [True, False])
def test_a_batch_gets_what_each_image_gets_alone(
    server: Running, client: Any, model: str, photos: list[bytes], binary: bool
) -> None:
    result = client.infer(model, images(*photos[:5]), outputs=wanted(binary=binary), headers={"X-Width": "0.5"})
    probabilities, labels, widths = map(result.as_numpy, OUTPUTS)
    assert probabilities.dtype == np.float32
    assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-3)
    assert widths.tolist() == [[0.5]] * 5
    for photo, row, label in zip(photos, probabilities, labels.ravel(), strict=False):
        best = classified(server, photo, **{"X-Width": "0.5"})["predictions"][0]
        # Batches of other sizes may run on other threads, in bfloat16: see tests/golden/test_engines.py for how near.
        assert row[best["class_id"]] == pytest.approx(best["score"], abs=0.02)
        assert row.max() - row[best["class_id"]] < 0.02
        name = label.decode() if isinstance(label, bytes) else label
        assert name == server.http.get("/v1/model").json()["classes"][row.argmax()]


def test_all_outputs_and_the_id_come_back_unasked(client: Any, model: str, photos: list[bytes]) -> None:
    for version, request_id in (("", "abc"), ("1", "7")):
        result = client.infer(model, images(photos[0]), model_version=version, request_id=request_id)
        response = result.get_response()
        assert (response["model_name"], response["model_version"], response["id"]) == (model, "1", request_id)
        assert [output["name"] for output in response["outputs"]] == [*OUTPUTS]
    assert "id" not in client.infer(model, images(photos[0])).get_response()


def test_pixels_in_binary_and_in_json(client: Any, model: str, photos: list[bytes]) -> None:
    given = (images(photos[1]), pixels(photos[1], binary=True), pixels(photos[1], binary=False))
    rows = [client.infer(model, each, headers={"X-Width": "1"}).as_numpy("probabilities") for each in given]
    assert np.array_equal(rows[1], rows[2])
    assert np.allclose(rows[0], rows[1], atol=0.02)


@pytest.mark.parametrize("binary", [True, False])
def test_classification(client: Any, model: str, photos: list[bytes], binary: bool) -> None:
    outputs = [triton.InferRequestedOutput("probabilities", binary_data=binary, class_count=3)]
    best = client.infer(model, images(*photos[:2]), outputs=outputs).as_numpy("probabilities")
    assert best.shape == (2, 3)
    for row in best:
        texts = [each.decode() if isinstance(each, bytes) else each for each in row]
        values = [float(text.split(":")[0]) for text in texts]
        assert values == sorted(values, reverse=True)
        assert all(len(text.split(":", 2)) == 3 for text in texts)


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_compression_both_ways(server: Running, client: Any, model: str, photos: list[bytes], coding: str) -> None:
    given = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
    pinned = {"X-Width": "0.5"}
    for binary in (True, False):
        outputs = wanted(binary=binary)
        result = client.infer(model, images(*photos[:4]), outputs=outputs, headers={**pinned}, **given)

        async def scenario(client: Any, outputs: list[Any] = outputs) -> Any:
            return await client.infer(model, images(*photos[:4]), outputs=outputs, headers={**pinned}, **given)

        for found in (result, asyncio_client(server, scenario)):
            assert found.as_numpy("probabilities").shape[0] == 4
            assert found.as_numpy("label").shape == (4, 1)
    answer = server.http.post(
        f"/v2/models/{model}/infer",
        content=photos[0],
        headers={"Inference-Header-Content-Length": "0", "Accept-Encoding": "identity"},
    )
    assert "Content-Encoding" not in answer.headers


def test_the_asyncio_client(server: Running, client: Any, model: str, photos: list[bytes]) -> None:
    async def scenario(client: Any) -> list[Any]:
        calls = [client.infer(model, images(photo), headers={"X-Width": "1"}) for photo in photos[:10]]
        return await asyncio.gather(*calls)

    results = asyncio_client(server, scenario)
    for photo, result in zip(photos, results, strict=False):
        best = classified(server, photo, **{"X-Width": "1"})["predictions"][0]
        assert result.as_numpy("probabilities")[0][best["class_id"]] == pytest.approx(best["score"], abs=0.02)


def test_a_raw_request(server: Running, client: Any, model: str, photos: list[bytes]) -> None:
    """As ``curl --data-binary`` sends it, and read by the client's own parser."""
    reply = server.http.post(
        f"/v2/models/{model}/infer", content=photos[0], headers={"Inference-Header-Content-Length": "0"}
    )
    parse = client.parse_response_body
    result = parse(reply.content, header_length=int(reply.headers["Inference-Header-Content-Length"]))
    assert result.as_numpy("probabilities").shape == (1, 200)


def test_budgets_and_priorities(server: Running, client: Any, model: str, photos: list[bytes]) -> None:
    result = client.infer(model, images(photos[0]), timeout=5_000_000, priority=1)
    assert result.get_response()["parameters"] == {"budget_ms": 5000, "budget_met": True}
    result = client.infer(model, images(photos[0]), parameters={"latency_budget_ms": 2500}, timeout=5_000_000)
    assert result.get_response()["parameters"]["budget_ms"] == 2500
    result = client.infer(model, images(photos[0]), headers={"X-Latency-Budget-Ms": "1500"}, timeout=5_000_000)
    assert result.get_response()["parameters"]["budget_ms"] == 1500
    with pytest.raises(InferenceServerException, match="cannot be met") as refusal:
        client.infer(model, images(photos[0]), timeout=10)
    assert refusal.value.status() == "422"


def test_errors_are_read_by_both_clients(server: Running, client: Any, model: str, photos: list[bytes]) -> None:
    mistakes: list[tuple[str, dict[str, Any], str]] = [
        ("404", {"model_name": "other", "inputs": images(photos[0])}, "no model 'other'"),
        ("404", {"model_name": model, "inputs": images(photos[0]), "model_version": "2"}, "no version '2'"),
        ("422", {"model_name": model, "inputs": images(photos[0], photos[1][:200])}, "Image 1"),
        ("415", {"model_name": model, "inputs": images(b"no image")}, "no image"),
        ("400", {"model_name": model, "inputs": images()}, "shape"),
        ("400", {"model_name": model, "inputs": images(photos[0]) + pixels(photos[0], binary=True)}, "exactly one"),
        ("400", {"model_name": model, "inputs": images(photos[0]), "timeout": -1}, "timeout"),
        ("422", {"model_name": model, "inputs": images(photos[0]), "headers": {"X-Width": "0.3"}}, "0.3"),
        ("413", {"model_name": model, "inputs": images(*photos[:1] * 257)}, "257 images"),
    ]
    for status, given, text in mistakes:
        with pytest.raises(InferenceServerException, match=text) as error:
            client.infer(**given)
        assert error.value.status() == status

        async def scenario(client: Any, given: dict[str, Any] = given) -> None:
            await client.infer(**given)

        with pytest.raises(InferenceServerException, match=text) as error:
            asyncio_client(server, scenario)
        assert error.value.status() == status
    with pytest.raises(InferenceServerException, match="no model 'other'"):
        client.get_model_metadata("other")
    with pytest.raises(InferenceServerException, match="cannot be loaded"):
        client.load_model(model)


def test_statistics_grow(client: Any, model: str, photos: list[bytes]) -> None:
    (before,) = client.get_inference_statistics(model)["model_stats"]
    client.infer(model, images(*photos[:3]))
    (after,) = client.get_inference_statistics()["model_stats"]
    assert after["inference_count"] == before["inference_count"] + 3
    assert after["execution_count"] > before["execution_count"]
    spent = (
        after["inference_stats"][stage]["ns"] - before["inference_stats"][stage]["ns"]
        for stage in ("success", "compute_infer")
    )
    assert all(ns > 0 for ns in spent)
    assert after["inference_stats"]["success"]["count"] == before["inference_stats"]["success"]["count"] + 1
    assert after["last_inference"] >= before["last_inference"]
