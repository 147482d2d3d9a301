"""From a decoded image to the pixels a network sees: one path for training evaluation and for serving.

The engine subtracts the mean and divides by the standard deviation; here pixels stay 8 bit, so that a request in a
queue costs a quarter of the memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

# What EXIF 2.32 (tag 0x0112) says the camera did, undone. 1 is upright, and so is anything we do not know.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDEWAYS = (
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
)
# Where the upright image's left comes from the right, or its top from below, once rows and columns have changed places.
_FROM_THE_RIGHT = (
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
)
_FROM_BELOW = (
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
)
# By EXIF 2.32 all of it fits into one segment of a JPEG. A PNG or WebP can hold more: orientations, two million of
# which took 7 s to read. The orientation is at the beginning.
MAX_EXIF_BYTES = 65536

# Of 50 million pixels with transparency Pillow holds 200 MB; a copy with an alpha channel and another on white would
# hold 400 MB more. So large images are converted in bands, which stay in the processor's cache as well.
MAX_WHOLE_PIXELS = 2**22
BAND_PIXELS = 2**18
_TILE = 512  # side of a square of so many
_BICUBIC_SUPPORT = 2  # pixels to either side of the middle, of the larger of both images

Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Preprocessing:
    """How a model card wants its images: a centre crop of ``image_size`` x ``image_size`` pixels.

    ``crop_ratio`` is the share of the resized shorter side that the crop keeps; ``mean`` and ``std`` are per channel
    (RGB) of pixels scaled to 0..1, ImageNet's unless given. Raises ``ValueError`` for values that make no sense.
    """

    image_size: int
    crop_ratio: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}: give a whole number of pixels, at least 1")
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio is {self.crop_ratio}: give a share above 0 and at most 1")
        if len(self.mean) != 3 or not all(map(math.isfinite, self.mean)):
            raise ValueError(f"mean is {self.mean}: give three finite numbers, one for each of R, G and B")
        if len(self.std) != 3 or not all(math.isfinite(value) and value > 0 for value in self.std):
            raise ValueError(f"std is {self.std}: give three finite numbers above 0, one for each of R, G and B")

    @property
    def shorter_side(self) -> int:
        """The shorter side of the resized image, in pixels, before the centre crop."""
        return round(self.image_size / self.crop_ratio)


def to_pixels(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
    """The centre crop of an image of any mode and size, uint8 (image_size, image_size, 3), C-contiguous.

    Resized with Pillow's antialiased bicubic filter; an image that has the right size already keeps its pixels. Of one
    of more than ``MAX_WHOLE_PIXELS`` no second copy is made. Raises whatever Pillow raises for an image that cannot be
    decoded.
    """
    _load(image)
    if image.width * image.height > MAX_WHOLE_PIXELS:
        return _in_bands(image, spec)
    rgb, size = to_rgb(image), spec.image_size
    return np.array(rgb.resize((size, size), Image.Resampling.BICUBIC, box=_crop_box(*rgb.size, spec)))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: upright as EXIF says, the first frame of an animation, transparency on white.

    May be the image itself. Raises whatever Pillow raises for an image that cannot be decoded.
    """
    _load(image)
    turn = _turn(image)
    rgb = _on_white(image, _white(image))
    return rgb if turn is None else rgb.transpose(turn)


def _load(image: Image.Image) -> None:
    """Before EXIF is read, which may load too, so that broken pixels never pass for broken metadata."""
    image.seek(0)
    image.load()


def _crop_box(width: int, height: int, spec: Preprocessing) -> Box:
    """What the network sees of an upright image of this size.

    The crop begins on a whole pixel of the resized image, as if it had been resized first: where nothing is to be
    resized, nothing is interpolated. Only the crop is computed, so a 50000 x 1 image costs no more than others.
    """
    size, resized, shorter = spec.image_size, spec.shorter_side, min(width, height)
    left, top = ((length * resized - size * shorter) // (2 * shorter) for length in (width, height))
    scale = shorter / resized
    return left * scale, top * scale, (left + size) * scale, (top + size) * scale


def _in_bands(image: Image.Image, spec: Preprocessing) -> NDArray[np.uint8]:
    """The same as of the whole image, from bands of some rows that are converted, turned and narrowed one by one.

    Pillow resizes the rows first, each by itself, and then the columns: that can be done in two steps. Of tall images
    it may take the columns first (since Pillow 13). Then values differ by 1, since what lies between is rounded, and by
    up to 3 of an image that is a hundred pixels wide and hardly shrunk.
    """
    turn, white, size = _turn(image), _white(image), spec.image_size
    width, height = image.size[::-1] if turn in _SIDEWAYS else image.size
    box = _crop_box(width, height, spec)
    (left, right), (top, bottom) = _reach(box[0], box[2], size, width), _reach(box[1], box[3], size, height)
    # Pillow computes boxes in 32 bits, and what whole numbers are taken off has to be rounded before.
    x0, y0, x1, y1 = (float(np.float32(edge)) - start for edge, start in zip(box, (left, top) * 2, strict=True))
    narrow = Image.new("RGB", (size, bottom - top))
    band_rows = max(1, BAND_PIXELS // (right - left))
    for first in range(top, bottom, band_rows):
        rows = min(band_rows, bottom - first)
        band = _on_white(image.crop(_before(turn, (left, first, right, first + rows), image.size)), white)
        upright = band if turn is None else band.transpose(turn)
        narrowed = upright.resize((size, rows), Image.Resampling.BICUBIC, box=(x0, 0, x1, rows))
        narrow.paste(narrowed, (0, first - top))
    return np.array(narrow.resize((size, size), Image.Resampling.BICUBIC, box=(0, y0, size, y1)))


def _reach(start: float, end: float, size: int, length: int) -> tuple[int, int]:
    """From and up to which of ``length`` pixels the filter looks that resizes this part of them to ``size``."""
    support = _BICUBIC_SUPPORT * max(1.0, (end - start) / size) + 1  # and one for what is rounded
    return max(0, math.floor(start - support)), min(length, math.ceil(end + support))


def _before(
    turn: Image.Transpose | None, box: tuple[int, int, int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """Where a part of the turned image was in the image of this ``size``."""
    left, top, right, bottom = box
    if turn in _SIDEWAYS:
        left, top, right, bottom = top, left, bottom, right
    if turn in _FROM_THE_RIGHT:
        left, right = size[0] - right, size[0] - left
    if turn in _FROM_BELOW:
        top, bottom = size[1] - bottom, size[1] - top
    return left, top, right, bottom


def _turn(image: Image.Image) -> Image.Transpose | None:
    exif = image.info.get("exif", b"")
    if len(exif) > MAX_EXIF_BYTES:
        image.info["exif"] = exif[:MAX_EXIF_BYTES]
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever a parser stumbles over: garbage in the metadata must not cost a good image
        return None


def _on_white(image: Image.Image, white: int) -> Image.Image:
    if _is_deep(image):
        return _deep_grey(image, white)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        on_white = Image.new("RGB", image.size, "white")
        on_white.paste(rgba, mask=rgba)
        return on_white
    return image if image.mode == "RGB" else image.convert("RGB")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _deep_grey(image: Image.Image, white: int) -> Image.Image:
    """Scales what Pillow would clip."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    grey = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _white(image: Image.Image) -> int:
    """The value that is white: 65535 of 16 bits, 255 of 8; of floats that never exceed 1, which are shares of it, 1."""
    if image.mode != "F":
        return 65535 if _is_deep(image) else 255
    tiles = (
        image.crop((left, top, min(left + _TILE, image.width), min(top + _TILE, image.height)))
        for top in range(0, image.height, _TILE)
        for left in range(0, image.width, _TILE)
    )
    return 255 if any((np.asarray(tile) > 1).any() for tile in tiles) else 1
