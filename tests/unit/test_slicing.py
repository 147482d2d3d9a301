"""Which channels each width uses. Every number was derived by hand from the paper's rule, with D = 384."""

from __future__ import annotations

import pytest

from scala_model.config import variant
from scala_model.slicing import slices_of
from scala_model.width import Width

Range = tuple[int, int]


def ranges(granularity: float, ratio: float, **options: bool) -> tuple[Range, Range, Range]:
    """(start, stop) of the embedding's, the qkv's and the hidden channels of a DeiT-S."""
    config = variant("deit-s", image_size=224, patch_size=16, num_classes=1000, granularity=granularity, **options)
    s = slices_of(config, Width(ratio))
    assert all(part.step is None for part in (s.embed, s.qkv, s.hidden))
    return (s.embed.start, s.embed.stop), (s.qkv.start, s.qkv.stop), (s.hidden.start, s.hidden.stop)


X4 = [
    (0.25, (0, 96), (0, 288), (0, 384)),  # smallest: first 96 channels
    (0.5, (192, 384), (576, 1152), (768, 1536)),
    (0.75, (96, 384), (288, 1152), (384, 1536)),
    (1.0, (0, 384), (0, 1152), (0, 1536)),
]
X7 = [
    (0.25, (0, 96), (0, 288), (0, 384)),
    (0.375, (240, 384), (720, 1152), (960, 1536)),
    (0.5, (192, 384), (576, 1152), (768, 1536)),
    (0.625, (144, 384), (432, 1152), (576, 1536)),
    (0.75, (96, 384), (288, 1152), (384, 1536)),
    (0.875, (48, 384), (144, 1152), (192, 1536)),
    (1.0, (0, 384), (0, 1152), (0, 1536)),
]
X13 = [
    (0.25, (0, 96), (0, 288), (0, 384)),
    (0.3125, (264, 384), (792, 1152), (1056, 1536)),
    (0.4375, (216, 384), (648, 1152), (864, 1536)),
    (0.9375, (24, 384), (72, 1152), (96, 1536)),
    (1.0, (0, 384), (0, 1152), (0, 1536)),
]
X25 = [
    (0.25, (0, 96), (0, 288), (0, 384)),
    (0.28125, (276, 384), (828, 1152), (1104, 1536)),
    (0.65625, (132, 384), (396, 1152), (528, 1536)),
    (0.96875, (12, 384), (36, 1152), (48, 1536)),
    (1.0, (0, 384), (0, 1152), (0, 1536)),
]
PINNED = [
    (granularity, *row)
    for granularity, table in ((0.25, X4), (0.125, X7), (0.0625, X13), (0.03125, X25))
    for row in table
]


@pytest.mark.parametrize(("granularity", "ratio", "embed", "qkv", "hidden"), PINNED)
def test_ends_are_first_channels_and_middles_last(
    granularity: float, ratio: float, embed: Range, qkv: Range, hidden: Range
) -> None:
    assert ranges(granularity, ratio) == (embed, qkv, hidden)


@pytest.mark.parametrize(
    ("granularity", "starts"),
    [
        (0.25, [0, 192, 96, 0]),
        (0.125, [0, 240, 192, 144, 96, 48, 0]),
        (0.0625, [0, 264, 240, 216, 192, 168, 144, 120, 96, 72, 48, 24, 0]),
        (0.03125, [0, *range(276, 0, -12), 0]),  # 276, 264, 252, ... 24, 12
    ],
)
def test_where_every_width_begins(granularity: float, starts: list[int]) -> None:
    config = variant("deit-s", image_size=224, patch_size=16, num_classes=1000, granularity=granularity)
    slices = [slices_of(config, width) for width in config.widths]
    assert [s.embed.start for s in slices] == starts
    assert [s.qkv.start for s in slices] == [3 * start for start in starts]
    assert [s.hidden.start for s in slices] == [4 * start for start in starts]


def test_a_width_keeps_its_channels_whatever_else_was_trained() -> None:
    assert len({ranges(granularity, 0.5) for granularity in (0.25, 0.125, 0.0625, 0.03125)}) == 1


@pytest.mark.parametrize(("ratio", "shared"), [(0.375, 0), (0.5, 0), (0.75, 0), (0.875, 48)])
def test_a_middle_shares_little_with_the_smallest(ratio: float, shared: int) -> None:
    (start, _), _, _ = ranges(0.125, ratio)
    assert max(0, 96 - start) == shared  # max(0, r + s - 1) of 384 channels


def test_a_lone_width_and_the_ends_of_two_are_prefixes() -> None:
    for smallest, granularity in ((1.0, 0.5), (0.5, 0.5)):
        config = variant(
            "deit-s", image_size=224, patch_size=16, num_classes=9, smallest=smallest, granularity=granularity
        )
        assert all(slices_of(config, width).embed.start == 0 for width in config.widths)


def test_without_isolation_every_width_is_a_prefix() -> None:
    assert ranges(0.125, 0.625, isolated_activation=False) == ((0, 240), (0, 720), (0, 960))
    assert ranges(0.125, 0.25, isolated_activation=False) == ((0, 96), (0, 288), (0, 384))
