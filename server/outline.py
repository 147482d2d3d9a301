"""What an image's bytes hold besides its pixels, counted before Pillow goes through it.

Pillow reads all of that in Python, before any pixel and whatever its amount: seconds for a file of a few MB.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from scala_model.preprocess import MAX_EXIF_BYTES

# Each scan of a progressive JPEG goes over all pixels again, for as little as 75 bytes. Encoders write about ten.
MAX_SCANS = 100

# What Pillow goes through in Python before any pixel: a segment of a JPEG or a chunk of a PNG, of 4 bytes or 12, takes
# it 4 us, so that 20 MB of nothing else took 20 s; a number of a TIFF 0.5 to 6; a block of a GIF or a byte of garbage
# between a JPEG's segments 0.1.
MAX_PARTS = 20_000
MAX_SMALL_PARTS = 100  # half a millisecond; cameras write a dozen
_PARTS_PER_PACKED_CHUNK = 1000  # as it is unpacked, to a MB at most: 10 MB of packed profiles took 23 s
_BYTES_PER_TAG = 12  # at least, of EXIF's and MPF's directories: a tag of them is a part, too
_PARTS_PER_MORE_EXIF = 200  # a further segment of EXIF, to which Pillow copies all before it

# A head of a segment, and not stuffing, a fill byte, a restart, or TEM, which libjpeg steps over like a restart.
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_JPEG_PIECE = 2**16  # bytes
_PNG_INFLATED = (b"zTXt", b"iTXt", b"iCCP")  # chunks of metadata that a few bytes blow up, before any pixel
_PNG_HEX_EXIF = b"tEXtRaw profile type exif", b"iTXtRaw profile type exif"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_RIFF_START, _GIF_STARTS = b"RIFF", (b"GIF87a", b"GIF89a")
# By TIFF 6.0, section 2, and BigTIFF: order of bytes, and whether offsets have 8. Pillow reads wrong orders, too.
_TIFF_STARTS: dict[bytes, tuple[Literal["big", "little"], int]] = {
    b"MM\0*": ("big", 4),
    b"II*\0": ("little", 4),
    b"MM*\0": ("big", 4),
    b"II\0*": ("little", 4),
    b"MM\0+": ("big", 8),
    b"II+\0": ("little", 8),
}
_TIFF_OPAQUE = (1, 2, 6, 7)  # kinds of values that stay the bytes they are
JPEG_START = b"\xff\xd8"


class Outline(NamedTuple):
    """``num_parts``, as far as they were counted, of whatever Pillow reads in Python; scans are a JPEG's."""

    num_parts: int = 0
    num_scans: int = 0
    in_first_scan: int = 0  # how many of the colours


def is_plain(body: bytes, outline: Outline) -> bool:
    """Whether nothing in it can take longer than its size and its pixels do."""
    if outline.num_parts > MAX_SMALL_PARTS:
        return False
    if body.startswith(JPEG_START):
        return outline.num_scans == 1
    return body.startswith(_PNG_START) and not any(chunk in body for chunk in _PNG_INFLATED)


def outline_of(body: bytes, most: int = MAX_PARTS) -> Outline:
    """Of any bytes. Counts no further than ``most`` parts, of which each takes 5 us."""
    if body.startswith(JPEG_START):
        return _of_jpeg(body, most)
    if body.startswith(_PNG_START):
        return Outline(_num_chunks(body, most))
    if body.startswith(_RIFF_START):
        return Outline(_num_riff_chunks(body, most))
    if body.startswith(_GIF_STARTS):
        return Outline(_num_blocks_of_gif(body, most))
    return Outline(_num_values_of_tiff(body, most) if body[:4] in _TIFF_STARTS else 0)


def _of_jpeg(body: bytes, most: int) -> Outline:
    """What follows the image's end does not count: phones append whole films."""
    position, num_scans, num_parts, in_first_scan, has_exif = len(JPEG_START), 0, 0, 0, False
    while num_parts <= most:
        marker = _next_marker(body, position, len(body) if num_scans else min(len(body), position + most + 2))
        if not num_scans:  # garbage; behind a scan's head are its pixels
            num_parts += (marker.start() if marker else len(body)) - position
        if marker is None or (code := marker[0][1]) == 0xD9:
            break
        start, size = marker.end(), int.from_bytes(body[marker.end() : marker.end() + 2])
        position = min(start + size, len(body))
        num_parts += 1
        if code == 0xDA:
            if not num_scans:
                in_first_scan = int.from_bytes(body[start + 2 : start + 3])
            num_scans += 1
        elif code == 0xE1 and body.startswith(b"Exif", start + 2):
            num_parts += _PARTS_PER_MORE_EXIF if has_exif else size // _BYTES_PER_TAG
            has_exif = True
        elif code == 0xE2 and body.startswith(b"MPF\0", start + 2):
            num_parts += size // _BYTES_PER_TAG
        elif code == 0xED:  # Photoshop's, of any number of resources
            num_parts += body.count(b"8BIM", start, position)
    return Outline(num_parts, num_scans, in_first_scan)


def _next_marker(body: bytes, start: int, end: int) -> re.Match[bytes] | None:
    """In pieces of about a millisecond, between which other threads get the interpreter."""
    pieces = (_JPEG_MARKER.search(body, at, min(at + _JPEG_PIECE + 1, end)) for at in range(start, end, _JPEG_PIECE))
    return next(filter(None, pieces), None)


def _num_chunks(body: bytes, most: int) -> int:
    position, num_chunks = len(_PNG_START), 0
    while position < len(body) and num_chunks <= most:
        size, kind = int.from_bytes(body[position : position + 4]), body[position + 4 : position + 8]
        num_chunks += _PARTS_PER_PACKED_CHUNK if _is_packed(body, kind, position + 8, size) else 1
        if kind == b"eXIf":
            num_chunks += min(size, MAX_EXIF_BYTES) // _BYTES_PER_TAG
        elif body.startswith(_PNG_HEX_EXIF, position + 4):
            num_chunks += size // (2 * _BYTES_PER_TAG)  # in hexadecimal
        position += 12 + size
    return num_chunks


def _is_packed(body: bytes, kind: bytes, start: int, size: int) -> bool:
    """An iTXt, of text in UTF-8, says behind its keyword whether it is."""
    if kind == b"iTXt":
        keyword_end = body.find(b"\0", start, start + size)
        return keyword_end < 0 or body[keyword_end + 1 : keyword_end + 2] != b"\0"
    return kind in _PNG_INFLATED


def _num_riff_chunks(body: bytes, most: int) -> int:
    position, num_chunks = len(b"RIFFsizeWEBP"), 0
    while position < len(body) and num_chunks <= most:
        size = int.from_bytes(body[position + 4 : position + 8], "little")
        position += 8 + size + size % 2
        num_chunks += 1
    return num_chunks


def _num_blocks_of_gif(body: bytes, most: int) -> int:
    """Before the first image; whatever else stands between blocks is skipped byte by byte, as Pillow does."""
    flags = body[10] if len(body) > 10 else 0
    position, num_blocks = 13 + (3 << (flags % 8 + 1) if flags >= 0x80 else 0), 0
    while position < len(body) and num_blocks <= most and (kind := body[position]) not in b",;":
        num_blocks += 1
        position += 2 if kind == ord("!") else 1
        while kind == ord("!") and position < len(body) and num_blocks <= most and (size := body[position]):
            position += 1 + size
            num_blocks += 1
        position += kind == ord("!")
    return num_blocks


def _num_values_of_tiff(body: bytes, most: int) -> int:
    """Of the first directory: its entries, and the numbers in them."""
    order, offset_bytes = _TIFF_STARTS[body[:4]]
    entry_bytes, count_bytes = 4 + 2 * offset_bytes, 2 if offset_bytes == 4 else 8

    def number(start: int, num_bytes: int) -> int:
        return int.from_bytes(body[start : start + num_bytes], order)

    directory = number(offset_bytes, offset_bytes)
    num_values = num_entries = number(directory, count_bytes)
    for place in range(min(num_entries, most)):
        entry = directory + count_bytes + place * entry_bytes
        if number(entry + 2, 2) not in _TIFF_OPAQUE:
            num_values += number(entry + 4, offset_bytes)
    return num_values
