"""The protocol's codec on whatever bytes there are: what is written is read again, and nothing breaks it."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import RequestError
from server.oip.classifier import images_of, the_input
from server.oip.codec import Output, read_request, write_response
from server.oip.compression import choose_coding, pack, unpacked

few = settings(max_examples=40, deadline=None, derandomize=True, database=None)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=4,
)
NAMES = st.sampled_from(["image", "pixels", "x"])


def framed(elements: list[bytes]) -> bytes:
    return b"".join(len(each).to_bytes(4, "little") + each for each in elements)


@few
@given(st.lists(st.binary(max_size=50), min_size=1, max_size=8))
def test_byte_strings_are_read_as_they_were_written(elements: list[bytes]) -> None:
    binary = framed(elements)
    tensor = {"name": "image", "datatype": "BYTES", "shape": [len(elements), 1]}
    text = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(binary)}}]}).encode()
    assert images_of(the_input(read_request(text + binary, len(text)))) == elements


@few
@given(st.tuples(*[st.integers(1, 4)] * 3), st.randoms(use_true_random=False), st.booleans())
def test_pixels_are_the_same_in_json_and_in_bytes(size: tuple[int, int, int], random: Any, nested: bool) -> None:
    shape = (*size, 3)
    array = np.array([random.randrange(256) for _ in range(int(np.prod(shape)))], np.uint8).reshape(shape)
    described = {"name": "pixels", "datatype": "UINT8", "shape": shape}
    text = json.dumps({"inputs": [described | {"data": (array if nested else array.ravel()).tolist()}]}).encode()
    assert np.array_equal(np.stack(images_of(the_input(read_request(text, None)))), array)
    text = json.dumps({"inputs": [described | {"parameters": {"binary_data_size": array.size}}]}).encode()
    read = images_of(the_input(read_request(text + array.tobytes(), len(text))))
    assert np.array_equal(np.stack(read), array)


@few
@given(
    st.fixed_dictionaries(
        {
            "inputs": st.lists(
                st.fixed_dictionaries(
                    {"name": NAMES, "shape": values},
                    optional={
                        "datatype": st.sampled_from(["BYTES", "UINT8"]) | values,
                        "data": values,
                        "parameters": values,
                    },
                ),
                max_size=3,
            )
            | values
        },
        optional={"id": values, "parameters": values, "outputs": values},
    ),
    st.binary(max_size=20),
    st.integers(-5, 5),
)
def test_any_json_and_any_rest_is_read_or_refused(document: Any, rest: bytes, off: int) -> None:
    text = json.dumps(document).encode()
    _read_or_refused(text + rest, max(0, len(text) + off))


@few
@given(st.binary(max_size=200), st.none() | st.integers(0, 250))
def test_any_bytes_are_read_or_refused(body: bytes, json_bytes: int | None) -> None:
    _read_or_refused(body, json_bytes)


def _read_or_refused(body: bytes, json_bytes: int | None) -> None:
    with suppress(RequestError):  # and nothing else is raised
        images_of(the_input(read_request(body, json_bytes)))


@few
@given(st.lists(st.text(max_size=20), max_size=6), st.lists(st.floats(width=32, allow_nan=False), max_size=6))
def test_a_binary_response_can_be_taken_apart(texts: list[str], numbers: list[float]) -> None:
    array = np.array(numbers, np.float32)
    outputs = [Output("label", (len(texts), 1), texts, True), Output("width", (len(array), 1), array, True)]
    body, json_bytes = write_response({"id": "x"}, outputs)
    sizes = [entry["parameters"]["binary_data_size"] for entry in json.loads(body[:json_bytes])["outputs"]]
    assert json_bytes is not None
    label, width = body[json_bytes : json_bytes + sizes[0]], body[json_bytes + sizes[0] :]
    assert label == framed([text.encode() for text in texts])
    assert len(width) == sizes[1]
    assert np.array_equal(np.frombuffer(width, "<f4"), array)


@few
@given(st.binary(max_size=300), st.sampled_from(["gzip", "deflate"]))
def test_a_body_survives_packing_and_any_bytes_are_unpacked_or_refused(body: bytes, coding: str) -> None:
    assert b"".join(unpacked(pack(body, coding), coding)) == body
    with suppress(RequestError):
        list(unpacked(body, coding))


@few
@given(st.text(max_size=40))
def test_any_wish_for_a_coding_is_understood_or_ignored(text: str) -> None:
    assert choose_coding(text) in (None, "gzip", "deflate")
