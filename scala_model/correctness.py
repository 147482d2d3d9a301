"""Which images each width got right: a file beside a checkpoint, and the intervals that follow from it.

The matrix lets two networks be compared image by image without their data. It is ``correctness.safetensors``, one bit
an image and width: 5 KB for four widths and 10,000 images. No torch here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from scala_model.checkpoint import CARD, CORRECTNESS, CheckpointError, read_card, replace_file
from scala_model.width import Width

Z_95 = 1.959963984540054  # the standard normal's 97.5 % quantile
REMEDY = "run scala-serve evaluate on the checkpoint again"


@dataclass(frozen=True)
class Correctness:
    """``correct`` bool (N, X): whether image n of ``dataset`` was classified correctly at ``widths[x]``.

    ``labels_sha256``: of the images' labels in their order (int64, little-endian), in 64 hexadecimal digits. It tells
    apart what a name and a number cannot: the same images in another order, as a folder and a Parquet file have them
    (but not another order within a class). Raises ValueError when the shape or the digest is none, or there are no
    images.
    """

    widths: tuple[Width, ...]
    correct: NDArray[np.bool_]
    dataset: str
    labels_sha256: str

    def __post_init__(self) -> None:
        shape = self.correct.shape
        if self.correct.dtype != np.bool_ or len(shape) != 2 or not shape[0] or shape[1] != len(self.widths):
            raise ValueError(
                f"correctness is true or false for each image (N, at least 1) and each of the {len(self.widths)} "
                f"widths; got {self.correct.dtype} of shape {shape}"
            )
        if not re.fullmatch("[0-9a-f]{64}", self.labels_sha256):
            raise ValueError(f"the labels' SHA-256 has 64 hexadecimal digits in lower case; got {self.labels_sha256!r}")

    @property
    def num_images(self) -> int:
        return len(self.correct)

    def at(self, width: Width) -> NDArray[np.bool_]:
        """The column (N) of a width. Raises ValueError, listing the widths, when it is not one of them."""
        if width not in self.widths:
            raise ValueError(f"width {width} was not measured; measured widths: {_listed(self.widths)}")
        column: NDArray[np.bool_] = self.correct[:, self.widths.index(width)]
        return column

    def accuracy(self, width: Width) -> float:
        return float(self.at(width).mean())

    def interval(self, width: Width) -> tuple[float, float]:
        """The 95 % Wilson interval of the accuracy."""
        return wilson_interval(int(self.at(width).sum()), self.num_images)


def write_correctness(folder: str | os.PathLike[str], matrix: Correctness) -> None:
    """Put the matrix beside the checkpoint whose weights it was measured with, replacing an older one as a whole.

    Raises CheckpointError when the folder's card cannot be read, ValueError when its widths are not the matrix's.
    """
    config, card = read_card(Path(folder))
    if matrix.widths != config.widths:
        raise ValueError(f"the matrix is of the widths {_listed(matrix.widths)}; {folder} has {_listed(config.widths)}")
    told = {
        "dataset": matrix.dataset,
        "images": matrix.num_images,
        "labels_sha256": matrix.labels_sha256,
        "weights_sha256": card["weights_sha256"],
        "widths": [float(width) for width in matrix.widths],
    }
    # One entry of JSON, because safetensors writes several in a new order each time: the same matrix, the same bytes.
    metadata = {"correctness": json.dumps(told, ensure_ascii=False)}
    packed = {"correct": np.packbits(matrix.correct, axis=0)}
    replace_file(Path(folder) / CORRECTNESS, safetensors.numpy.save(packed, metadata))


def read_correctness(folder: str | os.PathLike[str]) -> Correctness | None:
    """The matrix beside a checkpoint, None when there is none. The weights themselves are not read.

    Raises CheckpointError when the card cannot be read, or the matrix is damaged, of other weights or other widths.
    """
    folder = Path(folder)
    config, card = read_card(folder)
    path = folder / CORRECTNESS
    if not path.exists():
        return None
    try:
        matrix, weights_sha256 = _parse(path)
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a correctness matrix that we can read ({error}): {REMEDY}") from None
    if weights_sha256 != card["weights_sha256"]:
        raise CheckpointError(f"{path} was measured with other weights than {CARD} describes: {REMEDY}")
    if matrix.widths != config.widths:
        raise CheckpointError(
            f"{path} is of the widths {_listed(matrix.widths)}, the checkpoint has {_listed(config.widths)}: {REMEDY}"
        )
    return matrix


def _parse(path: Path) -> tuple[Correctness, Any]:
    """The matrix and the SHA-256 of its weights, as the file tells them."""
    with safe_open(path, framework="np") as file:
        told, packed = json.loads((file.metadata() or {})["correctness"]), file.get_tensor("correct")
    widths, num_images = tuple(Width(ratio) for ratio in told["widths"]), told["images"]
    if packed.shape != (math.ceil(num_images / 8), len(widths)):  # unpackbits would fill up with wrong answers
        raise ValueError(f"{packed.shape} bytes hold no {num_images} images at {len(widths)} widths")
    correct = np.unpackbits(packed, axis=0, count=num_images).astype(np.bool_)
    return Correctness(widths, correct, str(told["dataset"]), told["labels_sha256"]), told["weights_sha256"]


def _listed(widths: tuple[Width, ...]) -> str:
    return ", ".join(map(str, widths))


def wilson_interval(successes: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927): never outside 0..1, sound near both ends.

    Raises ValueError unless 0 <= successes <= n and n >= 1.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n} trials are no proportion")
    share, z2 = successes / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def paired_difference(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> tuple[float, float, float]:
    """Accuracy of ``a`` less that of ``b`` on the same images, and the ends of its 95 % interval.

    Both are (N), or (N, X) for the mean over X widths. An image counts once, its d the mean over its widths of a - b,
    because its answers depend on each other; the interval is the normal one of a mean of paired differences, mean(d) ±
    z sqrt(var(d) / n) (Miller 2024, arXiv 2411.00640). It is taken over n = N + 2 images: one of d = 1, one of d = -1
    are added, which at one width is the interval of Bonett and Price 2012, recommended by Fagerland et al. 2014. They
    keep it from shrinking to a point where two networks hardly differ; among thousands of images they change nothing.
    Raises ValueError unless both have the same such shape, with N and X at least 1.
    """
    if a.shape != b.shape or a.ndim not in (1, 2) or not a.size:
        raise ValueError(f"answers of shape {a.shape} and {b.shape} cannot be paired: give both for the same images")
    gains = (a.astype(np.int64) - b).reshape(len(a), -1)
    d = np.append(gains.mean(axis=1), [1.0, -1.0])
    middle, half = float(d.mean()), Z_95 * float(d.std()) / math.sqrt(len(d))
    return int(gains.sum()) / a.size, max(-1.0, middle - half), min(1.0, middle + half)


def dominated_widths(accuracy: Mapping[Width, float]) -> list[Width]:
    """The widths, in order, that are no more accurate than a narrower one: what they cost more buys nothing."""
    return [
        width
        for width in sorted(accuracy)
        if any(narrower < width and accuracy[narrower] >= accuracy[width] for narrower in accuracy)
    ]
