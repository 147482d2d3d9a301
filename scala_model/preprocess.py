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
# By EXIF 2.32 all of it fits into one segment of a JPEG. A PNG or WebP can hold more: orientations, two million of
# which took 7 s to read. The orientation is at the beginning.
MAX_EXIF_BYTES = 65536


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

    Resized with Pillow's antialiased bicubic filter; an image that has the right size already keeps its pixels.
    Raises whatever Pillow raises for an image that cannot be decoded.
    """
    rgb = to_rgb(image)
    size, resized, shorter = spec.image_size, spec.shorter_side, min(rgb.size)
    # The crop begins on a whole pixel of the resized image, as if it had been resized first: where nothing is to be
    # resized, nothing is interpolated. Only the crop is computed, so a 50000 x 1 image costs no more than others.
    left, top = ((length * resized - size * shorter) // (2 * shorter) for length in rgb.size)
    scale = shorter / resized
    box = (left * scale, top * scale, (left + size) * scale, (top + size) * scale)
    return np.array(rgb.resize((size, size), Image.Resampling.BICUBIC, box=box))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB: upright as EXIF says, the first frame of an animation, transparency on white.

    May be the image itself. Raises whatever Pillow raises for an image that cannot be decoded.
    """
    image.seek(0)
    image.load()  # before EXIF is read, which may load too, so that broken pixels never pass for broken metadata
    turn = _turn(image)
    rgb = _on_white(image)
    return rgb if turn is None else rgb.transpose(turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    exif = image.info.get("exif", b"")
    if len(exif) > MAX_EXIF_BYTES:
        image.info["exif"] = exif[:MAX_EXIF_BYTES]
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # whatever a parser stumbles over: garbage in the metadata must not cost a good image
        return None


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(rgba, mask=rgba)
        return white
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scales what Pillow would clip: 16 bit to 8 bit, and floats that never exceed 1 as a share of white."""
    values = np.nan_to_num(np.asarray(image, np.float32))
    white = 65535 if image.mode != "F" else 255 if values.max() > 1 else 1
    grey = np.rint(values.clip(0, white) * (255 / white)).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")
