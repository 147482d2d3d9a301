"""Good images of every format, and the pieces that odd ones are made of."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image

from server.decode import IMAGE_FORMATS


def photo(width: int, height: int) -> Image.Image:
    """Smooth and colourful, as photos are."""
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, image_format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def samples() -> dict[str, bytes]:
    """Every format, and the variants that take another path through Pillow."""
    image = photo(48, 36)
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    bodies = {name: encoded(image, name, exif=oriented(6)) for name in IMAGE_FORMATS}
    return bodies | {
        "progressive JPEG": encoded(image, "JPEG", progressive=True),
        "CMYK JPEG": encoded(image.convert("CMYK"), "JPEG"),
        "two-image JPEG": encoded(image, "MPO", **frames),
        "palette PNG": encoded(image.quantize(16), "PNG", transparency=bytes(range(0, 256, 16))),
        "animated PNG": encoded(image, "PNG", **frames),
        "lossless WEBP": encoded(image, "WEBP", lossless=True),
        "animated WEBP": encoded(image, "WEBP", **frames),
        "animated GIF": encoded(image, "GIF", **frames),
        "LZW TIFF": encoded(image, "TIFF", compression="tiff_lzw"),
        "JPEG TIFF": encoded(image, "TIFF", compression="jpeg"),
    }


SAMPLES = samples()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(width: int, height: int, *, chunks: bytes = b"", pixels: bytes = b"") -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(pixels)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + chunks + data


def jpeg_segments(marker: int, head: bytes, data: bytes) -> bytes:
    parts = [head + data[start : start + 65000] for start in range(0, len(data), 65000)]
    return b"".join(struct.pack(">BBH", 0xFF, marker, len(part) + 2) + part for part in parts)


def jpeg_with(segments: bytes) -> bytes:
    body = SAMPLES["progressive JPEG"]
    assert body[2:4] == b"\xff\xe0"
    return body[:2] + segments + body[20:]  # without the JFIF segment: its resolution would keep Pillow out of EXIF


def tiff_directory(*tags: tuple[int, int, int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", 0)


def exif_with(tag: int, kind: int, count: int, data: bytes) -> bytes:
    """One tag whose data, if any, follows the directory."""
    return tiff_directory((tag, kind, count, 26 if data else 0)) + data
