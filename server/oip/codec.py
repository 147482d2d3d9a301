"""From a body to tensors and from tensors to a body: JSON, followed by the bytes of each binary tensor in order.

Binary tensors are little-endian and row-major; an element of BYTES is its length in 4 bytes and then itself.
https://github.com/kserve/open-inference-protocol and its extension "binary tensor data".
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_core import to_json

from server.errors import BadRequest, TooLarge
from server.json_body import count_bytes, parse_json
from server.oip.schemas import InferenceRequest, RequestInput
from server.types import Encoded

# JSON is parsed in one go that nothing can interrupt: so many numbers take 20 ms, in which nobody else is served.
MAX_JSON_VALUES = 250_000
LENGTH_BYTES = 4
_PIECE_VALUES = 10_000  # written in about a millisecond


@dataclass(frozen=True, slots=True)
class Tensor:
    """One input: ``data`` as JSON had it, flat or nested, or the bytes that followed the JSON, or a body that is all.

    Bytes are a list's only element in the last case alone: JSON has none.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[Any] | memoryview

    def byte_strings(self) -> Sequence[Encoded]:
        """The elements of a BYTES tensor, those of JSON still base64. Raises BadRequest."""
        if isinstance(self.data, memoryview):
            return list(self._split(self.data))
        texts = self._flat(self.data)
        if not all(isinstance(text, Encoded) for text in texts):
            raise BadRequest(f"The data of {self.name} must be strings.")
        return texts

    def uint8(self) -> NDArray[np.uint8]:
        """A UINT8 tensor, read-only. Raises BadRequest."""
        if isinstance(self.data, memoryview):
            self._check_size(len(self.data), "bytes")
            return np.frombuffer(self.data, np.uint8).reshape(self.shape)
        flat = self._flat(self.data)
        try:
            values = bytes(flat)
        except (TypeError, ValueError):
            raise BadRequest(f"The data of {self.name} must be whole numbers from 0 to 255.") from None
        return np.frombuffer(values, np.uint8).reshape(self.shape)

    def _split(self, data: memoryview) -> Iterator[bytes]:
        position, count = 0, math.prod(self.shape)
        for place in range(count):
            start = position + LENGTH_BYTES
            position = start + int.from_bytes(data[position:start], "little")
            if max(start, position) > len(data):
                raise BadRequest(f"The binary data of {self.name} ends within element {place} of {count}.")
            yield bytes(data[start:position])
        if position < len(data):
            raise BadRequest(f"{self.name} holds {len(data) - position} bytes more than its {count} elements.")

    def _flat(self, data: list[Any]) -> list[Any]:
        while data and isinstance(data[0], list):
            if not all(isinstance(part, list) for part in data):
                raise BadRequest(f"The data of {self.name} must be flat or nested evenly.")
            data = list(chain.from_iterable(data))
        self._check_size(len(data), "elements")
        return data

    def _check_size(self, size: int, unit: str) -> None:
        if size != math.prod(self.shape):
            raise BadRequest(
                f"{self.name} holds {size} {unit}, but its shape {list(self.shape)} takes {math.prod(self.shape)}."
            )


@dataclass(frozen=True, slots=True)
class Wanted:
    """An output that was asked for. ``classes``: how many of the best, 0 for the tensor as it is."""

    name: str
    binary: bool
    classes: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """``outputs`` is None when none are named, which means all of them; ``binary`` is how those are to be sent then."""

    id: str | None
    parameters: Mapping[str, Any]
    inputs: Sequence[Tensor]
    outputs: Sequence[Wanted] | None
    binary: bool


@dataclass(frozen=True, slots=True)
class Output:
    """``values``: float32 in row-major order, or as many texts."""

    name: str
    shape: tuple[int, ...]
    values: NDArray[np.float32] | Sequence[str]
    binary: bool

    @property
    def datatype(self) -> str:
        return "FP32" if isinstance(self.values, np.ndarray) else "BYTES"

    def to_bytes(self) -> bytes:
        if isinstance(self.values, np.ndarray):
            return self.values.astype("<f4").tobytes()
        encoded = [text.encode() for text in self.values]
        return b"".join(len(each).to_bytes(LENGTH_BYTES, "little") + each for each in encoded)

    def to_json(self) -> bytes:
        """All values as one list, written in pieces between which other threads get the interpreter."""
        flat = self.values.ravel() if isinstance(self.values, np.ndarray) else self.values
        pieces = (flat[start : start + _PIECE_VALUES] for start in range(0, len(flat), _PIECE_VALUES))
        texts = (to_json(piece.tolist() if isinstance(piece, np.ndarray) else list(piece)) for piece in pieces)
        return b"[" + b",".join(text[1:-1] for text in texts) + b"]"


def read_raw(body: bytes, name: str) -> Request:
    """A body that is the only element of its only input; all outputs come back binary."""
    return Request(None, {}, [Tensor(name, "BYTES", (1, 1), [body])], None, binary=True)


def read_request(body: bytes, json_bytes: int | None) -> Request:
    """``json_bytes``: how many of the body are JSON, None for all of them. Raises BadRequest or TooLarge."""
    if json_bytes is None:
        json_bytes = len(body)
    if json_bytes > len(body):
        raise BadRequest(f"The JSON is said to have {json_bytes} bytes, but the body has {len(body)}: send all of it.")
    asked = _parse(body[:json_bytes])
    rest, inputs = memoryview(body)[json_bytes:], []
    for each in asked.inputs:
        tensor, rest = _tensor(each, rest)
        inputs.append(tensor)
    if rest:
        raise BadRequest(f"{len(rest)} bytes follow the inputs: their binary_data_size must add up to the body's rest.")
    parameters = asked.parameters or {}
    binary = _flag(parameters, "binary_data_output", "parameters")
    return Request(asked.id, parameters, inputs, _wanted(asked), binary)


def _parse(text: bytes) -> InferenceRequest:
    num_values = count_bytes(text, b",") + count_bytes(text, b"[")
    if num_values > MAX_JSON_VALUES:
        raise TooLarge(
            f"The JSON holds about {num_values} values; the limit is {MAX_JSON_VALUES}: send tensors as binary data."
        )
    try:
        document = parse_json(text)
        if not isinstance(document, dict):
            raise ValueError("it must be an object")
        return InferenceRequest.model_validate(document)
    except TooLarge:
        raise
    except ValidationError as refusal:
        error = refusal.errors(include_url=False)[0]
        place, what = ".".join(map(str, error["loc"])), error["msg"]
        if place:
            found = "" if error["type"] == "missing" else f"; it is {reprlib.repr(error['input'])[:100]}"
            what = f"{place}: {what}{found}"
        raise BadRequest(f"The request cannot be read: {what}.") from None
    except ValueError as error:
        raise BadRequest(f"The request cannot be read: Invalid JSON: {error}.") from None


def _tensor(given: RequestInput, rest: memoryview) -> tuple[Tensor, memoryview]:
    """An input, and what of the binary data is left for the others."""
    parameters, where = given.parameters or {}, f"Input {given.name[:50]!r}"
    if "shared_memory_region" in parameters:
        raise BadRequest(f"{where} is in shared memory, which this server does not read: send it in the body.")
    size = parameters.get("binary_data_size")
    if (size is None) == (given.data is None):
        raise BadRequest(f"{where} must have either data or the parameter binary_data_size.")
    if given.data is not None:
        return Tensor(given.name, given.datatype, tuple(given.shape), given.data), rest
    if type(size) is not int or not 0 <= size <= len(rest):
        raise BadRequest(
            f"{where} has binary_data_size {reprlib.repr(size)}, but {len(rest)} bytes are left of the body."
        )
    return Tensor(given.name, given.datatype, tuple(given.shape), rest[:size]), rest[size:]


def _wanted(asked: InferenceRequest) -> list[Wanted] | None:
    """A named output that says nothing of its form is JSON, whatever ``binary_data_output`` says of the others."""
    wanted = []
    for output in asked.outputs or ():
        parameters, where = output.parameters or {}, f"output {output.name[:50]!r}"
        if "shared_memory_region" in parameters:
            raise BadRequest(f"The {where} is wanted in shared memory, which this server does not write.")
        classes = parameters.get("classification", 0)
        if type(classes) is not int or classes < 0:
            raise BadRequest(
                f"classification of {where} is {reprlib.repr(classes)}; it must be a number of classes, 1 or more."
            )
        wanted.append(Wanted(output.name, _flag(parameters, "binary_data", where), classes))
    return wanted or None


def _flag(parameters: Mapping[str, Any], name: str, where: str) -> bool:
    value = parameters.get(name, False)
    if type(value) is not bool:
        raise BadRequest(f"{name} of {where} is {reprlib.repr(value)}; it must be true or false.")
    return value


def write_response(frame: Mapping[str, Any], outputs: Sequence[Output]) -> tuple[bytes, int | None]:
    """The body, and how many bytes of it are JSON if anything follows."""
    described, binary = [], []
    for output in outputs:
        entry = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
        if output.binary:
            binary.append(output.to_bytes())
            described.append(to_json({**entry, "parameters": {"binary_data_size": len(binary[-1])}}))
        else:
            described.append(to_json(entry)[:-1] + b',"data":' + output.to_json() + b"}")
    text = to_json(frame)[:-1] + b',"outputs":[' + b",".join(described) + b"]}"
    return (b"".join([text, *binary]), len(text)) if binary else (text, None)
