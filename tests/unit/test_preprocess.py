"""Any image to RGB on white, and the centre crop that a network sees."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image

from scala_model import preprocess
from scala_model.preprocess import Preprocessing, to_pixels, to_rgb

SPEC = Preprocessing(64)
WHITE = [255, 255, 255]


def noise(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)


def reopened(image: Image.Image, image_format: str, **options: object) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, image_format, **options)
    return Image.open(encoded)


def rgb_of(image: Image.Image) -> list[list[list[int]]]:
    rgb = to_rgb(image)
    assert rgb.mode == "RGB"
    pixels: list[list[list[int]]] = np.asarray(rgb).tolist()
    return pixels


# -- the spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image_size", 0),
        ("image_size", -64),
        ("crop_ratio", 0.0),
        ("crop_ratio", 1.01),
        ("crop_ratio", math.nan),
        ("mean", (0.5, 0.5)),
        ("mean", (0.5, 0.5, math.inf)),
        ("std", (0.2, 0.2, 0.0)),
        ("std", (0.2, 0.2, math.nan)),
        ("std", (0.2, 0.2, 0.2, 0.2)),
    ],
)
def test_a_senseless_spec_is_refused_with_its_value_and_a_remedy(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^{field} is .*: give ") as refusal:
        Preprocessing(**{"image_size": 64, field: value})  # type: ignore[arg-type]
    assert str(value) in str(refusal.value)


def test_the_shorter_side_leaves_room_for_the_crop() -> None:
    assert Preprocessing(64).shorter_side == 64
    assert Preprocessing(224, crop_ratio=0.875).shorter_side == 256


# -- modes


def test_grey_and_bilevel() -> None:
    assert rgb_of(Image.new("L", (1, 1), 77)) == [[[77, 77, 77]]]
    assert rgb_of(Image.fromarray(np.array([[True, False]]))) == [[WHITE, [0, 0, 0]]]


def test_an_rgb_image_is_not_copied() -> None:
    image = Image.new("RGB", (2, 2), "red")
    assert to_rgb(image) is image


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("LA", (100, 255), [100, 100, 100]),
        ("LA", (100, 0), WHITE),
        ("RGBA", (200, 0, 50, 255), [200, 0, 50]),
        ("RGBA", (200, 0, 50, 0), WHITE),
        ("RGBA", (0, 0, 0, 51), [204, 204, 204]),
        ("RGBa", (0, 0, 0, 51), [204, 204, 204]),
    ],
)
def test_alpha_lies_on_white(mode: str, colour: tuple[int, ...], expected: list[int]) -> None:
    assert rgb_of(Image.new(mode, (1, 1), colour)) == [[expected]]


def palette_image() -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return image


def test_palette() -> None:
    assert rgb_of(palette_image()) == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]


def test_palette_with_one_transparent_entry() -> None:
    assert rgb_of(reopened(palette_image(), "PNG", transparency=1)) == [[[255, 0, 0], WHITE, [0, 0, 255]]]
    assert rgb_of(reopened(palette_image(), "GIF", transparency=1)) == [[[255, 0, 0], WHITE, [0, 0, 255]]]


def test_palette_with_an_alpha_value_for_each_entry() -> None:
    image = reopened(palette_image(), "PNG", transparency=bytes([255, 0, 51]))
    assert rgb_of(image) == [[[255, 0, 0], WHITE, [204, 204, 255]]]


def test_palette_with_an_alpha_channel() -> None:
    alpha = Image.fromarray(np.array([[255, 0, 51]], np.uint8))
    image = palette_image().convert("PA")
    image.putalpha(alpha)
    assert image.mode == "PA"
    assert rgb_of(image) == [[[255, 0, 0], WHITE, [204, 204, 255]]]


def test_a_transparent_colour_without_a_palette() -> None:
    pixels = np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)
    assert rgb_of(reopened(Image.fromarray(pixels), "PNG", transparency=(1, 2, 3))) == [[WHITE, [4, 5, 6]]]
    assert rgb_of(reopened(Image.fromarray(pixels[..., 0]), "PNG", transparency=1)) == [[WHITE, [4, 4, 4]]]


@pytest.mark.parametrize(
    ("ink", "expected"), [((0, 255, 255, 0), [255, 0, 0]), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), [0, 0, 0])]
)
def test_cmyk_in_memory_and_in_a_jpeg_as_adobe_stores_it(ink: tuple[int, ...], expected: list[int]) -> None:
    image = Image.new("CMYK", (8, 8), ink)
    assert rgb_of(image)[0][0] == expected
    jpeg = reopened(image, "JPEG", quality=95)
    assert jpeg.mode == "CMYK"
    assert jpeg.info["adobe"]  # the marker that says the inks are stored inverted
    assert np.abs(np.array(rgb_of(jpeg)[0][0]) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["YCbCr", "LAB", "HSV", "RGBX"])
def test_other_colour_spaces(mode: str) -> None:
    image = Image.new("RGB", (2, 2), (200, 60, 30)).convert(mode)
    assert image.mode == mode
    assert np.abs(np.array(rgb_of(image)) - [200, 60, 30]).max() <= 3


def test_sixteen_bits_are_scaled_to_eight_and_not_clipped() -> None:
    values = np.array([[0, 256, 257, 0x8080, 65535]], np.uint16)
    expected = [[[value] * 3 for value in (0, 1, 1, 128, 255)]]
    png = reopened(Image.fromarray(values), "PNG")
    assert png.mode.startswith("I;16")
    assert rgb_of(png) == expected
    assert rgb_of(reopened(Image.fromarray(values.astype(">u2")), "TIFF")) == expected
    assert rgb_of(Image.fromarray(values.astype(np.int32))) == expected


def test_integers_beyond_sixteen_bits_are_clipped() -> None:
    assert rgb_of(Image.fromarray(np.array([[-5, 2**31 - 1]], np.int32))) == [[[0, 0, 0], WHITE]]


def test_a_transparent_value_in_sixteen_bits() -> None:
    values = np.array([[257, 514]], np.uint16)
    assert rgb_of(reopened(Image.fromarray(values), "PNG", transparency=257)) == [[WHITE, [2, 2, 2]]]


def test_floats_are_shares_of_white_or_else_eight_bit_values() -> None:
    shares = Image.fromarray(np.array([[-1.0, 0.0, 0.2, 1.0]], np.float32))
    assert rgb_of(shares) == [[[value] * 3 for value in (0, 0, 51, 255)]]
    values = Image.fromarray(np.array([[-1.0, 50.6, 255.0, 300.0]], np.float32))
    assert rgb_of(values) == [[[value] * 3 for value in (0, 51, 255, 255)]]


def test_floats_that_are_no_numbers() -> None:
    odd = Image.fromarray(np.array([[math.nan, math.inf, -math.inf]], np.float32))
    assert rgb_of(odd) == [[[0, 0, 0], WHITE, [0, 0, 0]]]


# -- orientation and animation


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """What a viewer shows, in numpy: the EXIF orientations as rotations (counter-clockwise) and mirrorings."""
    quarter_turns, mirrored = {1: (0, 0), 2: (0, 1), 3: (2, 0), 4: (2, 1), 5: (3, 1), 6: (3, 0), 7: (1, 1), 8: (1, 0)}[
        orientation
    ]
    turned = np.rot90(pixels, quarter_turns)
    return turned[:, ::-1] if mirrored else turned


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "WEBP"])
def test_exif_orientation(image_format: str, orientation: int) -> None:
    pixels = noise(3, 5)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"lossless": True} if image_format == "WEBP" else {}
    image = reopened(Image.fromarray(pixels), image_format, exif=exif, **options)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), upright(pixels, orientation))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_is_upright(orientation: int) -> None:
    pixels = noise(3, 5)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    np.testing.assert_array_equal(np.asarray(to_rgb(reopened(Image.fromarray(pixels), "PNG", exif=exif))), pixels)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff"])
def test_garbage_in_exif_is_upright(exif: bytes) -> None:
    pixels = noise(3, 5)
    image = Image.fromarray(pixels)
    image.info["exif"] = exif
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)


@pytest.mark.parametrize(("image_format", "options"), [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})])
def test_the_first_frame_of_an_animation(image_format: str, options: dict[str, object]) -> None:
    red, green, blue = (Image.new("RGB", (2, 2), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    image = reopened(red, image_format, save_all=True, append_images=[green, blue], **options)
    assert rgb_of(image)[0][0] == [255, 0, 0]
    image.seek(2)
    assert rgb_of(image)[0][0] == [255, 0, 0]


# -- the crop


def test_an_image_of_the_right_size_keeps_its_pixels() -> None:
    pixels = noise(64, 64)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), SPEC), pixels)


def test_the_result_is_a_contiguous_array_of_its_own() -> None:
    pixels = to_pixels(Image.fromarray(noise(64, 64)), SPEC)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable


@pytest.mark.parametrize(("height", "width", "top", "left"), [(64, 80, 0, 8), (64, 81, 0, 8), (101, 64, 18, 0)])
def test_a_crop_alone_interpolates_nothing(height: int, width: int, top: int, left: int) -> None:
    pixels = noise(height, width)
    np.testing.assert_array_equal(to_pixels(Image.fromarray(pixels), SPEC), pixels[top : top + 64, left : left + 64])


def test_the_crop_ratio_crops_a_resized_image() -> None:
    pixels = noise(73, 73)  # 64 / 0.875 = 73.1
    np.testing.assert_array_equal(
        to_pixels(Image.fromarray(pixels), Preprocessing(64, crop_ratio=0.875)), pixels[4:68, 4:68]
    )


@pytest.mark.parametrize(("height", "width"), [(128, 256), (200, 100), (32, 48), (512, 512)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_it_is_resize_then_centre_crop(height: int, width: int, crop_ratio: float) -> None:
    spec = Preprocessing(56, crop_ratio)
    image = Image.fromarray(noise(height, width))
    shorter = spec.shorter_side
    resized = (width * shorter // min(height, width), height * shorter // min(height, width))
    left, top = (resized[0] - 56) // 2, (resized[1] - 56) // 2
    expected = image.resize(resized, Image.Resampling.BICUBIC).crop((left, top, left + 56, top + 56))
    difference = np.abs(to_pixels(image, spec).astype(int) - np.asarray(expected).astype(int))
    assert difference.mean() < 0.3
    assert difference.max() <= 8  # noise at its worst: rounding the box may take a pixel into the filter or out of it


def test_shrinking_is_antialiased() -> None:
    checkerboard = np.indices((512, 512)).sum(0) % 2 * 255
    pixels = to_pixels(Image.fromarray(checkerboard.astype(np.uint8)), SPEC)
    assert np.abs(pixels.astype(int) - 127).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (50000, 1), (2, 3), (4096, 1)])
def test_extreme_sizes(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (10, 20, 30))
    np.testing.assert_array_equal(to_pixels(image, SPEC), np.full((64, 64, 3), (10, 20, 30)))


def test_a_long_image_is_cropped_in_its_middle() -> None:
    pixels = np.zeros((1, 50001, 3), np.uint8)
    pixels[:, 24990:25011] = 255
    assert to_pixels(Image.fromarray(pixels), SPEC).min() == 255


def test_the_crop_lies_within_the_image_whatever_its_size() -> None:
    for width, height in itertools.product((1, 2, 3, 7, 31, 63, 64, 65, 97, 255), repeat=2):
        for crop_ratio in (1.0, 0.95, 0.875, 0.5):
            assert to_pixels(Image.new("RGB", (width, height)), Preprocessing(9, crop_ratio)).shape == (9, 9, 3)


def test_transparency_orientation_and_crop_together() -> None:
    image = Image.new("RGBA", (100, 50), (255, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 50, 50))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # the left half, transparent, comes to lie on top
    pixels = to_pixels(reopened(image, "PNG", exif=exif), SPEC)
    assert pixels[2, 32].tolist() == WHITE
    assert pixels[61, 32].tolist() == [255, 0, 0]


# -- in bands


def picture(width: int, height: int) -> Image.Image:
    """Edges, ramps and noise, and an alpha channel of its own."""
    random = np.random.default_rng(5)
    rows, columns = np.indices((height, width))
    channels = [rows * 255 // height, columns * 255 // width, random.integers(0, 256, rows.shape), rows * columns % 256]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


def of_mode(mode: str, width: int, height: int) -> Image.Image:
    image = picture(width, height)
    rgb, grey = image.convert("RGB"), np.asarray(image.getchannel(0)).astype(np.float32)
    match mode:
        case "RGBA":
            return image
        case "P with one transparent entry":
            return reopened(rgb.quantize(16), "PNG", transparency=3)
        case "P with an alpha value for each entry":
            return reopened(rgb.quantize(16), "PNG", transparency=bytes(range(0, 256, 16)))
        case "PA" | "LA" | "RGBa":
            return image.convert(mode)
        case "RGB with a transparent colour":
            return reopened(
                rgb.quantize(4).convert("RGB"), "PNG", transparency=rgb.quantize(4).convert("RGB").getpixel((0, 0))
            )
        case "I;16" | "I;16B":
            return reopened(Image.fromarray((grey * 257).astype("<u2" if mode == "I;16" else ">u2")), "TIFF")
        case "I;16 with a transparent value":
            return reopened(Image.fromarray((grey * 257).astype(np.uint16)), "PNG", transparency=100 * 257)
        case "I":
            return Image.fromarray((grey * 300 - 2000).astype(np.int32))
        case "F of shares":
            return Image.fromarray(grey / 255)
        case "F of 8 bits":
            grey[0, 0], grey[-1, -1] = math.nan, math.inf
            return Image.fromarray(grey)
    return rgb.convert(mode)


MODES = (
    *("RGB", "RGBA", "RGBa", "RGBX", "L", "LA", "1", "P", "PA", "CMYK", "YCbCr", "LAB", "HSV"),
    *("P with one transparent entry", "P with an alpha value for each entry", "RGB with a transparent colour"),
    *("I;16", "I;16B", "I;16 with a transparent value", "I", "F of shares", "F of 8 bits"),
)


def whole_and_in_bands(
    image: Image.Image, spec: Preprocessing, monkeypatch: pytest.MonkeyPatch
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    whole = to_pixels(image, spec)
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "MAX_WHOLE_PIXELS", 0)
        patch.setattr(preprocess, "BAND_PIXELS", 1000)
        patch.setattr(preprocess, "_TILE", 32)
        patch.setattr(preprocess, "to_rgb", None)  # nor is the image ever converted whole
        return whole, to_pixels(image, spec)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", MODES)
def test_an_image_in_bands_is_the_whole_image(mode: str, orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    image, exif = of_mode(mode, 211, 137), Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image.load()
    image.info["exif"] = exif.tobytes()
    image._exif = None
    whole, in_bands = whole_and_in_bands(image, Preprocessing(48), monkeypatch)
    np.testing.assert_array_equal(in_bands, whole)
    assert len(np.unique(whole)) > (1 if mode == "1" else 20), "there is something to see"


@pytest.mark.parametrize("size", [(640, 97), (97, 91), (50, 50), (300, 48), (1, 3000), (3000, 1), (3, 2), (2003, 1999)])
@pytest.mark.parametrize("crop_ratio", [1.0, 0.875])
def test_an_image_in_bands_is_the_whole_image_whatever_its_size(
    size: tuple[int, int], crop_ratio: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, in_bands = whole_and_in_bands(picture(*size), Preprocessing(48, crop_ratio), monkeypatch)
    np.testing.assert_array_equal(in_bands, whole)


@pytest.mark.parametrize(("size", "most"), [((1600, 2700), 1), ((700, 6100), 1), ((130, 33_000), 3)])
def test_a_tall_image_in_bands_is_the_whole_image_but_for_rounding(
    size: tuple[int, int], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = picture(*size)
    assert image.width * image.height > preprocess.MAX_WHOLE_PIXELS
    in_bands = to_pixels(image, SPEC)
    monkeypatch.setattr(preprocess, "MAX_WHOLE_PIXELS", image.width * image.height)
    assert np.abs(in_bands.astype(int) - to_pixels(image, SPEC)).max() <= most
