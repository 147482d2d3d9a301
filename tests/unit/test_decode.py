"""Bytes to pixels, or to one of the contract's errors: never anything else, whatever the bytes are."""

from __future__ import annotations

import base64
import io
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile

from scala_model.preprocess import Preprocessing, to_pixels
from server import decode
from server.decode import IMAGE_FORMATS, MEDIA_TYPES, ImageDecoder, check_media_type
from server.errors import BadRequest, BrokenImage, RequestError, TooLarge, Unavailable, UnsupportedImage
from tests.unit.image_bodies import (
    SAMPLES,
    encoded,
    exif_with,
    jpeg_segments,
    jpeg_with,
    oriented,
    photo,
    png,
    png_chunk,
    tiff_directory,
)

SPEC = Preprocessing(64)
MAX_PIXELS = 50_000_000
NUM_MUTATIONS = 300


@pytest.fixture(autouse=True)
def _pillow_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)  # put back what a decoder raises


@pytest.fixture
def decoder() -> ImageDecoder:
    return ImageDecoder(SPEC, MAX_PIXELS)


# -- declared types


@pytest.mark.parametrize(
    "declared",
    [
        None,
        "",
        "application/octet-stream",
        "image/*",
        "application/x-www-form-urlencoded",
        "IMAGE/JPEG",
        "image/png; charset=binary",
        " image/webp ;q=1",
        *MEDIA_TYPES,
    ],
)
def test_image_types_and_types_that_say_nothing_pass(declared: str | None) -> None:
    check_media_type(declared)


@pytest.mark.parametrize(
    "declared", ["image/svg+xml", "text/html; charset=utf-8", "application/json", "image", "x" * 9999]
)
def test_other_types_are_refused_with_the_types_we_read(declared: str) -> None:
    with pytest.raises(UnsupportedImage) as refusal:
        check_media_type(declared)
    assert declared.partition(";")[0][:100] in refusal.value.detail
    assert "image/jpeg" in refusal.value.detail
    assert len(refusal.value.detail) < 400


# -- good images


@pytest.mark.parametrize("name", SAMPLES)
def test_every_format_decodes_as_its_preprocessing_says(decoder: ImageDecoder, name: str) -> None:
    pixels = decoder(SAMPLES[name])
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    with Image.open(io.BytesIO(SAMPLES[name])) as image:
        np.testing.assert_array_equal(pixels, to_pixels(image, SPEC))


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_one_pixel_is_an_image(decoder: ImageDecoder, image_format: str) -> None:
    pixels = decoder(encoded(Image.new("RGB", (1, 1), (200, 100, 50)), image_format))
    assert np.abs(pixels.astype(int) - (200, 100, 50)).max() <= 12


def test_a_jpeg_that_stores_rgb_keeps_its_colours(decoder: ImageDecoder) -> None:
    pixels = decoder(encoded(Image.new("RGB", (64, 64), (200, 30, 90)), "JPEG", keep_rgb=True, quality=95))
    assert np.abs(pixels.astype(int) - (200, 30, 90)).max() <= 2


def test_base64_of_an_image_is_that_image(decoder: ImageDecoder) -> None:
    """In pieces, where it is long: 1.6 MB are seven."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (640, 640, 3), np.uint8))
    for image in (photo(48, 36), noise):
        body = encoded(image, "PNG")
        np.testing.assert_array_equal(decoder(base64.b64encode(body).decode()), decoder(body))
    assert len(body) > 4 * 2**18


@pytest.mark.parametrize("at", [2**18, 2**19])
def test_base64_that_ends_in_its_middle_is_refused_wherever_that_is(decoder: ImageDecoder, at: int) -> None:
    text = base64.b64encode(bytes(2**20)).decode()
    with pytest.raises(BadRequest, match="base64"):
        decoder(text[: at - 4] + "QQ==" + text[at:])
    with pytest.raises(UnsupportedImage):
        decoder(text)


def test_threads_share_nothing(decoder: ImageDecoder) -> None:
    bodies = [body for body in SAMPLES.values() for _ in range(4)]
    with ThreadPoolExecutor(8) as pool:
        for body, pixels in zip(bodies, pool.map(decoder, bodies), strict=True):
            np.testing.assert_array_equal(pixels, decoder(body))


# -- the fast path for large JPEGs


def full(body: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(body)) as image:
        return to_pixels(image, SPEC)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_fast_path_agrees_with_the_full_one(decoder: ImageDecoder, mode: str, orientation: int) -> None:
    body = encoded(photo(3000, 2000).convert(mode), "JPEG", quality=90, exif=oriented(orientation))
    assert np.abs(decoder(body).astype(int) - full(body).astype(int)).mean() < 1


@pytest.mark.parametrize(
    ("shorter", "decoded"),
    [(64, 64), (255, 255), (256, 128), (511, 256), (512, 128), (1023, 256), (1024, 128), (4096, 512)],
)
def test_twice_the_target_is_always_decoded(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, shorter: int, decoded: int
) -> None:
    sizes: list[tuple[int, int]] = []

    def recorded(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
        sizes.append(image.size)
        return np.zeros((64, 64, 3), np.uint8)

    monkeypatch.setattr(decode, "to_pixels", recorded)
    decoder(encoded(Image.new("L", (shorter, shorter + 8)), "JPEG"))
    assert min(sizes[0]) == decoded


def test_small_images_take_the_full_path(decoder: ImageDecoder) -> None:
    body = encoded(photo(300, 255), "JPEG")
    np.testing.assert_array_equal(decoder(body), full(body))


# -- no image at all


def test_an_empty_body_is_a_bad_request(decoder: ImageDecoder) -> None:
    with pytest.raises(BadRequest):
        decoder(b"")


@pytest.mark.parametrize(
    "body",
    [
        b"\0",
        b"hello",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        bytes(1000),
        encoded(Image.new("RGB", (32, 32)), "PPM"),
        encoded(Image.new("RGB", (32, 32)), "ICO"),
    ],
)
def test_what_is_no_image_that_we_read_is_unsupported(decoder: ImageDecoder, body: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="JPEG, PNG"):
        decoder(body)


# -- too many pixels


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ImageFile.ImageFile) -> None:
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", refuse)


def gif(width: int, height: int) -> bytes:
    """A screen of 1 x 1 with a frame that is larger, and that asks for the background to be restored after it."""
    control = b"!\xf9\x04\x08\0\0\0\0"
    return (
        b"GIF89a"
        + struct.pack("<HHBBB", 1, 1, 0, 0, 0)
        + control
        + b","
        + struct.pack("<HHHHB", 0, 0, width, height, 0)
        + b"\x02\0;"
    )


def bmp(width: int, height: int) -> bytes:
    return (
        b"BM" + struct.pack("<LLL", 0, 0, 54) + struct.pack("<LllHHLLllLL", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    )


def webp(width: int, height: int) -> bytes:
    body = SAMPLES["animated WEBP"]
    return body[:24] + struct.pack("<L", width - 1)[:3] + struct.pack("<L", height - 1)[:3] + body[30:]


def tiff(width: int, height: int) -> bytes:
    return tiff_directory(
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (277, 3, 1, 1),
        (279, 4, 1, 8),
    )


@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("bomb", [png, gif, bmp, webp, tiff])
@pytest.mark.parametrize(("width", "height"), [(8000, 8000), (11000, 11000), (16000, 16000)])
def test_a_bomb_of_any_format_is_too_large(
    decoder: ImageDecoder, bomb: Callable[[int, int], bytes], width: int, height: int
) -> None:
    with pytest.raises(TooLarge) as refusal:
        decoder(bomb(width, height))
    assert str(width * height) in refusal.value.detail
    assert str(MAX_PIXELS) in refusal.value.detail


@pytest.mark.usefixtures("no_decoding")
def test_a_png_of_20000_x_20000_is_refused_at_once(decoder: ImageDecoder) -> None:
    body = png(20000, 20000)
    started = time.perf_counter()
    with pytest.raises(TooLarge, match=r"400000000.*50000000"):
        decoder(body)
    assert time.perf_counter() - started < 0.1


def test_a_small_tiff_with_a_huge_tile_is_too_large(decoder: ImageDecoder) -> None:
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tile = [(322, 4, 1, 30000), (323, 4, 1, 30000), (324, 4, 1, 8), (325, 4, 1, 8)]
    with pytest.raises(TooLarge, match="30000 x 30000"):
        decoder(tiff_directory(*tags, *tile))


def test_a_small_tiff_of_many_long_tiles_is_too_large(decoder: ImageDecoder) -> None:
    """All of the same few bytes: 25 KB of 20 such tiles took 1.2 s, and nothing bounded their number."""
    tags = [(256, 4, 1, 320), (257, 4, 1, 16), (258, 3, 1, 8), (259, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    tiles = [(322, 4, 1, 16), (323, 4, 1, 1_600_000), (324, 4, 20, 8), (325, 4, 20, 8)]
    with pytest.raises(TooLarge, match="320 x 1600000"):
        decoder(tiff_directory(*tags, *tiles))


def test_a_tiff_whose_strips_cover_it_again_and_again_is_broken(decoder: ImageDecoder) -> None:
    """As many as may be took 24 s."""

    def strips(num_rows: int, num_colours: int) -> bytes:
        light, layout = (2, 2) if num_colours > 1 else (1, 1)
        tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, light), (273, 4, 6, 134)]
        tags += [(277, 3, 1, num_colours), (278, 4, 1, num_rows), (279, 4, 6, 158), (284, 3, 1, layout)]
        return tiff_directory(*tags) + struct.pack("<6L", *[182] * 6) + struct.pack("<6L", *[2048] * 6) + bytes(4096)

    assert decoder(strips(32, 3)).shape == (64, 64, 3)
    with pytest.raises(BrokenImage, match="cover 12288 pixels, of which it has 64 x 64: save"):
        decoder.unless_large(strips(63, 1))


@pytest.mark.skipif("AVIF" not in IMAGE_FORMATS, reason="Pillow was built without AVIF")
def test_avif_has_a_limit_of_its_own(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else runs while Pillow copies its pixels."""
    body = encoded(photo(50, 40), "AVIF")
    monkeypatch.setattr(decode, "MAX_AVIF_PIXELS", 2000)
    assert decoder(body).shape == (64, 64, 3)
    monkeypatch.setattr(decode, "MAX_AVIF_PIXELS", 1999)
    with pytest.raises(TooLarge, match=r"50 x 40 = 2000 pixels; the limit for AVIF is 1999: .* a JPEG or PNG"):
        decoder(body)


def run_length_bmp(width: int, height: int, row: bytes) -> bytes:
    """Of 4 bits a pixel; each row is the same codes."""
    codes = (row + b"\x00\x00") * height
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 4, 2, len(codes), 0, 0, 0, 0)
    start = 14 + len(head) + 4 * 16
    return b"BM" + struct.pack("<IHHI", start + len(codes), 0, 0, start) + head + bytes(4 * 16) + codes


@pytest.mark.parametrize(("width", "height", "row"), [(100, 700, b"\x01\x12" * 100), (2000, 600, b"\xfa\x12" * 8)])
def test_run_lengths_of_a_bmp_have_limits_of_their_own(
    decoder: ImageDecoder, width: int, height: int, row: bytes
) -> None:
    """Pillow keeps the interpreter for as long as it decodes them."""
    assert decoder(run_length_bmp(100, 600, b"\x01\x12" * 100)).shape == (64, 64, 3)
    body = run_length_bmp(width, height, row)
    with pytest.raises(TooLarge, match=f"BMP has {len(body)} bytes and {width * height} pixels; .* a PNG of it"):
        decoder.unless_large(body)


def test_the_limit_itself_is_allowed() -> None:
    body = encoded(photo(50, 40), "PNG")
    assert ImageDecoder(SPEC, 2000)(body).shape == (64, 64, 3)
    with pytest.raises(TooLarge, match=r"50 x 40 = 2000.*1999"):
        ImageDecoder(SPEC, 1999)(body)


def test_a_limit_above_pillows_own_decodes_without_a_warning() -> None:
    decoder = ImageDecoder(Preprocessing(8), 200_000_000)
    body = encoded(Image.new("L", (10000, 10000)), "JPEG")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert decoder(body).shape == (8, 8, 3)


# -- broken images


def only_contract_errors(decoder: ImageDecoder, bodies: Iterator[bytes]) -> int:
    """How many of ``bodies`` failed. An exception that is not of the contract ends the test."""
    num_failed = 0
    for body in bodies:
        try:
            pixels = decoder(body)
        except RequestError:
            num_failed += 1
        else:
            assert pixels.shape == (64, 64, 3)
    return num_failed


@pytest.mark.parametrize("name", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP"])
def test_half_an_image_is_broken(decoder: ImageDecoder, name: str) -> None:
    body = SAMPLES.get(name, SAMPLES["JPEG"])  # some Pillows read no AVIF
    with pytest.raises(BrokenImage) as broken:
        decoder(body[: len(body) // 2])
    assert broken.value.__cause__ is not None
    assert "PIL" not in broken.value.detail
    assert "<" not in broken.value.detail


def test_a_damaged_header_is_broken_and_not_unrecognised(decoder: ImageDecoder) -> None:
    for body in (SAMPLES["PNG"][:20], SAMPLES["JPEG"][:10], SAMPLES["GIF"][:8], SAMPLES["TIFF"][:9]):
        with pytest.raises(BrokenImage):
            decoder(body)


@pytest.mark.parametrize("name", SAMPLES)
def test_truncation_anywhere_ends_in_the_contract(decoder: ImageDecoder, name: str) -> None:
    body = SAMPLES[name]
    cuts = sorted({*range(1, min(len(body), 100)), *range(100, len(body), max(1, len(body) // 100))})
    assert only_contract_errors(decoder, (body[:cut] for cut in cuts)) >= len(cuts) // 3


@pytest.mark.parametrize("name", SAMPLES)
def test_mutation_anywhere_ends_in_the_contract(decoder: ImageDecoder, name: str) -> None:
    rng = np.random.default_rng(11)

    def mutated() -> bytes:
        body = bytearray(SAMPLES[name])
        reach = len(body) if rng.random() < 0.5 else min(len(body), 300)  # the header is where parsers live
        for position in rng.integers(0, reach, rng.choice([1, 2, 4, 16])):
            body[position] = rng.integers(256)
        return bytes(body)

    assert only_contract_errors(decoder, (mutated() for _ in range(NUM_MUTATIONS))) > 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(),
        struct.error(),
        SyntaxError(),
        ValueError(),
        EOFError(),
        zlib.error(),
        MemoryError(),
        IndexError(),
        KeyError(),
        TypeError(),
        OverflowError(),
        ZeroDivisionError(),
        AttributeError(),
        AssertionError(),
        RuntimeError(),
        SystemError(),
        RecursionError(),
    ],
)
def test_whatever_a_plugin_raises_is_a_broken_image(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(BrokenImage) as broken:
        decoder(SAMPLES["PNG"])
    assert broken.value.__cause__ is error


def test_an_image_that_fails_to_decode_for_lack_of_memory_is_not_called_broken(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is none for the largest image: one of exabytes."""

    def fail(self: ImageFile.ImageFile) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(Unavailable, match="no memory to decode"):
        replace(decoder, max_pixels=2**60)(SAMPLES["PNG"])


def test_base64_for_which_there_is_no_memory_is_not_a_fault_of_the_server(
    decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("binascii.a2b_base64", Mock(side_effect=MemoryError))
    with pytest.raises(Unavailable, match="no memory to decode"):
        decoder("AAAA")


@pytest.mark.parametrize("error", [Image.DecompressionBombError("9"), Image.DecompressionBombWarning("9")])
def test_pillows_own_limit_is_ours(decoder: ImageDecoder, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(self: ImageFile.ImageFile) -> None:
        raise error

    monkeypatch.setattr(ImageFile.ImageFile, "load", fail)
    with pytest.raises(TooLarge, match=f"9 pixels.*{MAX_PIXELS}"):
        decoder(SAMPLES["PNG"])


# -- hostile metadata


GARBAGE = {
    "no directory": b"garbage",
    "directory nowhere": b"II*\0\xff\xff\xff\xff",
    "directory cut short": b"MM\0*\0\0\0\x08\0\x09\0",
    "orientation of ratios": exif_with(0x0112, 5, 1, struct.pack("<LL", 1, 0)),
    "orientation of text": exif_with(0x0112, 2, 20, b"upside down or so...."),
    "orientation of many numbers": exif_with(0x0112, 3, 30, bytes(60)),
    "orientation of none": exif_with(0x0112, 3, 0, b""),
    # Pillow looks for a resolution when it opens a JPEG, and stumbles over a single byte that should be a ratio.
    "resolution of a byte": tiff_directory((0x0128, 3, 1, 2), (0x011A, 7, 1, 1)),
}


@pytest.mark.parametrize("exif", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_exif_costs_no_good_image(decoder: ImageDecoder, exif: bytes) -> None:
    plain = decoder(SAMPLES["progressive JPEG"])
    np.testing.assert_array_equal(decoder(jpeg_with(jpeg_segments(0xE1, b"Exif\0\0", exif))), plain)
    pixels = b"\0" + bytes([10, 20, 30])
    assert decoder(png(1, 1, chunks=png_chunk(b"eXIf", exif), pixels=pixels))[0, 0].tolist() == [10, 20, 30]


def test_huge_exif_is_not_read(decoder: ImageDecoder) -> None:
    num_ratios = 500_000  # Pillow takes two seconds to read as many
    directory = tiff_directory((0x0128, 3, 1, 2), (0x011A, 5, num_ratios, 38))
    exif = directory + struct.pack("<LL", 1, 3) * num_ratios
    body = jpeg_with(jpeg_segments(0xE1, b"Exif\0\0", exif))
    started = time.perf_counter()
    np.testing.assert_array_equal(decoder(body), decoder(SAMPLES["progressive JPEG"]))
    assert time.perf_counter() - started < 1


@pytest.mark.parametrize(
    "segments",
    [
        jpeg_segments(0xE2, b"ICC_PROFILE\0\1\1", bytes(1_000_000)),
        jpeg_segments(0xE2, b"MPF\0", b"II*\0garbage"),
        jpeg_segments(0xED, b"Photoshop 3.0\0", b"8BIM\x03\xed\0\0\xff\xff\xff\xff"),
        jpeg_segments(0xFE, b"", b"comment" * 100_000),
        jpeg_segments(0xE1, b"http://ns.adobe.com/xap/1.0/\0", b'tiff:Orientation="9'),
    ],
    ids=["profile", "multi-picture", "photoshop", "comment", "xmp"],
)
def test_other_metadata_costs_no_good_jpeg(decoder: ImageDecoder, segments: bytes) -> None:
    np.testing.assert_array_equal(decoder(jpeg_with(segments)), decoder(SAMPLES["progressive JPEG"]))


@pytest.mark.parametrize(
    "chunks",
    [
        png_chunk(b"zTXt", b"bomb\0\0" + zlib.compress(bytes(50_000_000))),
        png_chunk(b"iCCP", b"bomb\0\0" + zlib.compress(bytes(50_000_000))),
        png_chunk(b"tEXt", b"long\0" + b"x" * 1_000_000) * 10,
        png_chunk(b"tEXt", b"transparency\0x"),
        png_chunk(b"tEXt", b"bbox\0x"),
        png_chunk(b"tEXt", b"Raw profile type exif\0\n\n\nnot hexadecimal"),
        png_chunk(b"acTL", struct.pack(">LL", 0, 0)),
        png_chunk(b"acTL", struct.pack(">LL", 2**31, 0)),
        png_chunk(b"PLTE", bytes(7)),
        png_chunk(b"tRNS", b"\0"),
    ],
)
def test_hostile_chunks_end_in_the_contract(decoder: ImageDecoder, chunks: bytes) -> None:
    only_contract_errors(decoder, iter([png(1, 1, chunks=chunks, pixels=bytes(4))]))


def test_what_libtiff_thinks_of_an_image_is_not_told(decoder: ImageDecoder, capfd: pytest.CaptureFixture[str]) -> None:
    body = bytearray(SAMPLES["LZW TIFF"])
    body[8:200] = b"\xff" * 192
    with pytest.raises(BrokenImage):
        decoder(bytes(body))
    assert capfd.readouterr() == ("", "")


def test_what_pillow_thinks_of_an_image_is_not_logged(decoder: ImageDecoder, caplog: pytest.LogCaptureFixture) -> None:
    num_samples = 277
    size = [(256, 4, 1, 8), (257, 4, 1, 8)]
    only_contract_errors(decoder, iter([tiff_directory(*size, (num_samples, 4, 1, 2048))]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("form", "bytes_a_pixel", "options"),
    [
        ("PNG", 4, {}),
        ("JPEG", 6, {"progressive": True}),
        ("JPEG of one progressive scan", 6, {"progressive": True}),
        ("JPEG of one colour's scan", 6, {}),
        ("TIFF", 12, {}),
        ("WEBP", 12, {}),
        ("AVIF", 16, {"speed": 10}),
    ],
)
def test_a_large_image_takes_of_the_memory_what_its_format_needs(
    form: str, bytes_a_pixel: int, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As measured in a process of its own, to a tenth; but for TIFF and AVIF, which may take less."""
    side, file = 2400, io.BytesIO()
    Image.new("RGB", (side, side)).save(file, form.partition(" ")[0], **options)
    body = file.getvalue()
    if form == "JPEG of one progressive scan":
        body = body[: body.index(b"\xff\xda", body.index(b"\xff\xda") + 1)] + b"\xff\xd9"
    elif form == "JPEG of one colour's scan":
        body = body.replace(b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11", b"\xff\xda\0\x08\1\1\0")
    needed = bytes_a_pixel * side**2
    decoder = ImageDecoder(Preprocessing(side // 16), MAX_PIXELS)
    monkeypatch.setattr(decode, "LARGE_BYTES", 0)
    assert decoder.unless_large(body) == pytest.approx(needed, rel=0.1)
    monkeypatch.setattr(decode, "LARGE_BYTES", 1.1 * needed)
    assert np.array_equal(decoder.unless_large(body), decoder(body))


def test_warnings_that_a_request_provokes_are_not_kept(decoder: ImageDecoder, recwarn: pytest.WarningsRecorder) -> None:
    warnings.filterwarnings("always")
    ImageDecoder(SPEC, MAX_PIXELS)
    only_contract_errors(decoder, iter([SAMPLES["TIFF"][:40], gif(11000, 11000), png(11000, 11000)]))
    assert not recwarn.list


@pytest.mark.parametrize("size", [(64, 64), (90, 200), (1, 1), (300, 300)])
def test_an_image_that_needs_no_decoding_is_resized_like_any_other(
    decoder: ImageDecoder, size: tuple[int, int]
) -> None:
    raster = np.asarray(photo(*size))
    raster.flags.writeable = False
    assert np.array_equal(decoder(raster), to_pixels(photo(*size), SPEC))
    in_place = decoder.if_small(raster)
    assert (in_place is None) == (size == (300, 300))
    assert in_place is None or np.array_equal(in_place, decoder(raster))


def test_an_image_that_needs_no_decoding_may_have_as_many_pixels_as_any_other() -> None:
    decoder = ImageDecoder(SPEC, 100)
    decoder(np.zeros((10, 10, 3), np.uint8))
    with pytest.raises(TooLarge, match="101"):
        decoder(np.zeros((1, 101, 3), np.uint8))
