"""Images that hold more than pixels: counted and refused, or decoded in a thread, before Pillow goes through it."""

from __future__ import annotations

import io
import re
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from scala_model.preprocess import Preprocessing
from server import outline
from server.decode import ImageDecoder
from server.errors import BrokenImage
from tests.unit.image_bodies import (
    SAMPLES,
    exif_with,
    jpeg_segments,
    jpeg_with,
    photo,
    png,
    png_chunk,
    tiff_directory,
)

SPEC = Preprocessing(48)


@pytest.fixture(autouse=True)
def _pillow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back what a decoder raises


@pytest.fixture
def decode() -> ImageDecoder:
    return ImageDecoder(SPEC, 50_000_000)


def photo_with_scans(count: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").convert("RGB").resize((320, 320)).save(buffer, "JPEG", progressive=True)
    body = buffer.getvalue()
    last = body.rindex(b"\xff\xda")
    return body[:last] + body[last:-2] * count + body[-2:]


def test_a_jpeg_that_goes_over_its_pixels_without_end_is_refused(decode: ImageDecoder) -> None:
    assert decode(photo_with_scans(20)).shape == (48, 48, 3)
    with pytest.raises(BrokenImage):
        decode(photo_with_scans(2000))


def test_scans_do_not_hide_behind_a_marker_without_a_length(decode: ImageDecoder) -> None:
    body = photo_with_scans(1)
    last = body.rindex(b"\xff\xda")
    hidden = b"\xff\x01" + body[last:-2] * 500  # taken for a length, 0xFFDA stepped over nearly all of them
    with pytest.raises(BrokenImage, match="scans"):
        decode(body[:last] + hidden * 4 + body[-2:])


@pytest.mark.parametrize("filler", [b"\xff", b"\xff\x00"])
@pytest.mark.parametrize("behind", [2, -2])
def test_other_threads_run_while_markers_are_looked_for(
    filler: bytes, behind: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search through 20 MB kept the interpreter's lock for 0.2 to 0.4 s."""
    searched = list[int]()

    class Noting:
        def search(self, body: bytes, start: int, end: int) -> re.Match[bytes] | None:
            searched.append(end - start)
            return marker.search(body, start, end)

    marker, photo = outline._JPEG_MARKER, photo_with_scans(1)
    monkeypatch.setattr(outline, "_JPEG_MARKER", Noting())
    outline.outline_of(photo[:behind] + filler * 1_000_000 + photo[behind:])
    assert max(searched) <= 2**16 + 1


@pytest.mark.parametrize("piece", [1, 2, 3, 7])
def test_markers_are_found_wherever_a_piece_ends(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [outline.outline_of(SAMPLES[name]) for name in ("progressive JPEG", "two-image JPEG", "CMYK JPEG")]
    monkeypatch.setattr(outline, "_JPEG_PIECE", piece)
    assert [outline.outline_of(SAMPLES[name]) for name in ("progressive JPEG", "two-image JPEG", "CMYK JPEG")] == whole
    assert whole[0].num_scans > 5


@pytest.mark.parametrize(
    "filler", [b"\xff\xfe\x00\x02", b"\xff\xe1\x00\x02", b"\x00", b"\xff", b"\xff\x00", b"\xff\xd0"]
)
def test_a_jpeg_of_a_million_trifles_is_refused_at_once(filler: bytes, decode: ImageDecoder) -> None:
    photo = photo_with_scans(1)
    assert decode(photo[:2] + filler * 1000 + photo[2:]).shape == (48, 48, 3)
    started = time.process_time()
    with pytest.raises(BrokenImage):
        decode(photo[:2] + filler * 1_000_000 + photo[2:])
    assert time.process_time() - started < 0.5  # 0.06 to 0.12, instead of seconds


def test_a_png_of_a_million_trifles_is_refused_at_once(decode: ImageDecoder) -> None:
    body = png(64, 64, chunks=png_chunk(b"abCd", b"") * 1_000_000)
    started = time.process_time()
    with pytest.raises(BrokenImage):
        decode(body)
    assert time.process_time() - started < 0.1


def gif_with(blocks: bytes) -> bytes:
    body = SAMPLES["GIF"]
    start = 13 + (3 << (body[10] % 8 + 1))
    return body[:start] + blocks + body[start:]


def webp_with(chunks: bytes) -> bytes:
    buffer = io.BytesIO()
    photo(64, 64).save(buffer, "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0")
    body = buffer.getvalue() + chunks
    return body[:4] + struct.pack("<L", len(body) - 8) + body[8:]


def tiff_with(kind: int, count: int, size: int, *, big: bool = False) -> bytes:
    """A grey image of 8 x 8 pixels that has ``count`` orientations of ``size`` bytes each."""
    entry, first = ("<HHQQ", 16) if big else ("<HHLL", 8)
    end = first + (8 if big else 2) + 10 * struct.calcsize(entry) + (8 if big else 4)
    tags = [(256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, end)]
    tags += [(274, kind, count, end + 64), (277, 3, 1, 1), (278, 3, 1, 8), (279, 4, 1, 64)]
    head = struct.pack("<2sHHHQ", b"II", 43, 8, 0, first) if big else struct.pack("<2sHL", b"II", 42, first)
    head += struct.pack("<Q" if big else "<H", len(tags)) + b"".join(struct.pack(entry, *tag) for tag in tags)
    return head.ljust(end, b"\0") + bytes(64) + b"\x01" * (count * size)


PACKED = zlib.compress(bytes(1_000_000), 9)
RESOURCES = jpeg_segments(0xED, b"Photoshop 3.0\0", b"8BIM\0\0\0\0\0\0\0\0" * 5000)
TRIFLES = {
    "a GIF's comment of single bytes": (
        gif_with,
        b"!\xfe" + b"\x01x" * 30 + b"\0",
        b"!\xfe" + b"\x01x" * 2_500_000 + b"\0",
    ),
    "a GIF's comments": (gif_with, b"!\xfe\x01x\0" * 30, b"!\xfe\x01x\0" * 1_000_000),
    "a GIF's application": (gif_with, b"!\xff\x01x\0", b"!\xff\x0bNETSCAPE2.0" + b"\x01x" * 2_500_000 + b"\0"),
    "a GIF's garbage": (gif_with, b"\x01" * 30, b"\x01" * 5_000_000),
    "a GIF's controls": (gif_with, b"!\xf9\x04\0\0\0\0\0" * 3, b"!\xf9\x04\0\0\0\0\0" * 600_000),
    "a WebP's chunks": (webp_with, b"abcd\0\0\0\0" * 30, b"abcd\0\0\0\0" * 2_400_000),
    "a PNG's profiles": (
        lambda chunks: png(1, 1, chunks=chunks, pixels=bytes(4)),
        png_chunk(b"iCCP", b"a\0\0" + PACKED),
        png_chunk(b"iCCP", b"a\0\0" + PACKED) * 1000,
    ),
    "a PNG's texts": (
        lambda chunks: png(1, 1, chunks=chunks, pixels=bytes(4)),
        png_chunk(b"iTXt", b"a\0\0\0\0\0plain") * 30,
        png_chunk(b"iTXt", b"a\0\1\0\0\0" + PACKED) * 1000,
    ),
    "a PNG's EXIF in a text": (
        lambda chunks: png(1, 1, chunks=chunks, pixels=bytes(4)),
        png_chunk(b"iTXt", b"Raw profile type exif\0\0\0\0\0" + b"\nexif\n 9\n" + b"0" * 10_000),
        png_chunk(b"iTXt", b"Raw profile type exif\0\0\0\0\0" + b"\nexif\n 9\n" + b"0" * 1_000_000),
    ),
    "a JPEG's EXIF": (
        jpeg_with,
        jpeg_segments(0xE1, b"Exif\0\0", bytes(60_000)),
        jpeg_segments(0xE1, b"Exif\0\0", bytes(60_000)) * 300,
    ),
    "a JPEG's resources": (jpeg_with, RESOURCES, RESOURCES * 300),
}


@pytest.mark.parametrize("case", TRIFLES)
def test_metadata_of_a_million_trifles_is_refused_at_once(case: str, decode: ImageDecoder) -> None:
    """Pillow took 0.6 s for 5 MB of a GIF's comments and 23 s for 10 MB of a PNG's packed profiles."""
    made, few, many = TRIFLES[case]
    assert decode(made(few)).shape == (SPEC.image_size, SPEC.image_size, 3)
    body = made(many)
    started = time.process_time()
    with pytest.raises(BrokenImage, match=r"20000 parts.*save it anew, without metadata"):
        decode(body)
    assert time.process_time() - started < 0.2


@pytest.mark.parametrize("big", [False, True])
def test_a_tiff_of_a_million_numbers_is_refused_at_once(decode: ImageDecoder, big: bool) -> None:
    """Two million ratios took 12 s."""
    assert decode(tiff_with(5, 1000, 8, big=big)).shape == decode(tiff_with(7, 1_000_000, 1, big=big)).shape
    body = tiff_with(5, 2_000_000, 8, big=big)
    started = time.process_time()
    with pytest.raises(BrokenImage, match="20000 parts"):
        decode(body)
    assert time.process_time() - started < 0.2


def test_exif_is_read_as_far_as_a_jpeg_could_hold_it(decode: ImageDecoder) -> None:
    """Two million orientations in a PNG took 7 s; the one of a long EXIF still counts."""
    turned = tiff_directory((0x0112, 3, 1, 6)) + bytes(1_000_000)
    pixels = b"".join(b"\0" + bytes(3 * [shade]) * 64 for shade in range(64))
    upright = decode(png(64, 64, pixels=pixels))
    assert np.array_equal(decode(png(64, 64, chunks=png_chunk(b"eXIf", turned), pixels=pixels)), np.rot90(upright, 3))
    many = exif_with(0x0112, 5, 2_000_000, struct.pack("<LL", 1, 3) * 2_000_000)
    started = time.process_time()
    assert np.array_equal(decode(png(64, 64, chunks=png_chunk(b"eXIf", many), pixels=pixels)), upright)
    assert time.process_time() - started < 0.5


def test_what_has_many_parts_is_not_decoded_in_place(decode: ImageDecoder) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    photo = buffer.getvalue()
    for filler in (b"\xff\xfe\x00\x02", b"\x00"):
        assert decode.if_small(photo[:2] + filler * 10 + photo[2:]) is not None
        assert decode.if_small(photo[:2] + filler * 1000 + photo[2:]) is None
    few, many = (exif_with(0x0110, 1, 1, bytes(12 * count)) for count in (20, 2000))
    for marker, head in ((0xE1, b"Exif\0\0"), (0xE2, b"MPF\0")):
        assert decode.if_small(photo[:2] + jpeg_segments(marker, head, few) + photo[2:]) is not None
        assert decode.if_small(photo[:2] + jpeg_segments(marker, head, many) + photo[2:]) is None, "many tags"
    plain = png(64, 64, pixels=bytes(64 * (1 + 3 * 64)))
    assert decode.if_small(plain) is not None
    for kind, prefix in ((b"eXIf", b""), (b"tEXt", b"Raw profile type exif\0")):
        assert decode.if_small(plain[:33] + png_chunk(kind, prefix + few) + plain[33:]) is not None
        assert decode.if_small(plain[:33] + png_chunk(kind, prefix + many) + plain[33:]) is None, "many tags"
    assert decode.if_small(plain[:33] + png_chunk(b"abCd", b"") * 1000 + plain[33:]) is None


@pytest.mark.parametrize(
    "body", [b"\xff\xd8" + b"\xff\xfe\x00\x02" * 8000, b"II*\0\x08\0\0\0\xff\xff" + bytes(32_000)], ids=["JPEG", "TIFF"]
)
def test_parts_are_counted_in_place_only_as_far_as_matters(body: bytes, decode: ImageDecoder) -> None:
    """All 8,000 of them kept the event loop for 25 ms."""

    def seconds() -> float:
        started = time.thread_time()
        assert decode.if_small(body) is None
        return time.thread_time() - started

    assert min(seconds() for _ in range(5)) < 0.005


def test_a_film_behind_a_photo_is_no_part_of_it(decode: ImageDecoder) -> None:
    film = b"\xff\xda\x00\x00" * 100_000
    assert decode(photo_with_scans(1) + film).shape == (48, 48, 3)


def test_only_what_is_surely_quick_is_decoded_in_place(decode: ImageDecoder) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "JPEG")
    assert decode.if_small(buffer.getvalue()) is not None
    assert decode.if_small(photo_with_scans(1)) is None, "several scans"
    buffer = io.BytesIO()
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 100_000, zip=True)
    Image.new("RGB", (8, 8)).save(buffer, "PNG", pnginfo=text)
    assert decode.if_small(buffer.getvalue()) is None, "compressed metadata"
