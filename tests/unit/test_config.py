"""The shape of a network: what is accepted, what is refused and with which words."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from scala_model import ScalaConfig, Width
from scala_model.config import variant

TOY: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "num_classes": 5,
    "smallest": 0.25,
    "largest": 1.0,
    "granularity": 0.25,
}


@pytest.mark.parametrize(("granularity", "count"), [(0.25, 4), (0.125, 7), (0.0625, 13), (0.03125, 25)])
def test_the_papers_granularities_give_4_7_13_and_25_widths(granularity: float, count: int) -> None:
    widths = variant("deit-s", image_size=224, patch_size=16, num_classes=1000, granularity=granularity).widths
    assert len(widths) == count
    assert widths[0] == Width(0.25)
    assert widths[-1] == Width(1)
    assert list(widths) == sorted(widths)


@pytest.mark.parametrize(
    ("smallest", "ratios"),
    [
        (0.125, [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0]),
        (0.5, [0.5, 0.625, 0.75, 0.875, 1.0]),
        (0.75, [0.75, 0.875, 1.0]),
        (1.0, [1.0]),
    ],
)
def test_other_smallest_widths(smallest: float, ratios: list[float]) -> None:
    config = ScalaConfig(**TOY | {"embed_dim": 32, "smallest": smallest, "granularity": 0.125})
    assert [float(width) for width in config.widths] == ratios


def test_decimal_steps_do_not_drift() -> None:
    config = ScalaConfig(**TOY | {"embed_dim": 20, "smallest": 0.1, "granularity": 0.1})
    assert [str(width) for width in config.widths] == [
        "0.1",
        "0.2",
        "0.3",
        "0.4",
        "0.5",
        "0.6",
        "0.7",
        "0.8",
        "0.9",
        "1",
    ]


def test_sizes_that_follow_from_others() -> None:
    plain = variant("deit-s", image_size=224, patch_size=16, num_classes=1000)
    assert (plain.embed_dim, plain.depth, plain.num_heads, plain.hidden_dim) == (384, 12, 6, 1536)
    assert (plain.num_patches, plain.num_tokens) == (196, 197)
    assert plain.layer_norm_eps == 1e-5
    distilled = variant("deit-s-distilled", image_size=224, patch_size=16, num_classes=1000)
    assert distilled.distilled
    assert distilled.num_tokens == 198


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown variant 'deit-x'; known: deit-ti, deit-s, deit-b"):
        variant("deit-x", image_size=224, patch_size=16, num_classes=1000)


@pytest.mark.parametrize("given", [0.5, "0.5", 0.5 + 1e-9, "0.50", Width(0.5)])
def test_finds_a_trained_width(given: Width | float | str) -> None:
    assert ScalaConfig(**TOY).width(given) == Width("0.5")


@pytest.mark.parametrize("given", [0.6, 0.2, "0.51", Width(0.3)])
def test_a_width_that_was_not_trained_is_refused_with_the_list(given: Width | float | str) -> None:
    with pytest.raises(ValueError, match=r"was not trained; trained widths: 0\.25, 0\.5, 0\.75, 1$"):
        ScalaConfig(**TOY).width(given)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("image_size", 0, "image_size must be a whole number"),
        ("image_size", 8.0, "image_size must be a whole number"),
        ("image_size", 10, "not a multiple of patch_size 4"),
        ("depth", True, "depth must be a whole number"),
        ("depth", 10**9, "depth must be a whole number from 1 to 1000000"),
        ("embed_dim", 10**400, "embed_dim must be a whole number"),
        ("num_classes", -1, "num_classes must be a whole number"),
        ("num_heads", 3, "3 heads cannot share evenly"),
        ("num_heads", 8, "width 0.25 has 4 channels, which 8 heads cannot share evenly"),
        ("mlp_ratio", 0.0, "mlp_ratio must be a number, positive"),
        ("mlp_ratio", math.nan, "mlp_ratio must be a number, positive and finite"),
        ("mlp_ratio", math.inf, "mlp_ratio must be a number, positive and finite"),
        ("mlp_ratio", 0.1, "leaves width 0.25 without hidden channels"),
        ("layer_norm_eps", 0.0, "layer_norm_eps must be a number, positive"),
        ("layer_norm_eps", math.nan, "layer_norm_eps must be a number, positive"),
        ("smallest", 0.0, "a width is a number"),
        ("largest", 1.25, "a width is a number"),
        ("largest", 0.2, "do not lead from 0.25 to 0.2"),
        ("granularity", 0.2, "steps of 0.2 do not lead from 0.25 to 1.0"),
        ("granularity", 0.0, "granularity must be a number, positive"),
        ("granularity", -0.25, "granularity must be a number, positive"),
        ("granularity", "0.25", "granularity must be a number"),
        ("granularity", math.nan, "granularity must be a number, positive"),
        ("granularity", 1e-9, "finer than one channel"),
        ("distilled", "no", "distilled must be true or false"),
        ("global_pool", "max", "global_pool must be 'token' or 'avg'"),
    ],
)
def test_an_impossible_shape_is_refused_with_the_reason(field: str, value: object, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace(".", r"\.")):
        ScalaConfig(**TOY | {field: value})


def test_a_distilled_network_is_not_average_pooled() -> None:
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        ScalaConfig(**TOY, distilled=True, global_pool="avg")


def test_a_configuration_is_a_value() -> None:
    config = ScalaConfig(**TOY)
    assert config == ScalaConfig(**dataclasses.asdict(config))
    assert hash(config) == hash(ScalaConfig(**TOY))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.depth = 3  # type: ignore[misc]
