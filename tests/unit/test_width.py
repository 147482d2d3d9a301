"""A width is an exact ratio in (0, 1]."""

from __future__ import annotations

import copy
import pickle
import time
from fractions import Fraction

import pytest

from scala_model.width import Width


@pytest.mark.parametrize(
    ("given", "text", "ratio"),
    [
        (1, "1", 1.0),
        (1.0, "1", 1.0),
        ("1.0", "1", 1.0),
        (0.25, "0.25", 0.25),
        ("0.3125", "0.3125", 0.3125),
        (0.28125, "0.28125", 0.28125),
        (Fraction(3, 8), "0.375", 0.375),
        ("3/8", "0.375", 0.375),
        ("1e-2", "0.01", 0.01),
    ],
)
def test_reads_numbers_and_text(given: Fraction | float | str, text: str, ratio: float) -> None:
    width = Width(given)
    assert str(width) == text
    assert repr(width) == f"Width({text})"
    assert float(width) == ratio


@pytest.mark.parametrize(
    "given", [0, 0.0, -0.5, 1.0000001, 2, float("nan"), float("inf"), "", "half", "1/0", "0.5;", None, True]
)
def test_refuses_anything_outside_0_to_1(given: float) -> None:
    with pytest.raises(ValueError, match=r"a width is a number in \(0, 1\]"):
        Width(given)


@pytest.mark.parametrize("given", ["1e-999999999", "1e999999999", "9" * 5000, "0." + "3" * 100_000])
def test_hostile_text_costs_no_time(given: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError, match="a width is a number"):
        Width(given)
    assert time.monotonic() - started < 1


def test_widths_of_one_ratio_are_one_value() -> None:
    assert len({Width(0.1), Width("0.1"), Width(Fraction(1, 10)), Width("0.10")}) == 1


def test_widths_order_by_ratio() -> None:
    widths = [Width(0.75), Width(0.25), Width(1), Width("0.3125")]
    assert [str(width) for width in sorted(widths)] == ["0.25", "0.3125", "0.75", "1"]
    assert Width(0.25) <= Width(0.25) < Width(0.5) <= Width(1)


@pytest.mark.parametrize(
    ("ratio", "dim", "channels"),
    [
        (0.25, 384, 96),
        (0.28125, 384, 108),
        (1.0, 384, 384),
        (0.3, 10, 3),  # as a float, 0.3 * 10 is just 3.0, but 0.29 * 100 is 28.999999999999996
        (0.29, 100, 29),
        (0.57, 100, 57),
        (0.4, 9, 3),  # 3.6: rounded down
    ],
)
def test_channels_are_counted_in_integers(ratio: float, dim: int, channels: int) -> None:
    assert Width(ratio).channels(dim) == channels


def test_a_width_cannot_be_changed_and_travels_between_processes() -> None:
    width = Width(0.5)
    with pytest.raises(AttributeError):
        width.numerator = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(width)) == copy.deepcopy(width) == width
