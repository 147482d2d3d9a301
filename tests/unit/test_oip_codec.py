"""The protocol's bytes, written by hand, and what is read from them; and the other way round."""

from __future__ import annotations

import base64
import gzip
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest

from server.errors import BadRequest, TooLarge, UnsupportedBody
from server.oip.classifier import images_of, the_input
from server.oip.codec import MAX_JSON_VALUES, Output, Request, Tensor, Wanted, read_raw, read_request, write_response
from server.oip.compression import choose_coding, pack, read_coding, unpacked
from tests.unit.toy import png

# As a client was seen to send it: 151 bytes of JSON, then 12 of one element.
SEEN_JSON = (
    b'{"id":"abc","inputs":[{"name":"image","shape":[1,1],"datatype":"BYTES","parameters":{"binary_data_size":12}}],'
    b'"parameters":{"binary_data_output":true}}'
)
SEEN = SEEN_JSON + bytes.fromhex("08000000 ffd8ff004a504547")


def asked(inputs: list[dict[str, Any]], binary: bytes = b"", **others: Any) -> Request:
    text = json.dumps({"inputs": inputs, **others}).encode()
    return read_request(text + binary, len(text))


def pixels(shape: list[int], data: Any) -> dict[str, Any]:
    return {"name": "pixels", "datatype": "UINT8", "shape": shape, "data": data}


def test_a_request_as_a_client_sends_it() -> None:
    request = read_request(SEEN, len(SEEN_JSON))
    assert (request.id, request.outputs, request.binary) == ("abc", None, True)
    assert images_of(the_input(request)) == [b"\xff\xd8\xff\x00JPEG"]


def test_elements_of_any_bytes_follow_each_other() -> None:
    binary = b"\x01\0\0\0a" + b"\0\0\0\0" + b"\x03\0\0\0\0\xff\n"
    given = {"name": "image", "datatype": "BYTES", "shape": [3, 1], "parameters": {"binary_data_size": len(binary)}}
    assert images_of(the_input(asked([given], binary))) == [b"a", b"", b"\0\xff\n"]


def test_json_and_binary_inputs_may_be_mixed_and_binary_ones_come_in_order() -> None:
    def described(name: str, size: int | None) -> dict[str, Any]:
        form = {"data": [0]} if size is None else {"parameters": {"binary_data_size": size}}
        return {"name": name, "datatype": "UINT8", "shape": [size or 1], **form}

    request = asked([described("a", 2), described("b", None), described("c", 0), described("d", 3)], b"12345")
    first, second, third, fourth = request.inputs
    assert (first.uint8().tobytes(), fourth.uint8().tobytes()) == (b"12", b"345")
    assert second.uint8().tolist() == [0]
    assert isinstance(third.data, memoryview)


@pytest.mark.parametrize(
    "data", [[*range(12)], np.arange(12).reshape(1, 2, 2, 3).tolist(), [[*range(6)], [*range(6, 12)]]]
)
def test_pixels_are_flat_or_nested_row_after_row(data: Any) -> None:
    (image,) = images_of(the_input(asked([pixels([1, 2, 2, 3], data)])))
    assert isinstance(image, np.ndarray)
    assert image.dtype == np.uint8
    assert image.tolist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]


def test_an_image_in_json_is_handed_on_as_it_is_for_the_decoder() -> None:
    given = [base64.b64encode(png(7)).decode(), "naïve", "BM\0\0"]
    request = asked([{"name": "image", "datatype": "BYTES", "shape": [3, 1], "data": given}])
    assert images_of(the_input(request)) == given


def test_a_raw_body_is_one_image_and_wants_everything_binary() -> None:
    request = read_raw(b"\0any\xff", "image")
    assert images_of(the_input(request)) == [b"\0any\xff"]
    assert request.binary


def test_what_is_unknown_is_let_through() -> None:
    given = pixels([1, 1, 1, 3], [1, 2, 3]) | {"parameters": {"content_type": "np"}, "more": 1}
    request = asked([given], parameters={"mine": [1], "sequence_id": 5}, later={"a": None}, id="", outputs=None)
    assert (request.id, request.parameters["mine"], request.binary) == ("", [1], False)


def test_outputs_are_asked_for_one_by_one() -> None:
    outputs = [
        {"name": "probabilities", "parameters": {"classification": 2, "binary_data": True}},
        {"name": "label"},
        {"name": "width", "parameters": {"classification": 0}},
    ]
    request = asked([pixels([1, 1, 1, 3], [1, 2, 3])], outputs=outputs, parameters={"binary_data_output": True})
    assert request.outputs == [Wanted("probabilities", True, 2), Wanted("label", False), Wanted("width", False)]


IMAGE: dict[str, Any] = {"name": "image", "datatype": "BYTES", "shape": [1, 1]}
BINARY: dict[str, Any] = IMAGE | {"parameters": {"binary_data_size": 5}}
BAD: dict[str, tuple[Any, bytes, str]] = {
    "no JSON": (None, b"{", "Invalid JSON"),
    "no object": ([], b"", "object"),
    "no inputs": ({}, b"", "inputs"),
    "empty inputs": ({"inputs": []}, b"", "inputs"),
    "nine inputs": ({"inputs": [BINARY] * 9}, b"", "at most 8"),
    "no name": ({"inputs": [{"shape": [1], "datatype": "BYTES"}]}, b"", "inputs.0.name"),
    "a negative dimension": ({"inputs": [IMAGE | {"shape": [-1, 1], "data": []}]}, b"", "inputs.0.shape.0"),
    "a dimension of 2.5": ({"inputs": [IMAGE | {"shape": [2.5, 1], "data": []}]}, b"", "2.5"),
    "a text as shape": ({"inputs": [IMAGE | {"shape": "11", "data": []}]}, b"", "'11'"),
    "no data": ({"inputs": [IMAGE]}, b"", "data or"),
    "data twice": ({"inputs": [BINARY | {"data": ["a"]}]}, b"12345", "either"),
    "size of text": ({"inputs": [IMAGE | {"parameters": {"binary_data_size": "5"}}]}, b"12345", "'5'"),
    "size below 0": ({"inputs": [IMAGE | {"parameters": {"binary_data_size": -1}}]}, b"", "-1"),
    "bytes short": ({"inputs": [BINARY]}, b"1234", "4 bytes are left"),
    "bytes left over": ({"inputs": [BINARY]}, b"\1\0\0\0ab", "1 bytes follow"),
    "an element too long": ({"inputs": [BINARY]}, b"\2\0\0\0a", "element 0 of 1"),
    "a length cut off": ({"inputs": [BINARY | {"shape": [2, 1]}]}, b"\0\0\0\0\0", "element 1 of 2"),
    "an element too many": ({"inputs": [BINARY]}, b"\0\0\0\0a", "1 bytes more"),
    "a billion elements": ({"inputs": [BINARY | {"shape": [10**9, 1]}]}, b"\1\0\0\0a", "element 1 of"),
    "an element that is a number": ({"inputs": [IMAGE | {"data": [1]}]}, b"", "strings"),
    "strings too few": ({"inputs": [IMAGE | {"data": []}]}, b"", "0 elements"),
    "a shape of one dimension": ({"inputs": [IMAGE | {"shape": [1], "data": ["a"]}]}, b"", "[N, 1]"),
    "a shape of two columns": ({"inputs": [IMAGE | {"shape": [1, 2], "data": ["a", "b"]}]}, b"", "[1, 2]"),
    "no images": ({"inputs": [IMAGE | {"shape": [0, 1], "data": []}]}, b"", "[0, 1]"),
    "a wrong type": ({"inputs": [IMAGE | {"datatype": "FP32", "data": ["a"]}]}, b"", "FP32"),
    "pixels too few": ({"inputs": [pixels([1, 1, 1, 3], [1, 2])]}, b"", "2 elements"),
    "pixels above 255": ({"inputs": [pixels([1, 1, 1, 3], [1, 2, 256])]}, b"", "0 to 255"),
    "pixels below 0": ({"inputs": [pixels([1, 1, 1, 3], [1, 2, -1])]}, b"", "0 to 255"),
    "pixels with a point": ({"inputs": [pixels([1, 1, 1, 3], [1, 2, 1.0])]}, b"", "0 to 255"),
    "pixels of text": ({"inputs": [pixels([1, 1, 1, 3], ["1", "2", "3"])]}, b"", "0 to 255"),
    "pixels unevenly nested": ({"inputs": [pixels([1, 1, 1, 3], [[1, 2], 3])]}, b"", "nested"),
    "strings unevenly nested": ({"inputs": [IMAGE | {"shape": [4, 1], "data": [["a"], "bcd"]}]}, b"", "nested"),
    "an object among lists": ({"inputs": [IMAGE | {"shape": [2, 1], "data": [["a"], {"b": 1}]}]}, b"", "nested"),
    "pixels of four channels": ({"inputs": [pixels([1, 1, 1, 4], [1, 2, 3, 4])]}, b"", "[1, 1, 1, 4]"),
    "pixels of no height": ({"inputs": [pixels([1, 0, 1, 3], [])]}, b"", "[1, 0, 1, 3]"),
    "an unknown input": ({"inputs": [IMAGE | {"name": "x", "data": ["a"]}]}, b"", "['x']"),
    "both inputs": ({"inputs": [IMAGE | {"data": ["a"]}, pixels([1, 1, 1, 3], [1, 2, 3])]}, b"", "exactly one"),
    "the same twice": ({"inputs": [IMAGE | {"data": ["a"]}] * 2}, b"", "exactly one"),
    "shared memory": ({"inputs": [IMAGE | {"parameters": {"shared_memory_region": "x"}}]}, b"", "shared memory"),
    "output in shared memory": (
        {"inputs": [IMAGE | {"data": ["a"]}], "outputs": [{"name": "x", "parameters": {"shared_memory_region": "x"}}]},
        b"",
        "shared memory",
    ),
    "-1 classes": (
        {"inputs": [IMAGE | {"data": ["a"]}], "outputs": [{"name": "x", "parameters": {"classification": -1}}]},
        b"",
        "-1",
    ),
    "true classes": (
        {"inputs": [IMAGE | {"data": ["a"]}], "outputs": [{"name": "x", "parameters": {"classification": True}}]},
        b"",
        "True",
    ),
    "binary of text": ({"inputs": [IMAGE | {"data": ["a"]}], "parameters": {"binary_data_output": "no"}}, b"", "'no'"),
    "id of a number": ({"inputs": [IMAGE | {"data": ["a"]}], "id": 5}, b"", "id"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_makes_no_sense_is_refused_in_one_sentence_that_names_it(case: str) -> None:
    given, binary, named = BAD[case]
    text = b"" if given is None else json.dumps(given).encode()
    with pytest.raises(BadRequest) as refusal:
        images_of(the_input(read_request(text + binary, len(text) if given is not None else None)))
    assert named in refusal.value.detail
    assert refusal.value.detail.endswith(".")
    assert len(refusal.value.detail) < 400


def test_json_that_is_longer_than_the_body_is_refused() -> None:
    with pytest.raises(BadRequest, match="164 bytes, but the body has 163"):
        read_request(SEEN, 164)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"inputs":' * 50_000, b'{"id":"\xff"}', b'{"id":"\\ud800"}', b"\0"])
def test_silly_json_is_refused(text: bytes) -> None:
    with pytest.raises(BadRequest):
        read_request(text, None)


def test_json_of_nothing_but_escapes_is_refused_before_it_is_parsed() -> None:
    texts = ["/" * 256, "/" * 600_000]
    few, many = (json.dumps({"id": text, "inputs": [pixels([1, 1, 1, 3], [1, 2, 3])]}) for text in texts)
    assert read_request(few.replace("/", "\\/").encode(), None).id == texts[0]
    with pytest.raises(TooLarge, match="600000 backslashes; the limit is 500000"):
        read_request(many.replace("/", "\\/").encode(), None)


def test_json_that_would_hold_up_everybody_is_refused_before_it_is_parsed() -> None:
    text = json.dumps({"inputs": [pixels([1, 1, 1, 3], [0] * MAX_JSON_VALUES)]}).encode()
    with pytest.raises(TooLarge, match="binary data"):
        read_request(text, None)


def test_a_response_is_json_alone_or_followed_by_its_binary_tensors() -> None:
    numbers = Output("probabilities", (2, 2), np.array([[0.5, 0.25], [1, 0]], np.float32), binary=False)
    texts = Output("label", (2, 1), ["é", ""], binary=False)
    body, json_bytes = write_response({"id": ""}, [numbers, texts])
    assert json_bytes is None
    assert json.loads(body) == {
        "id": "",
        "outputs": [
            {"name": "probabilities", "datatype": "FP32", "shape": [2, 2], "data": [0.5, 0.25, 1, 0]},
            {"name": "label", "datatype": "BYTES", "shape": [2, 1], "data": ["é", ""]},
        ],
    }
    numbers, texts = (Output(each.name, each.shape, each.values, binary=True) for each in (numbers, texts))
    body, json_bytes = write_response({"id": "x"}, [texts, numbers])
    assert json_bytes is not None
    assert [each["parameters"] for each in json.loads(body[:json_bytes])["outputs"]] == [
        {"binary_data_size": 10},
        {"binary_data_size": 16},
    ]
    assert body[json_bytes:] == b"\x02\0\0\0\xc3\xa9" + b"\0\0\0\0" + struct.pack("<4f", 0.5, 0.25, 1, 0)


def test_float32_survives_json_exactly() -> None:
    values = np.random.default_rng(0).random(1000, np.float32)
    body, _ = write_response({"id": "x"}, [Output("p", (1, 1000), values, binary=False)])
    assert np.array_equal(np.array(json.loads(body)["outputs"][0]["data"], np.float32), values)


@pytest.mark.parametrize(("coding", "packed"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_bodies_are_unpacked_in_bounded_pieces(coding: str, packed: Any) -> None:
    for body in (b"", b"x", bytes(5_000_000), np.random.default_rng(0).bytes(300_000)):
        pieces = list(unpacked(packed(body), coding))
        assert b"".join(pieces) == body
        assert max(map(len, pieces)) <= 2**20
        assert len(pieces[0]) <= 2**16
        assert b"".join(unpacked(pack(body, coding), coding)) == body


def test_bodies_that_are_not_what_they_say_are_refused() -> None:
    for broken in (b"{}", gzip.compress(b"x" * 1000)[:-9], gzip.compress(b"x") + b"{}", zlib.compress(b"x"), b""):
        with pytest.raises(BadRequest, match="gzip"):
            list(unpacked(broken, "gzip"))


def test_codings() -> None:
    said = {None: None, "": None, "identity": None, "gzip": "gzip", "X-GZIP": "gzip", " deflate": "deflate"}
    assert {text: read_coding(text) for text in said} == said
    for unknown in ("br", "zstd", "gzip, gzip"):
        with pytest.raises(UnsupportedBody, match=unknown):
            read_coding(unknown)


@pytest.mark.parametrize(
    ("accepted", "chosen"),
    [
        (None, None),
        ("", None),
        ("br", None),
        ("identity", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip;q=0.5", "deflate"),
        ("gzip;q=0, deflate;q=0", None),
        ("*", "gzip"),
        ("*, gzip;q=0", "deflate"),
        ("GZip; q=0.1", "gzip"),
        ("gzip;q=high", None),
    ],
)
def test_the_answer_is_packed_as_the_caller_likes(accepted: str | None, chosen: str | None) -> None:
    assert choose_coding(accepted) == chosen


def test_of_the_codings_that_a_caller_accepts_only_the_first_are_looked_at() -> None:
    assert choose_coding("," * 31 + "gzip") == "gzip"
    assert choose_coding("," * 32 + "gzip") is None


def test_an_empty_tensor_has_no_elements() -> None:
    assert Tensor("x", "BYTES", (0, 1), memoryview(b"")).byte_strings() == []
