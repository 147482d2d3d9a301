"""From the bytes of a request to the pixels the network wants, or to the error that says why not.

Bytes come from strangers: formats are a short list, sizes are checked before pixels are decoded, and whatever Pillow's
parsers stumble over is one of our errors.
"""

from __future__ import annotations

import binascii
import ctypes
import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import numpy as np
from PIL import Image, JpegImagePlugin, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin, _imaging, features

from scala_model.preprocess import Preprocessing, to_pixels
from server import webp
from server.errors import BadRequest, BrokenImage, RequestError, TooLarge, Unavailable, UnsupportedImage
from server.large_images import LARGE_BYTES
from server.outline import JPEG_START, MAX_PARTS, MAX_SCANS, MAX_SMALL_PARTS, Outline, is_plain, outline_of
from server.types import SMALL_BYTES, Encoded, Pixels, Raster

_MEDIA_TYPES_OF = {
    "JPEG": ("image/jpeg", "image/jpg"),
    "PNG": ("image/png",),
    "WEBP": ("image/webp",),
    "GIF": ("image/gif",),
    "BMP": ("image/bmp", "image/x-ms-bmp"),
    "TIFF": ("image/tiff",),
    "AVIF": ("image/avif",),
}
IMAGE_FORMATS = tuple(name for name in _MEDIA_TYPES_OF if name != "AVIF" or features.check("avif"))
MEDIA_TYPES = tuple(media_type for name in IMAGE_FORMATS for media_type in _MEDIA_TYPES_OF[name])

Received = Encoded | Raster | RequestError  # one image of a request, or why a part of it is none

_BASE64_PIECE = 2**18  # characters; a multiple of four

# Types that say nothing about the bytes, which then speak for themselves. The last is what `curl --data-binary` sends.
_SNIFFED = ("", "application/octet-stream", "image/*", "application/x-www-form-urlencoded")
_MAGIC_BYTES = 16  # as many as Pillow looks at

SMALL_PIXELS = 256 * 256  # with SMALL_BYTES, decoded in about a millisecond at most

# Pillow copies the pixels of an AVIF while it keeps the interpreter's lock: 16 million for 35 ms, 49 for 140.
MAX_AVIF_PIXELS = 16_000_000

# Pillow decodes the run lengths of a BMP in Python: 20 MB of them for 11 s, and 15 million pixels of 4 bits for 1.6.
MAX_RUN_LENGTH_BYTES, MAX_RUN_LENGTH_PIXELS = 2**17, 2**20

# What decoding takes besides the image as Pillow holds it, in bytes a pixel.
_PILLOW_BYTES = 4
_BYTES_BESIDE = {"WEBP": 8, "AVIF": 12, "TIFF": 8}

# A segment that tells Pillow a resolution, which it would otherwise dig out of EXIF when it opens a JPEG: garbage there
# would cost a good image, and 20 MB of garbage ten seconds. Its fifth byte hides it from libjpeg, to which JFIF would
# also say that the colours are YCbCr.
_RESOLUTION = b"\xff\xe0\x00\x0eJFIF+\x01\x01\x01\x00\x48\x00\x48"


def check_media_type(declared: str | None) -> None:
    """Raises ``UnsupportedImage`` unless ``declared``, a Content-Type, is an image type we read or leaves it open."""
    media_type = (declared or "").partition(";")[0].strip().lower()
    if media_type not in _SNIFFED and media_type not in MEDIA_TYPES:
        raise UnsupportedImage(
            f"The declared type {media_type[:100]!r} is not an image type we read; "
            f"send one of {', '.join(MEDIA_TYPES)}, or no type at all."
        )


@dataclass(frozen=True)
class ImageDecoder:
    """Decodes one encoded image, in any thread. ``max_pixels`` limits the width times the height that it declares.

    Building one makes three settings that Pillow knows for the whole process only, so that no request has to: its own
    size limit is raised to ``max_pixels`` where it is lower; its warnings, whose texts a request can make up, reach
    neither the log nor Python's ever-growing list of warnings given; and what it and libtiff think of an image is not
    told.
    """

    spec: Preprocessing
    max_pixels: int

    def __post_init__(self) -> None:
        Image.init()  # all plugins now, instead of in the first request
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, self.max_pixels)
        warnings.filterwarnings("ignore", module=r"PIL\.")
        logging.getLogger("PIL").setLevel(logging.CRITICAL)
        _silence_libtiff()

    def __call__(self, image: Encoded | Raster) -> Pixels:
        """The pixels that the network wants of an encoded image, or of one that needs no decoding.

        Raises ``BadRequest`` for an empty image and for text that is no base64, ``UnsupportedImage`` for bytes that are
        no image we know, ``TooLarge`` before decoding more than ``max_pixels``, ``BrokenImage`` for an image that
        fails to decode, and ``Unavailable`` for one that does so because there is no memory.
        """
        if isinstance(image, np.ndarray):
            height, width, _ = image.shape
            self._check_pixels(width, height)
            return to_pixels(Image.fromarray(image), self.spec)
        body = _bytes_of(image)
        with self._our_errors(body), self._open(body, outline_of(body)) as opened:
            return to_pixels(_beside_others(opened, body), self.spec)

    def unless_large(self, image: Encoded | Raster) -> Pixels | int:
        """The same for an image that takes at most ``LARGE_BYTES`` of memory; how many it takes, its head alone read,
        for a larger one."""
        if isinstance(image, np.ndarray):
            return self(image)
        body = _bytes_of(image)
        outline = outline_of(body)
        with self._our_errors(body), self._open(body, outline) as opened:
            num_bytes = _bytes_for(opened, outline)
            return num_bytes if num_bytes > LARGE_BYTES else to_pixels(_beside_others(opened, body), self.spec)

    def if_small(self, image: Encoded | Raster) -> Pixels | None:
        """The same for an image that takes about a millisecond at most; None, nothing decoded, for any other.

        Small is a JPEG of one scan, or a PNG without compressed metadata, of at most ``SMALL_BYTES`` and
        ``MAX_SMALL_PARTS`` that declares at most ``SMALL_PIXELS``; or a decoded image of as many pixels.
        """
        if isinstance(image, np.ndarray):
            return self(image) if image.size <= 3 * SMALL_PIXELS else None
        if len(image) > SMALL_BYTES:
            return None
        body = _bytes_of(image)
        outline = outline_of(body, MAX_SMALL_PARTS)
        if not is_plain(body, outline):
            return None
        with self._our_errors(body), self._open(body, outline) as opened:
            return to_pixels(opened, self.spec) if opened.width * opened.height <= SMALL_PIXELS else None

    @contextmanager
    def _our_errors(self, body: bytes) -> Iterator[None]:
        try:
            yield
        except RequestError:
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            num_pixels = next(iter(re.findall(r"\d+", str(error))), "too many")
            raise self._too_large(num_pixels) from error
        except UnidentifiedImageError as error:
            raise _unidentified(body) from error
        except MemoryError as error:
            if not self._has_memory():
                raise _no_memory() from error
            raise _broken() from error
        except Exception as error:  # the plugins raise whatever their parsers stumble over, even MemoryError
            raise _broken() from error

    def _has_memory(self) -> bool:
        """Whether there is room for the largest image. Nothing of it is touched, so it costs nothing."""
        try:
            np.empty(4 * self.max_pixels, np.uint8)
        except MemoryError:
            return False
        return True

    def _open(self, body: bytes, outline: Outline) -> Image.Image:
        if not body:
            raise BadRequest("The image is empty; send the bytes of an encoded image.")
        if outline.num_scans > MAX_SCANS:
            raise BrokenImage(f"The image has more than {MAX_SCANS} scans: save it anew, with fewer.")
        if outline.num_parts > MAX_PARTS:
            raise BrokenImage(
                f"The image has more than {MAX_PARTS} parts beside its pixels, such as segments, chunks, tags "
                "and strips: save it anew, without metadata, a TIFF in few strips."
            )
        if body.startswith(JPEG_START):
            body = JPEG_START + _RESOLUTION + body[len(JPEG_START) :]
        image = Image.open(io.BytesIO(body), formats=IMAGE_FORMATS)
        for width, height in _declared_sizes(image):
            self._check_pixels(width, height)
        if image.format == "AVIF" and (num_pixels := image.width * image.height) > MAX_AVIF_PIXELS:
            raise TooLarge(
                f"The image declares {image.width} x {image.height} = {num_pixels} pixels; the limit for AVIF is "
                f"{MAX_AVIF_PIXELS}: send a smaller one, or a JPEG or PNG of it."
            )
        if image.tile and image.tile[0].codec_name == "bmp_rle":
            _check_run_lengths(len(body), image.width * image.height)
        if isinstance(image, TiffImagePlugin.TiffImageFile):
            _check_overlap(image)
        # A JPEG can be decoded at 1/2, 1/4 or 1/8 for a fraction of the time. Twice the size that we need is left,
        # so that the final, antialiased resize decides what the image looks like. A square fits both orientations.
        enough = 2 * self.spec.shorter_side
        image.draft("RGB", (enough, enough))
        return image

    def _check_pixels(self, width: int, height: int) -> None:
        if width * height > self.max_pixels:
            raise self._too_large(f"{width} x {height} = {width * height}")

    def _too_large(self, num_pixels: str) -> TooLarge:
        return TooLarge(
            f"The image declares {num_pixels} pixels; the limit is {self.max_pixels} (SCALA_MAX_PIXELS): send a "
            "smaller one."
        )


def _silence_libtiff() -> None:
    """It would write a line to standard error for each fault it finds, past the log and its form, and wait there if
    nobody reads. Pillow has no setting for it, but is linked with it."""
    with suppress(OSError, AttributeError):  # linked in another way: then it is not silent
        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _bytes_of(encoded: Encoded) -> bytes:
    """Raises BadRequest or Unavailable. In pieces of a millisecond, between which other threads get the interpreter."""
    if isinstance(encoded, bytes):
        return encoded
    try:
        pieces = (encoded[start : start + _BASE64_PIECE] for start in range(0, len(encoded), _BASE64_PIECE))
        body = b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in pieces)
        if len(body) != 3 * len(encoded) // 4 - encoded[-2:].count("="):
            raise ValueError("Excess data after padding")  # in the middle, where a piece happened to end
    except ValueError as error:
        raise BadRequest(
            f"The image is not base64: {error}. Send it in the standard alphabet, padded, without line breaks and "
            "without 'data:' before it."
        ) from None
    except MemoryError as error:
        raise _no_memory() from error
    return body


def _declared_sizes(image: Image.Image) -> Iterator[tuple[int, int]]:
    """What decoding allocates or goes through, as (width, height) in pixels."""
    yield image.size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # A tile may be larger than its image: 0.9 MB can hold one of 30000 x 30000 pixels in an image of 64 x 64. Each
        # is decoded whole: 20 of 26 million pixels, all of the same few bytes, took 1.2 s.
        tags = image.tag_v2
        width, height = int(tags.get(TiffImagePlugin.TILEWIDTH, 0)), int(tags.get(TiffImagePlugin.TILELENGTH, 0))
        if width > 0 and height > 0:
            yield -(-image.width // width) * width, -(-image.height // height) * height


def _check_overlap(image: TiffImagePlugin.TiffImageFile) -> None:
    """Its strips may cover it again and again: 9900 times the same 20 MB took 24 s."""
    boxes = [tile.extents for tile in image.tile if tile.extents is not None]
    num_pixels = sum((right - left) * (lower - upper) for left, upper, right, lower in boxes)
    if num_pixels > len(image.getbands()) * image.width * image.height:  # each colour may have strips of its own
        raise BrokenImage(
            f"The image's strips or tiles cover {num_pixels} pixels, of which it has {image.width} x {image.height}: "
            "save it anew."
        )


def _check_run_lengths(num_bytes: int, num_pixels: int) -> None:
    if num_bytes > MAX_RUN_LENGTH_BYTES or num_pixels > MAX_RUN_LENGTH_PIXELS:
        raise TooLarge(
            f"The run-length encoded BMP has {num_bytes} bytes and {num_pixels} pixels; the limits for such are "
            f"{MAX_RUN_LENGTH_BYTES} and {MAX_RUN_LENGTH_PIXELS}: send it without run lengths, or a PNG of it."
        )


def _beside_others(image: Image.Image, body: bytes) -> Image.Image:
    return webp.decoded(image, body) if isinstance(image, WebPImagePlugin.WebPImageFile) else image


def _bytes_for(image: Image.Image, outline: Outline) -> int:
    """About what decoding it takes at once, Pillow's own 4 bytes a pixel included."""
    num_pixels = max(width * height for width, height in _declared_sizes(image))
    num_bytes = (_PILLOW_BYTES + _BYTES_BESIDE.get(image.format or "", 0)) * num_pixels
    if isinstance(image, JpegImagePlugin.JpegImageFile) and (
        "progressive" in image.info or outline.in_first_scan < image.layers
    ):  # all coefficients, of 2 bytes, before the first pixel: see libjpeg's initial_setup
        scale = image.decoderconfig[0]  # what the draft divides by
        num_bytes += 2 * len(image.getbands()) * image.width * scale * image.height * scale
    return num_bytes


def _unidentified(body: bytes) -> RequestError:
    """Pillow says the same of a damaged header as of no image at all; the first bytes tell them apart."""
    accepts = (Image.OPEN[name][1] for name in IMAGE_FORMATS)
    if any(accept is not None and accept(body[:_MAGIC_BYTES]) for accept in accepts):
        return _broken()
    return UnsupportedImage(f"The bytes are no image we recognise; we read {', '.join(IMAGE_FORMATS)}.")


def _broken() -> BrokenImage:
    return BrokenImage("The image is damaged or incomplete; check that it opens in an image viewer and send all of it.")


def _no_memory() -> Unavailable:
    return Unavailable("The server has no memory to decode this image now; try again in a second.")
