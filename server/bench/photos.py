"""Labelled images to ask a server about, as they are encoded: what counts is whether its first answer is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from server.simulation.workload import Workload

if TYPE_CHECKING:
    from scala_model.train.data import EncodedSet

MAX_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, eq=False)
class Photos:
    """The images that a workload asks about, by number; ``labels`` (images of the set) are numbers of ``classes``."""

    encoded: Mapping[int, bytes]
    labels: NDArray[np.int64]
    classes: Sequence[str]


def open_photos(folder: Path) -> EncodedSet:
    """The validation split of a data set in either layout. Loads torch, which reads labels for training, too.

    Raises ValueError as ``open_split`` does, and OSError for what cannot be read.
    """
    from scala_model.train.layouts import open_split

    return open_split(folder, "val")


def take(data: EncodedSet, workload: Workload) -> Photos:
    """What the workload needs, read before the first request leaves: a disk would make them late.

    Raises ValueError where that is more than 2 GiB.
    """
    wanted = np.unique(workload.images)
    num_bytes = int(data.source.num_bytes()[wanted].sum())
    if num_bytes > MAX_BYTES:
        raise ValueError(
            f"the workload's {len(wanted)} images have {num_bytes / 2**30:.1f} GiB and must lie in memory, "
            f"{MAX_BYTES / 2**30:.0f} at most: ask for fewer requests or give smaller images"
        )
    classes = [str(entry["label"]) for entry in data.classes]
    return Photos({i: data.source.read(i) for i in wanted.tolist()}, data.labels.numpy(), classes)
