"""Every decision with its inputs, as lines of JSON on disk: enough to derive each of them again, see ``replay.py``.

A line is an object whose one key tells what it holds:

    header     who decides: model, policy, widths, their accuracies, and the batch sizes of the latency profile
    profile    every cell of it that there is: [width, batch size, p50_s, p99_s]
    cells      those of them whose seconds have changed since
    plan       what the adaptive policy's plan is made from (``PlanInputs``); null as long as there is none
    decision   queue, load and instant as the policy saw them, what it remembered, if anything, and what it decided
    gap        so many decisions are missing here, because the disk did not keep up or could not be written

A file begins with header, profile and plan, and behind a gap come profile and plan: to go on, nothing is needed of what
was deleted or lost before. Floats are written in full, so that they are read back bit for bit.

What cannot be written is lost. It is tried again every half a minute, with a file of its own for what comes then, which
begins with the gap. What was written of a decision in part is not kept, nor is a file that holds no whole one.
"""

from __future__ import annotations

import io
import json
import logging
import os
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, fields
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.planner import PlanInputs
from server.policies.threshold import Remembered
from server.tolerated import Tolerated
from server.types import Decision, Load, QueueView

FORMAT = 1
PATTERN = "decisions-*.jsonl"  # sorted by name, they are in the order in which they were written
NUM_FILES = 8  # that share the bytes allowed
MAX_PENDING_BYTES = 8 * 2**20  # not written yet; then decisions are dropped
WRITE_EVERY_S = 0.1
TRY_AGAIN_S = 30.0
CLOSE_S = 1.0  # for what is still pending when the server leaves
LOAD_FIELDS = [field.name for field in fields(Load)]
# Lines are made on the event loop: 40 µs for a decision about 20 images and the cell that changed before it.
_encode = json.JSONEncoder(separators=(",", ":")).encode
log = logging.getLogger("scala.serve")


class DecisionLog:
    """Hears of plans and decisions on the event loop; a thread of its own writes them, ``max_bytes`` in all at most.

    ``model`` and ``policy`` are names, ``profile`` is what the decisions see. ``dropped`` is told, from either thread,
    how many decisions were not written.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        model: str,
        policy: str,
        profile: LatencyProfile,
        dropped: Callable[[int], object],
    ) -> None:
        self._profile, self._dropped = profile, dropped
        self._about = {
            "format": FORMAT,
            "model": model,
            "policy": policy,
            "widths": [float(width) for width in profile.widths],
            "accuracies": list(profile.accuracy.values()),
            "buckets": list(profile.buckets),
            "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self._writer = _Writer(folder, max_bytes, dropped)
        self._file_bytes = max_bytes // NUM_FILES
        self._filled = self._file_bytes  # so that the first decision begins a file
        self._part = self._missing = 0
        self._places: list[tuple[Width, int]] = []  # the cells, and ...
        self._seconds: list[tuple[float, float]] = []  # ... p50 and p99 of each, as the last record told them
        self._plan: PlanInputs | None = None
        self._plan_is_new = False

    def start(self) -> None:
        self._writer.start()

    def close(self) -> None:
        """Write what is pending, for a second at most."""
        self._writer.close()

    def planned(self, inputs: PlanInputs) -> None:
        """From the next decision on, the policy follows the plan that these make."""
        self._plan, self._plan_is_new = inputs, True

    def decided(self, queue: QueueView, load: Load, now: float, decision: Decision) -> None:
        """The profile is read now: it must be the one that the policy has just seen."""
        try:
            written = self._can_write() and self._record(_decision(queue, load, now, decision))
        except MemoryError:  # of which whoever waits for the decision shall hear nothing
            written = False
        if not written:
            self._missing += 1
            self._dropped(1)

    def _record(self, decided: str) -> bool:
        before = self._state() if self._missing else self._news()
        opens = self._filled + len(before) + len(decided) > self._file_bytes
        if opens:
            before = _line("header", self._about | {"part": self._part + 1}) + self._state()
        text = before + decided
        if len(text) > self._file_bytes or not self._writer.take(Entry(text, self._missing), opens):
            return False
        self._missing = 0
        self._part += opens
        self._filled = len(text) + (0 if opens else self._filled)
        return True

    def _can_write(self) -> bool:
        """Not for a while after a failure. Then the next decision begins a file."""
        if not self._writer.failed:
            return True
        if time.monotonic() < self._writer.failed_at + TRY_AGAIN_S:
            return False
        num_missing, self._part = self._writer.recover()
        self._missing += num_missing
        self._filled = self._file_bytes
        return True

    def _state(self) -> str:
        """All that the next decision depends on and does not say itself, and how many are missing before it."""
        gap = _line("gap", self._missing) if self._missing else ""
        cells = self._profile.cells()
        self._places, self._seconds = list(cells), [(cell.p50_s, cell.p99_s) for cell in cells.values()]
        told = [_cell(place, seconds) for place, seconds in zip(self._places, self._seconds, strict=True)]
        self._plan_is_new = False
        return gap + _line("profile", told) + _line("plan", self._plan and asdict(self._plan))

    def _news(self) -> str:
        """What of it has changed."""
        cells = self._profile.cells()
        if self._plan_is_new or list(cells) != self._places:  # seldom
            return self._state()
        before, self._seconds = self._seconds, [(cell.p50_s, cell.p99_s) for cell in cells.values()]
        if self._seconds == before:
            return ""
        told = zip(self._places, self._seconds, before, strict=True)
        return _line("cells", [_cell(place, now) for place, now, then in told if now != then])


def _cell(place: tuple[Width, int], seconds: tuple[float, float]) -> list[float]:
    width, bucket = place
    return [float(width), bucket, *seconds]


def _decision(queue: QueueView, load: Load, now: float, decision: Decision) -> str:
    """``kind_of`` tells which of ``kinds``, the widths that somebody allows, each image allows; left out for one."""
    kinds = list(queue.kinds)
    index = {widths: i for i, widths in enumerate(kinds)}
    return _line(
        "decision",
        {
            "now": now,
            "load": {name: getattr(load, name) for name in LOAD_FIELDS},
            "due": list(queue.due),
            "kinds": [[float(width) for width in widths] for widths in kinds],
            **({"kind_of": [index[widths] for widths in queue.widths]} if len(kinds) > 1 else {}),
            **({"memory": decision.memory} if isinstance(decision, Remembered) else {}),
            "width": float(decision.width),
            "batch": list(decision.batch),
            "shed": list(decision.shed),
            "predicted_s": decision.predicted_s,
            "reason": decision.reason,
        },
    )


def _line(kind: str, value: Any) -> str:
    return _encode({kind: value}) + "\n"


class Entry(NamedTuple):
    """Lines for one decision, and the number of decisions that they say are missing before it."""

    text: str
    num_missing: int


class _Writer(threading.Thread):
    """Appends entries to files of a folder; deletes the oldest before they are too many.

    Once it has ``failed`` it takes nothing, until ``recover`` is called.
    """

    def __init__(self, folder: Path, max_bytes: int, dropped: Callable[[int], object]) -> None:
        super().__init__(name="decision-log", daemon=True)
        self._folder, self._dropped = folder, dropped
        self._max_old_bytes = max_bytes - max_bytes // NUM_FILES
        self._names = (f"decisions-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}-{os.getpid()}", ".jsonl")
        self._lock, self._closing = threading.Lock(), threading.Event()
        self._pending: list[list[Entry]] = [[]]  # for the file that is open, and for each that is to follow it
        self._pending_bytes = 0
        self.failed, self.failed_at = False, 0.0
        self._recording = Tolerated("decisions", "recorded")
        self._num_missing = 0  # since the failure
        self._file: io.FileIO | None = None  # without a buffer: what could not be written must not be tried for ever
        self._path = folder  # of the file
        self._num_files = self._whole_bytes = 0  # that were kept; of whole entries in the last of them

    def take(self, entry: Entry, opens: bool) -> bool:
        """Whether there was room for it; ``opens``: it begins a new file."""
        with self._lock:
            if self.failed or self._pending_bytes + len(entry.text) > MAX_PENDING_BYTES:
                return False
            if opens:
                self._pending.append([])
            self._pending[-1].append(entry)
            self._pending_bytes += len(entry.text)
            return True

    def recover(self) -> tuple[int, int]:
        """How many decisions are missing, and how many files there are; the next entry must open one."""
        with self._lock:
            self.failed = False
            return self._num_missing, self._num_files

    def run(self) -> None:
        """Looks a few times a second: to be woken for every decision would take the interpreter from the event loop."""
        while not self._closing.wait(WRITE_EVERY_S):
            with suppress(MemoryError):  # to tell of one that was met already
                self._write_pending()
        self._write_pending()
        self._close_file()

    def close(self) -> None:
        self._closing.set()
        if self.is_alive():
            self.join(CLOSE_S)

    def _write_pending(self) -> None:
        if self._pending == [[]]:
            return
        with self._lock:
            pending, self._pending, self._pending_bytes = self._pending, [[]], 0
        try:
            with self._recording:
                for i, entries in enumerate(pending):
                    if i:
                        self._open_next()
                    self._write(entries)
                pending = []
        finally:
            if pending:
                self._lose(pending)

    def _lose(self, pending: list[list[Entry]]) -> None:
        """All that was not written, and what was taken meanwhile."""
        self._close_file()
        with self._lock:
            self.failed_at, self.failed = time.monotonic(), True
            lost = [entry for entries in (*pending, *self._pending) for entry in entries]
            self._num_missing = sum(1 + entry.num_missing for entry in lost)
            self._pending, self._pending_bytes = [[]], 0
        self._dropped(len(lost))

    def _write(self, entries: list[Entry]) -> None:
        """All at once: every write takes the interpreter from the event loop. What was written leaves the list."""
        data, num_written = "".join(entry.text for entry in entries).encode("ascii"), 0
        try:
            while num_written < len(data):
                assert self._file is not None, "the first entry opens a file"
                num_written += self._file.write(data[num_written:])
        finally:
            ends = [0, *accumulate(len(entry.text) for entry in entries)]
            num_whole = bisect_right(ends, num_written) - 1
            self._whole_bytes += ends[num_whole]
            del entries[:num_whole]

    def _open_next(self) -> None:
        self._close_file()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_room()
        self._path = self._folder / f"{self._names[0]}-{self._num_files + 1:06d}{self._names[1]}"
        self._file = self._path.open("wb", buffering=0)
        self._num_files, self._whole_bytes = self._num_files + 1, 0

    def _make_room(self) -> None:
        """Others may delete files of the folder, too, and at any time."""
        sizes = {}
        for path in sorted(self._folder.glob(PATTERN)):
            with suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        while sum(sizes.values()) > self._max_old_bytes:
            oldest = next(iter(sizes))
            oldest.unlink(missing_ok=True)
            del sizes[oldest]

    def _close_file(self) -> None:
        if self._file is None:
            return
        with suppress(OSError):
            self._file.truncate(self._whole_bytes)  # a gap in what was written in part would be told twice
        with suppress(OSError):
            self._file.close()
        self._file = None
        if not self._whole_bytes:  # it is begun again
            self._num_files -= 1
            with suppress(OSError):
                self._path.unlink()
