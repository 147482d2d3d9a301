"""WebP images are what Pillow makes of them, without its copy that stops all other threads."""

from __future__ import annotations

import gc
import io

import numpy as np
import pytest
from PIL import ExifTags, Image, WebPImagePlugin

from scala_model.preprocess import Preprocessing, to_rgb
from server import webp
from server.decode import ImageDecoder
from server.errors import BrokenImage


def picture(mode: str) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, len(mode)), np.uint8)
    return Image.fromarray(pixels)


def body_of(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "WEBP", **options)
    return file.getvalue()


def opened(body: bytes) -> WebPImagePlugin.WebPImageFile:
    image = Image.open(io.BytesIO(body))
    assert isinstance(image, WebPImagePlugin.WebPImageFile)
    return image


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    return exif


BODIES = {
    "lossy": body_of(picture("RGB")),
    "lossless": body_of(picture("RGB"), lossless=True),
    "transparent": body_of(picture("RGBA")),
    "animated": body_of(picture("RGB"), save_all=True, append_images=[Image.new("RGB", (40, 30))]),
    "sideways": body_of(picture("RGBA"), exif=sideways()),
}


@pytest.mark.parametrize("name", BODIES)
def test_it_is_what_pillow_decodes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(BODIES[name]) as image:
        expected = np.asarray(to_rgb(image))
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", None)
    with opened(BODIES[name]) as image:
        np.testing.assert_array_equal(np.asarray(to_rgb(webp.decoded(image, BODIES[name]))), expected)


def test_no_pixel_is_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """38 bytes of 49 million pixels kept the interpreter's lock for 150 to 370 ms."""
    monkeypatch.setattr(WebPImagePlugin.WebPImageFile, "load", None)
    assert ImageDecoder(Preprocessing(8), 10_000)(BODIES["lossy"]).shape == (8, 8, 3)


def test_half_an_image_is_broken() -> None:
    with pytest.raises(BrokenImage):
        ImageDecoder(Preprocessing(8), 10_000)(BODIES["lossy"][:-100])


def test_pillow_decodes_where_its_library_cannot_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webp, "_library", lambda: None)
    with opened(BODIES["lossy"]) as image:
        assert webp.decoded(image, BODIES["lossy"]) is image


def test_a_size_leaves_nothing_behind() -> None:
    """An array of ctypes would leave a type for each, 6 KiB."""

    def num_types() -> int:
        return sum(issubclass(type(each), type) for each in gc.get_objects())  # not of what a weak proxy stood for

    def decode(side: int) -> None:
        body = body_of(Image.new("RGB", (side, side)))
        webp.decoded(opened(body), body)

    decode(20)
    before = num_types()
    for side in range(21, 40):
        decode(side)
    assert num_types() - before < 5
