"""The picture says what was measured: checked on the figure's own parts, not on pixels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from scala_model.train.plot import Point, accuracy_figure, plot_accuracy

CURVES = {
    "scala": [Point(40_000_000, 0.27, (0.26, 0.285)), Point(3_000_000, 0.20, (0.19, 0.21))],  # in any order
    "separate": [Point(3_000_000, 0.15, (0.14, 0.16)), Point(39_000_000, 0.28, (0.27, 0.29))],
}


def drawn() -> tuple[Any, dict[str, ErrorbarContainer]]:
    (axes,) = accuracy_figure(CURVES).axes
    return axes, {str(bars.get_label()): bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)}


def test_each_method_is_a_line_of_percent_over_multiply_adds() -> None:
    _, lines = drawn()
    assert list(lines) == ["scala", "separate"]
    scala, *_ = lines["scala"]
    assert np.asarray(scala.get_xdata()).tolist() == [3_000_000, 40_000_000]
    assert np.asarray(scala.get_ydata()).tolist() == pytest.approx([20, 27])


def test_bars_are_the_intervals() -> None:
    _, lines = drawn()
    (bars,) = lines["scala"][2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([19, 21]), pytest.approx([26, 28.5])]


def test_axes_and_lines_have_names_and_units() -> None:
    axes, lines = drawn()
    assert axes.get_xscale() == "log"
    assert "multiply-adds" in axes.get_xlabel()
    assert "top-1 accuracy (%)" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["scala", "separate"]
    assert "95 %" in axes.get_legend().get_title().get_text()
    markers = {str(line.get_marker()) for line, *_ in lines.values()}
    assert len(markers) == 2


def test_the_same_curves_are_the_same_png(tmp_path: Path) -> None:
    contents = []
    for name in ("first.png", "second"):
        plot_accuracy(tmp_path / name, CURVES)
        contents.append((tmp_path / name).read_bytes())
    assert contents[0] == contents[1]
    with Image.open(tmp_path / "first.png") as image:
        image.load()
        assert image.format == "PNG"
        assert image.width > 800
        assert not {"Software", "Creation Time", "date"} & image.info.keys()
    assert "matplotlib.pyplot" not in sys.modules  # it would keep every figure, and ask for a display


@pytest.mark.parametrize("curves", [{}, {"scala": []}])
def test_nothing_to_plot(tmp_path: Path, curves: dict[str, list[Point]]) -> None:
    with pytest.raises(ValueError, match="there is nothing to plot"):
        plot_accuracy(tmp_path / "none.png", curves)
    assert not list(tmp_path.iterdir())
