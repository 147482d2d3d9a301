"""Images that nobody should send: real ones of every format, drawn here, then cut, flipped, swapped, mixed, inflated.

All chance comes from the ``random.Random`` that is handed in, so that hypothesis can choose and shrink it.
"""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache
from random import Random

from PIL import ExifTags, Image, PngImagePlugin

from server.decode import IMAGE_FORMATS
from tests.service.service_process import draw_photos

MIB = 2**20
MAX_BYTES = 40_000  # of what is no bomb: some can be decoded in place, some cannot
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@cache
def samples() -> tuple[bytes, ...]:
    """Good images: every format that the server reads, and variants that take another path through the decoders."""
    first, second = (Image.open(io.BytesIO(photo)) for photo in draw_photos(2, size=32))
    noted = PngImagePlugin.PngInfo()
    noted.add_text("Title", "a note " * 20)
    noted.add_text("Comment", "a packed note " * 20, zip=True)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "described"

    def frames() -> dict[str, object]:
        return {"save_all": True, "append_images": [second.copy()]}

    variants: list[tuple[Image.Image, str, dict[str, object]]] = [
        *((first, name, {}) for name in IMAGE_FORMATS),
        (first, "JPEG", {"progressive": True, "exif": exif}),
        (first, "JPEG", {"icc_profile": b"profile" * 50, "comment": b"a comment"}),
        (first.convert("CMYK"), "JPEG", {}),
        (first.convert("L"), "JPEG", {}),
        (first, "MPO", frames()),
        (first, "PNG", {"pnginfo": noted, "exif": exif, "icc_profile": b"profile" * 50}),
        (first.quantize(16), "PNG", {"transparency": bytes(range(0, 256, 16))}),
        (first.convert("1"), "PNG", {}),
        (first.convert("I;16"), "PNG", {}),
        (first, "PNG", frames()),
        (first, "WEBP", {"lossless": True}),
        (first.convert("RGBA"), "WEBP", {"exif": exif}),
        (first, "WEBP", frames()),
        (first, "GIF", frames()),
        (first, "TIFF", {"compression": "tiff_lzw"}),
        (first, "TIFF", {"compression": "tiff_adobe_deflate", "exif": exif}),
        (first, "TIFF", {"compression": "jpeg"}),
        (first.convert("1"), "TIFF", {"compression": "group4"}),
        (first, "TIFF", frames()),
        (first.quantize(16), "BMP", {}),
    ]
    return tuple(_encoded(*variant) for variant in variants)


def _encoded(image: Image.Image, name: str, options: dict[str, object]) -> bytes:
    file = io.BytesIO()
    image.copy().save(file, name, **options)  # saving leaves things in an image that other formats stumble over
    return file.getvalue()


@cache
def bombs() -> tuple[bytes, ...]:
    """Small files that ask for much: pixels, frames, scans, profiles, EXIF, text, and structures without an end."""
    wide = struct.pack(">LLBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(64 * MIB), 9)
    jpeg, progressive = samples()[0], _encoded(_plain(64, 64), "JPEG", {"progressive": True})
    frames = [_plain(8, 8, shade) for shade in range(200)]
    profile = [segment(0xE2, b"ICC_PROFILE\0" + bytes((i, 255)) + bytes(65_000)) for i in range(1, 33)]
    scan = progressive.rindex(b"\xff\xda")
    return (
        png(wide, chunk(b"IDAT", zlib.compress(bytes(20_000)))),
        png(_header(4000, 4000), chunk(b"IDAT", packed)),
        png(_header(0, 0), b""),
        png(_header(2**31 - 1, 2**31 - 1), b""),
        png(_header(32, 32), chunk(b"zTXt", b"note\0\0" + packed)),
        png(_header(32, 32), chunk(b"iTXt", b"note\0\1\0\0\0" + packed)),
        png(_header(32, 32), chunk(b"iCCP", b"name\0\0" + packed)),
        png(_header(32, 32), chunk(b"tEXt", b"note\0" + bytes(2 * MIB))),
        png(_header(32, 32), chunk(b"tEXt", b"note\0text") * 50_000),
        png(_header(32, 32), chunk(b"acTL", struct.pack(">LL", 2**31 - 1, 0))),
        png(_header(32, 32), struct.pack(">L4s", 2**31 - 1, b"IDAT")),
        jpeg[:2] + b"".join(profile) + jpeg[2:],
        jpeg[:2] + segment(0xE1, b"Exif\0\0" + endless_tiff()) + jpeg[2:],
        jpeg[:2] + segment(0xE1, b"Exif\0\0II*\0" + b"\xff" * 60_000) + jpeg[2:],
        jpeg[:2] + segment(0xFE, bytes(60_000)) * 50 + jpeg[2:],
        jpeg[:2] + b"\xff" * 300_000 + jpeg[2:],
        progressive[:scan] + progressive[scan:-2] * 2000,
        progressive[:scan] + (b"\xff\x01" + progressive[scan:-2] * 500) * 4,
        jpeg[:2] + segment(0xE2, b"MPF\0" + tiff(*((tag, 4, 1, 0) for tag in range(2600)))) + jpeg[2:],
        png(_header(32, 32), chunk(b"tEXt", b"Raw profile type exif\0\nexif\n1\n" + b"00" * MIB)),
        _encoded(_plain(4000, 4000), "WEBP", {"lossless": True}),
        endless_tiff(),
        tiff(*((tag, 4, 1, 30_000) for tag in (256, 257)), (258, 3, 1, 8)),
        tiff((256, 4, 1, 32), (257, 4, 1, 32), (322, 4, 1, 60_000), (323, 4, 1, 60_000), (324, 4, 1, 8)),
        tiff((256, 4, 2**31, 0)),
        b"GIF89a" + struct.pack("<HHBBB", 65_535, 65_535, 0xF7, 0, 0) + bytes(768) + b",",
        _encoded(frames[0], "GIF", {"save_all": True, "append_images": frames[1:]}),
        _encoded(frames[0], "WEBP", {"save_all": True, "append_images": frames[1:40]}),
        bmp(40, 30_000, -30_000, 1, 24, 0, 0, 0, 0, 0, 0),
        bmp(40, 32, 32, 1, 8, 1, 0, 0, 0, 2**31 - 1, 0),
        b"RIFF" + struct.pack("<L", 2**32 - 1) + b"WEBPVP8X" + struct.pack("<L", 10) + bytes(4) + b"\xff" * 6,
        b"RIFF" + struct.pack("<L", 2**32 - 1) + b"WEBP" + (b"EXIF" + struct.pack("<L", 0)) * 50_000,
    )  # fmt: skip


def hostile_image(random: Random, bomb_share: float = 0.02) -> bytes:
    """A good image with up to four wrongs, or a bomb."""
    if random.random() < bomb_share:
        return random.choice(bombs())
    body = random.choice(samples())
    for _ in range(random.randint(1, 4)):
        body = random.choice(WRONGS)(random, body)[:MAX_BYTES]
    return body


def _truncated(random: Random, body: bytes) -> bytes:
    return body[: random.randint(0, len(body))]


def _bits_flipped(random: Random, body: bytes) -> bytes:
    flipped = bytearray(body)
    for _ in range(random.randint(1, 8) if body else 0):
        place = random.randrange(len(body))
        flipped[place] ^= 1 << random.randrange(8)
    return bytes(flipped)


def _number_changed(random: Random, body: bytes) -> bytes:
    """A length, a size, an offset: whatever stands there. Mostly near the beginning, where they are."""
    end = min(len(body), 200) if random.random() < 0.7 else len(body)
    place, number = random.randint(0, end), random.choice(EXTREMES)
    form = random.choice(("B", "<H", ">H", "<L", ">L"))
    size = struct.calcsize(form)
    return body[:place] + struct.pack(form, number % 256**size) + body[place + size :]


def _chunks_swapped(random: Random, body: bytes) -> bytes:
    a, b, c, d = sorted(random.randint(0, len(body)) for _ in range(4))
    return body[:a] + body[c:d] + body[b:c] + body[a:b] + body[d:]


def _chunk_repeated(random: Random, body: bytes) -> bytes:
    start, end = sorted(random.randint(0, len(body)) for _ in range(2))
    return body[:end] + body[start:end] * random.choice((1, 2, 50)) + body[end:]


def _chunk_dropped(random: Random, body: bytes) -> bytes:
    start, end = sorted(random.randint(0, len(body)) for _ in range(2))
    return body[:start] + body[end:]


def _polyglot(random: Random, body: bytes) -> bytes:
    """Two formats in one: one behind the other, or one's beginning with the other's rest."""
    other = random.choice(samples())
    if random.random() < 0.5:
        return body + other
    place = random.choice((2, 4, 8, 12, 16, 64))
    return other[:place] + body[place:]


def _padded(random: Random, body: bytes) -> bytes:
    place = random.randint(0, len(body))
    return body[:place] + bytes((random.choice((0, 0xFF)),)) * random.choice((1, 3, 64, 5000)) + body[place:]


WRONGS = (
    _truncated,
    _bits_flipped,
    _number_changed,
    _chunks_swapped,
    _chunk_repeated,
    _chunk_dropped,
    _polyglot,
    _padded,
)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">L", len(data)) + kind + data + struct.pack(">L", zlib.crc32(kind + data))


def png(header: bytes, chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks + chunk(b"IEND", b"")


def bmp(*header: int) -> bytes:
    return b"BM" + struct.pack("<LHHL", 60, 0, 0, 54) + struct.pack("<LllHHLLllLL", *header)


def segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


def tiff(*tags: tuple[int, int, int, int]) -> bytes:
    entries = b"".join(struct.pack("<HHLL", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<LH", 8, len(tags)) + entries + struct.pack("<L", 0)


def endless_tiff() -> bytes:
    """A directory whose next one, and whose EXIF, is itself."""
    entry = struct.pack("<HHLL", 0x8769, 4, 1, 8)
    return b"II*\0" + struct.pack("<LH", 8, 1) + entry + struct.pack("<L", 8)


def _header(width: int, height: int) -> bytes:
    return struct.pack(">LLBBBBB", width, height, 8, 2, 0, 0, 0)


def _plain(width: int, height: int, shade: int = 128) -> Image.Image:
    return Image.new("RGB", (width, height), (shade, shade, shade))
