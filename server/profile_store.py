"""Measured latencies that outlive the process: one JSON file for each device, engine, checkpoint and largest batch.

A server that finds its table measures two cells instead of all of them: how much faster or slower the machine is today
shows in those, and the others are the table's, times that. A file that cannot be used is as good as none, and a folder
that cannot be written to costs the next start its time, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from scala_model.checkpoint import replace_file
from scala_model.width import Width
from server.latency_profile import MIN_SAMPLES, LatencyProfile

if TYPE_CHECKING:
    from server.engine.contract import Engine

FORMAT = 1
log = logging.getLogger("scala.serve")


@dataclass(frozen=True, slots=True)
class Key:
    """What a latency depends on. ``engine`` holds its version and precision, ``checkpoint`` the weights' SHA-256."""

    device: str
    engine: str
    threads: int
    checkpoint: str
    max_batch: int
    server: str = field(default_factory=lambda: version("scala-serve"))

    @classmethod
    def of(cls, engine: Engine, weights_sha256: str) -> Self:
        return cls(engine.device, engine.name, engine.threads, weights_sha256, engine.max_batch)


@dataclass(frozen=True, slots=True)
class Table:
    """``quantiles_ms`` of the latency of each (width, batch), ascending: see ``quantiles``."""

    key: Key
    quantiles_ms: Mapping[tuple[Width, int], tuple[float, ...]]

    @classmethod
    def of(cls, key: Key, samples_s: Mapping[tuple[Width, int], Iterable[float]]) -> Self:
        """Of what was measured, as ``LatencyProfile.samples()`` gives it, in seconds."""
        return cls(key, {cell: tuple(1000 * s for s in quantiles(seconds)) for cell, seconds in samples_s.items()})

    def scaled_samples_s(self, width: Width, batch: int, scale: float) -> list[float]:
        """Samples in seconds to record for a cell on a machine ``scale`` times as slow; none if it was not measured."""
        return [scale * ms / 1000 for ms in self.quantiles_ms.get((width, batch), ())]


def scale_of(table: Table, profile: LatencyProfile) -> float:
    """How many times as slow as the table the machine is now: the median of p50 / p50 over the cells of both.

    1 where they have none in common.
    """
    ratios = [
        1000 * cell.p50_s / median(table_ms)
        for place, table_ms in table.quantiles_ms.items()
        if (cell := profile.cell(*place))
    ]
    return median(ratios) if ratios else 1.0


def quantiles(samples: Iterable[float]) -> list[float]:
    """At most MIN_SAMPLES of them, ascending, in which a profile finds nearly the p50 and exactly the p99 of all.

    They are evenly spaced but for the last two, p99 and maximum: in 20 samples a profile takes the 19th for the p99.
    """
    ordered = sorted(samples)
    if len(ordered) <= MIN_SAMPLES:
        return ordered
    levels = [*((i + 0.5) / MIN_SAMPLES for i in range(MIN_SAMPLES - 2)), 0.99, 1.0]
    return [ordered[int(level * (len(ordered) - 1))] for level in levels]


def default_folder() -> Path:
    """``scala-serve`` in the user's cache, as the XDG base directory specification places it: absolute paths only."""
    cache, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if os.path.isabs(cache):
        return Path(cache, "scala-serve")
    # A user without a home, as containers run them, gets a cache for the container's life.
    return Path(home if os.path.isabs(home) else tempfile.gettempdir(), ".cache", "scala-serve")


class ProfileStore:
    """The tables in a folder, which need not exist. Nothing here raises for what is wrong with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: Key) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(key)).encode()).hexdigest()
        return self.folder / f"latency-{digest[:16]}.json"

    def read(self, key: Key) -> Table | None:
        """The table of a key; None if there is none, it is damaged (which is logged), or of another format or key."""
        path = self.path(key)
        try:
            file = _File.model_validate_json(path.read_bytes())
            table = Table(key, {(Width(cell.width), cell.batch): tuple(sorted(cell.ms)) for cell in file.cells})
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            log.warning("%s is damaged, all is measured anew: %s", path, str(error).replace("\n", " "))
            return None
        return table if (file.format, file.key) == (FORMAT, key) else None

    def write(self, table: Table) -> None:
        """Keep a table in the place of the one before. A folder that cannot be written to is a warning in the log."""
        cells = [
            _Cell(width=str(width.ratio), batch=batch, ms=[round(ms, 6) for ms in quantiles_ms])
            for (width, batch), quantiles_ms in sorted(table.quantiles_ms.items())
        ]
        file = _File(format=FORMAT, key=table.key, cells=cells)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            replace_file(self.path(table.key), (file.model_dump_json() + "\n").encode())
        except OSError as error:
            log.warning("measured latencies are not kept for the next start: %s", error)


class _Cell(BaseModel):
    """One line of the file; the width is an exact ratio, such as 5/16."""

    model_config = ConfigDict(strict=True)
    width: str
    batch: Annotated[int, Field(gt=0)]
    ms: Annotated[list[Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)]


class _File(BaseModel):
    model_config = ConfigDict(strict=True)
    format: int
    key: Key
    cells: list[_Cell]
