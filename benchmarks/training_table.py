"""Methods compared at every width, from their evaluated checkpoints alone: no data, no network is run.

    python -m benchmarks.training_table scala=DIR us-net=DIR separate=DIR,DIR,DIR,DIR [--against scala]
        [--out FILE.md] [--plot FILE.png]

A method is one checkpoint, or several with a width each (networks trained separately). The checkpoints must have been
evaluated on the same images; then each method's accuracy less the reference's is measured image by image, which tells
them apart at a fraction of the distance that their own intervals would need: at each width, and on average over the
widths that all methods have. All intervals are of the choice of images; what another training run of the same method
would give is not in them. Widths that are no more accurate than a narrower one of their method are named.

Prints tables in Markdown and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scala_model.checkpoint import CARD, read_card
from scala_model.correctness import (
    REMEDY,
    Correctness,
    dominated_widths,
    paired_difference,
    read_correctness,
    wilson_interval,
)
from scala_model.width import Width


@dataclass(frozen=True)
class Measured:
    """A width of a method: multiply-adds of an image, and which images (N) it got right."""

    macs: int
    correct: NDArray[np.bool_]

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(int(self.correct.sum()), len(self.correct))


Method = Mapping[Width, Measured]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="METHOD=DIR[,DIR...]", help="a name, and its checkpoints")
    parser.add_argument("--against", metavar="METHOD", help="what the others are compared with; default: the first")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="write the tables here, too")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw accuracy against multiply-adds")
    given = parser.parse_args(arguments)
    try:
        methods, dataset = read_methods(given.methods)
        against = given.against or next(iter(methods))
        if against not in methods:
            raise ValueError(f"there is no method {against!r} to compare with; given: {', '.join(methods)}")
    except ValueError as error:
        parser.error(str(error))
    text = markdown(methods, against, dataset)
    print(text)
    if given.out:
        given.out.write_text(text, encoding="utf-8")
    if given.plot:
        draw(given.plot, methods)
    print(json.dumps(summary(methods, against, dataset)))


# -- reading


def read_methods(arguments: Sequence[str]) -> tuple[dict[str, Method], str]:
    """Every ``NAME=DIR[,DIR...]``, and the data set that all were measured on.

    Raises ValueError: a malformed argument, a name or width given twice, a checkpoint that cannot be read or was not
    evaluated, checkpoints evaluated on different images.
    """
    methods: dict[str, Method] = {}
    first: tuple[Path, Correctness] | None = None
    for argument in arguments:
        name, _, folders = argument.partition("=")
        if not name or not folders:
            raise ValueError(f"{argument!r} names no checkpoint: write METHOD=DIR, or METHOD=DIR,DIR,...")
        if name in methods:
            raise ValueError(f"the method {name!r} is given twice: write its checkpoints as {name}=DIR,DIR,...")
        method: dict[Width, Measured] = {}
        for folder in map(Path, folders.split(",")):
            matrix, widths = read_widths(folder)
            first = first or (folder, matrix)
            _check_same_images(*first, folder, matrix)
            if twice := method.keys() & widths.keys():
                raise ValueError(f"{name} has width {min(twice)} twice, the second time from {folder}: leave one out")
            method |= widths
        methods[name] = dict(sorted(method.items()))
    assert first is not None, "argparse sees to at least one method"
    return methods, first[1].dataset


def read_widths(folder: Path) -> tuple[Correctness, dict[Width, Measured]]:
    """The matrix of one checkpoint, and its widths.

    A network that was trained separately for one width is narrower instead of sliced, its only width 1.0; which width
    of the other networks it stands beside is told by the ``width`` among the training facts of its card.
    """
    config, card = read_card(folder)
    matrix = read_correctness(folder)
    if matrix is None:
        raise ValueError(f"{folder} has no record of which images were right: {REMEDY}")
    labels = config.widths
    if len(labels) == 1 and (told := (card["training"] or {}).get("width")) is not None:
        labels = (_told_width(folder, told),)
    macs = [entry["macs"] for entry in card["widths"]]
    columns = zip(labels, macs, matrix.correct.T, strict=True)
    return matrix, {label: Measured(cost, correct) for label, cost, correct in columns}


def _told_width(folder: Path, told: Any) -> Width:
    try:
        return Width(told)
    except ValueError as error:
        raise ValueError(f"{folder / CARD}: {error}") from None


def _check_same_images(first_folder: Path, first: Correctness, folder: Path, matrix: Correctness) -> None:
    expected, found = (first.dataset, first.num_images), (matrix.dataset, matrix.num_images)
    if found != expected:
        raise ValueError(
            f"{folder} was evaluated on {found[1]} images of {found[0]}, {first_folder} on {expected[1]} of "
            f"{expected[0]}: only answers to the same images can be paired"
        )
    if matrix.labels_sha256 != first.labels_sha256:
        raise ValueError(
            f"{folder} was evaluated on images with other labels, or in another order, than {first_folder} (SHA-256 "
            f"{matrix.labels_sha256[:8]} and {first.labels_sha256[:8]}): evaluate both with the same data folder"
        )


# -- telling


def markdown(methods: Mapping[str, Method], against: str, dataset: str) -> str:
    """Accuracies, of several methods their differences, in percent and percentage points, and dominated widths."""
    parts = [accuracy_table(methods, dataset)]
    if len(methods) > 1:
        parts.append(difference_table(methods, against))
    parts.append([dominated_sentence(methods)])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def accuracy_table(methods: Mapping[str, Method], dataset: str) -> list[str]:
    widths, shared = _widths(methods), _shared(methods)
    rows = []
    for name, method in methods.items():
        mean = _mean(method, shared)
        cells = [_accuracy_cell(method.get(width)) for width in widths]
        rows.append(_row([name, *cells, "–" if mean is None else f"{100 * mean:.2f}"]))
    return [
        f"Top-1 accuracy (%) on {_num_images(methods):,} images ({dataset}), with 95 % Wilson intervals. The mean is "
        f"of the widths that every method has: {', '.join(map(str, shared)) or 'none'}.",
        "",
        *_heading([*map(str, widths), "mean"]),
        *rows,
    ]


def difference_table(methods: Mapping[str, Method], against: str) -> list[str]:
    widths = _widths(methods)
    columns = [*([width] for width in widths), _shared(methods)]
    rows = [
        _row([name, *(_difference_cell(difference(method, methods[against], column)) for column in columns)])
        for name, method in methods.items()
        if name != against
    ]
    return [
        f"Difference to {against} (percentage points) on the same images, with paired 95 % intervals; bold where the "
        "interval leaves out 0. The mean is of the same widths as above; each image counts once in its interval.",
        "",
        *_heading([*map(str, widths), "mean"]),
        *rows,
    ]


def dominated_sentence(methods: Mapping[str, Method]) -> str:
    dominated = {name: ", ".join(map(str, _dominated(method))) for name, method in methods.items()}
    found = "; ".join(f"{name} {widths}" for name, widths in dominated.items() if widths)
    return f"Dominated widths, no more accurate than a narrower one of the same method: {found or 'none'}."


def difference(one: Method, other: Method, widths: Sequence[Width]) -> tuple[float, ...] | None:
    """Mean accuracy of a method over ``widths`` less that of another, and its interval; None where one lacks any."""
    if not widths or not {*widths} <= one.keys() & other.keys():
        return None
    one_NX, other_NX = (np.stack([method[width].correct for width in widths], axis=1) for method in (one, other))
    return paired_difference(one_NX, other_NX)


def summary(methods: Mapping[str, Method], against: str, dataset: str) -> dict[str, Any]:
    """The same as data, in fractions of 4 decimals."""
    return {
        "dataset": dataset,
        "images": _num_images(methods),
        "against": against,
        "methods": {
            name: _method_summary(method, None if name == against else methods[against], _shared(methods))
            for name, method in methods.items()
        },
    }


def _method_summary(method: Method, reference: Method | None, shared: Sequence[Width]) -> dict[str, Any]:
    mean = _mean(method, shared)
    return {
        "mean": None if mean is None else round(mean, 4),
        **{f"mean_{key}": value for key, value in _difference_summary(method, reference, shared).items()},
        "dominated": [float(width) for width in _dominated(method)],
        "widths": [
            {
                "width": float(width),
                "macs": measured.macs,
                "accuracy": round(measured.accuracy, 4),
                "accuracy_ci95": [round(bound, 4) for bound in measured.interval],
                **_difference_summary(method, reference, [width]),
            }
            for width, measured in method.items()
        ],
    }


def _difference_summary(method: Method, reference: Method | None, widths: Sequence[Width]) -> dict[str, Any]:
    """Nothing for the reference itself, and where one of the two lacks a width."""
    found = None if reference is None else difference(method, reference, widths)
    if found is None:
        return {}
    middle, low, high = (round(value, 4) for value in found)
    return {"difference": middle, "difference_ci95": [low, high], "significant": _leaves_out_0(found)}


def draw(path: Path, methods: Mapping[str, Method]) -> None:
    from scala_model.train.plot import Point, plot_accuracy  # tables need no matplotlib

    curves = {
        name: [Point(measured.macs, measured.accuracy, measured.interval) for measured in method.values()]
        for name, method in methods.items()
    }
    plot_accuracy(path, curves)


def _num_images(methods: Mapping[str, Method]) -> int:
    return len(next(measured.correct for method in methods.values() for measured in method.values()))


def _widths(methods: Mapping[str, Method]) -> list[Width]:
    return sorted({width for method in methods.values() for width in method})


def _shared(methods: Mapping[str, Method]) -> list[Width]:
    """The widths that every method has: means of different widths could not be compared."""
    return [width for width in _widths(methods) if all(width in method for method in methods.values())]


def _mean(method: Method, widths: Sequence[Width]) -> float | None:
    return float(np.mean([method[width].accuracy for width in widths])) if widths else None


def _dominated(method: Method) -> list[Width]:
    return dominated_widths({width: measured.accuracy for width, measured in method.items()})


def _leaves_out_0(found: Sequence[float]) -> bool:
    _, low, high = found
    return low > 0 or high < 0


def _accuracy_cell(measured: Measured | None) -> str:
    if measured is None:
        return "–"
    low, high = measured.interval
    return f"{100 * measured.accuracy:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def _difference_cell(found: tuple[float, ...] | None) -> str:
    if found is None:
        return "–"
    middle, low, high = (100 * value for value in found)
    bold = "**" if _leaves_out_0(found) else ""
    return f"{bold}{middle:+.2f}{bold} ({low:+.2f} to {high:+.2f})"


def _heading(titles: Sequence[str]) -> list[str]:
    return [_row(["method", *titles]), "|---" * (len(titles) + 1) + "|"]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
