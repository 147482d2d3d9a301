"""Reads what ``decision_log.py`` wrote: every decision, with the profile and the plan that it saw."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scala_model.width import Width
from server.decision_log import FORMAT, PATTERN
from server.latency_profile import SAMPLES, LatencyProfile, buckets_up_to
from server.planner import PlanInputs
from server.policies.threshold import Memory, Remembered
from server.types import Decision, Load, QueueView


@dataclass(frozen=True, slots=True)
class Header:
    """Who decides in a file, the ``part``-th of the log of the server that started at ``started``."""

    model: str
    policy: str
    accuracy: dict[Width, float]
    max_batch: int
    started: str
    part: int

    def continues(self, before: Header | None) -> bool:
        return before is not None and (self.started, self.part) == (before.started, before.part + 1)


@dataclass(frozen=True, slots=True)
class Moment:
    """A decision and all that it depends on; ``profile`` is as it was then, until the next moment is read."""

    path: Path
    line: int
    header: Header
    profile: LatencyProfile
    plan: PlanInputs | None
    queue: QueueView
    load: Load
    now: float
    decision: Decision


class DecisionReader:
    """The moments of some files, in order. ``gaps`` were met, in which ``missing`` decisions were dropped.

    ``cut_off`` are files whose last line was not written to its end, as those of a server that was killed. Iterating
    raises OSError, and ValueError for any other line that is damaged.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.gaps = self.missing = 0
        self.cut_off: list[Path] = []
        self._header: Header | None = None
        self._profile: LatencyProfile | None = None
        self._plan: PlanInputs | None = None
        self._readers: dict[str, Callable[[Any], None]] = {
            "header": self._read_header,
            "profile": self._read_profile,
            "cells": self._read_cells,
            "plan": self._read_plan,
            "gap": self._read_gap,
        }

    def __iter__(self) -> Iterator[Moment]:
        for path in self._paths:
            self._profile = None
            with path.open("rb") as file:
                for number, line in enumerate(file, 1):
                    try:
                        moment = self._read(path, number, line)
                    except (ValueError, LookupError, TypeError, AttributeError) as error:
                        if not line.endswith(b"\n"):
                            self.cut_off.append(path)
                            break
                        reason = f"{type(error).__name__}: {error}"
                        raise ValueError(
                            f"{path}, line {number} is no line of a decision log ({reason:.200}): move the file "
                            "away and replay the others"
                        ) from None
                    if moment is not None:
                        yield moment

    def _read(self, path: Path, number: int, line: bytes) -> Moment | None:
        ((kind, told),) = json.loads(line).items()
        if kind != "decision":
            self._readers[kind](told)
            return None
        if self._header is None or self._profile is None:
            raise ValueError("a decision before the header and the profile")
        return Moment(
            path,
            number,
            self._header,
            self._profile,
            self._plan,
            _queue(told),
            Load(**told["load"]),
            told["now"],
            _decision(told),
        )

    def _read_header(self, told: Any) -> None:
        if told["format"] != FORMAT:
            raise ValueError(f"format {told['format']}, of which only {FORMAT} is known here")
        accuracy = dict(zip(map(Width, told["widths"]), told["accuracies"], strict=True))
        max_batch = told["buckets"][-1]
        if list(buckets_up_to(max_batch)) != told["buckets"]:
            raise ValueError(f"buckets {told['buckets']}")
        self._header = Header(told["model"], told["policy"], accuracy, max_batch, told["started"], told["part"])

    def _read_profile(self, told: Any) -> None:
        if self._header is None:
            raise ValueError("a profile before the header")
        self._profile = LatencyProfile(self._header.accuracy, self._header.max_batch)
        self._read_cells(told)

    def _read_cells(self, told: Any) -> None:
        if self._profile is None:
            raise ValueError("cells before the profile")
        for width, bucket, p50_s, p99_s in told:
            self._profile.record(Width(width), bucket, _samples(p50_s, p99_s))

    def _read_plan(self, told: Any) -> None:
        self._plan = None if told is None else PlanInputs(**{name: _tuples(value) for name, value in told.items()})

    def _read_gap(self, told: Any) -> None:
        self.gaps += 1
        self.missing += told


def _samples(p50_s: float, p99_s: float) -> list[float]:
    """As many as a cell keeps, of which it makes exactly these quantiles."""
    above = SAMPLES - int(0.99 * (SAMPLES - 1))
    return [p50_s] * (SAMPLES - above) + [p99_s] * above


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _queue(told: Any) -> QueueView:
    kinds = [tuple(map(Width, widths)) for widths in told["kinds"]]
    kind_of = told.get("kind_of", [0] * len(told["due"]))
    counts = Counter(kind_of)
    return QueueView(told["due"], [kinds[i] for i in kind_of], {kind: counts[i] for i, kind in enumerate(kinds)})


def _decision(told: Any) -> Decision:
    decided = Width(told["width"]), told["batch"], told["shed"], told["predicted_s"], told["reason"]
    return Remembered(*decided, Memory(*told["memory"])) if "memory" in told else Decision(*decided)


def log_files(path: Path) -> list[Path]:
    """The files of a decision log: of a folder all of them, the oldest first. Raises ValueError when there is none."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob(PATTERN))
    if not files:
        raise ValueError(f"{path} holds no {PATTERN}: record decisions with scala-serve serve --decision-log {path}")
    return files
