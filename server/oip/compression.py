"""Content codings of bodies: gzip and deflate (RFC 9110), in bounded pieces."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from server.errors import BadRequest, UnsupportedBody

_WINDOW_BITS = {"gzip": 31, "deflate": 15}  # zlib's wish for its container: gzip's, and its own (RFC 1950)
_IN_PLACE_BYTES, _PIECE_BYTES = 2**16, 2**20
_FASTEST = 1
_MAX_CODINGS = 32  # that are looked at, of those that a caller accepts


def read_coding(content_encoding: str | None) -> str | None:
    """The coding to undo, None for none. Raises UnsupportedBody."""
    coding = (content_encoding or "identity").strip().lower().removeprefix("x-")
    if coding == "identity":
        return None
    if coding not in _WINDOW_BITS:
        raise UnsupportedBody(f"The content coding {coding[:50]!r} is unknown; send gzip, deflate or none.")
    return coding


def unpacked(body: bytes, coding: str) -> Iterator[bytes]:
    """The body in pieces of at most a MiB, the first of 64 KiB; b"" ends it. Raises BadRequest for a broken body."""
    unpacker, size = zlib.decompressobj(_WINDOW_BITS[coding]), _IN_PLACE_BYTES
    while not unpacker.eof:
        try:
            piece = unpacker.decompress(body, size)
        except zlib.error as error:
            raise BadRequest(f"The body is not {coding}: {error}.") from None
        body, size = unpacker.unconsumed_tail, _PIECE_BYTES
        if not piece and not unpacker.eof:
            raise BadRequest(f"The {coding} body is incomplete: send all of it.")
        if piece:
            yield piece
    if unpacker.unused_data:
        raise BadRequest(f"{len(unpacker.unused_data)} bytes follow the {coding} body: send one body.")
    yield b""


def choose_coding(accept_encoding: str | None) -> str | None:
    """gzip or deflate, whichever the caller likes better; None if it names neither."""
    entries = (accept_encoding or "").lower().replace(" ", "").split(",", _MAX_CODINGS)
    weights = dict(map(_weight, entries[:_MAX_CODINGS]))
    best = max(_WINDOW_BITS, key=lambda coding: weights.get(coding, weights.get("*", 0.0)))
    return best if weights.get(best, weights.get("*", 0.0)) > 0 else None


def _weight(entry: str) -> tuple[str, float]:
    coding, _, quality = entry.partition(";q=")
    try:
        return coding, float(quality or 1)
    except ValueError:
        return coding, 0.0


def pack(body: bytes, coding: str) -> bytes:
    packer = zlib.compressobj(_FASTEST, wbits=_WINDOW_BITS[coding])
    return packer.compress(body) + packer.flush()
