"""The words of the server as values; see docs/architecture.md. Instants are ``time.monotonic()`` seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from scala_model.width import Width

SMALL_BYTES = 32 * 1024  # an encoded image of at most so many may be decoded in place
Encoded = bytes | str  # an image's bytes as a file holds them, or base64 of them
Raster = NDArray[np.uint8]  # (height, width, 3), an image of any size
Pixels = NDArray[np.uint8]  # (image_size, image_size, 3)
Probabilities = NDArray[np.float32]  # (B, classes)


@dataclass(frozen=True, slots=True)
class Terms:
    """What a request asks for. ``deadline`` ends it; ``order_by`` is its place in the queue.

    They are the same instant when it names a budget. One that names none is ordered by arrival + default budget and may
    be late, up to ``deadline``. ``widths`` are those its pin or accuracy floor allows, ascending. ``priority`` orders
    those of the same instant: 1 first, then 2 and so on, and 0, who named none, last.
    """

    arrival: float
    order_by: float
    deadline: float
    widths: tuple[Width, ...]
    priority: int = 0


@dataclass(frozen=True, slots=True)
class QueueView:
    """The queue as a policy sees it: by when each image should be answered, ascending, and the widths that it allows.

    ``due`` is ``order_by``, or ``deadline`` for who can be answered by the former no more. ``kinds``: how many images
    there are of each tuple in ``widths``. The lists are the queue's own: to be read before it changes.
    """

    due: Sequence[float]
    widths: Sequence[tuple[Width, ...]]
    kinds: Mapping[tuple[Width, ...], int]


@dataclass(frozen=True, slots=True)
class Load:
    """What the monitor saw. ``arrival_rate`` in images/s, ``interference`` observed / profiled latency of the engine,
    ``tail`` how much further than profiled its p99 lies from there, ``busy`` the share of the last second or so in
    which it ran.

    What a busy event loop costs is not a factor but an addend: ``hop_s`` a batch, to its thread and back, and
    ``respond_s`` from the engine's result to the answer's first byte.
    """

    arrival_rate: float = 0.0
    interference: float = 1.0
    hop_s: float = 0.0
    respond_s: float = 0.0
    busy: float = 0.0
    tail: float = 1.0

    def p99(self, profiled_s: float) -> float:
        """What a batch takes in 99 of 100 cases now, that took so long when it was profiled."""
        return self.interference * self.tail * profiled_s


@dataclass(frozen=True, slots=True)
class Decision:
    """Run ``batch`` (positions in the queue) at ``width``; refuse ``shed`` (positions), which would be late anyway.

    ``predicted_s`` is the batch's p99 latency in seconds; ``reason`` is for people and logs.
    """

    width: Width
    batch: Sequence[int]
    shed: Sequence[int]
    predicted_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine said of one image. ``probabilities`` (classes,); ``predicted_s`` is its decision's."""

    probabilities: NDArray[np.float32]
    width: Width
    batch_size: int
    queue_s: float
    inference_s: float
    ran_until: float
    predicted_s: float


@dataclass(frozen=True, slots=True)
class Timed:
    """An answer and how long its image took from bytes to pixels, its wait for a decoder included, in seconds."""

    answer: Answer
    decode_s: float


@dataclass(slots=True, eq=False)
class Job:
    """One decoded image on its way to an answer. ``decode_s`` as in ``Timed``."""

    terms: Terms
    pixels: Pixels
    queued_at: float
    decode_s: float = 0.0  # from bytes to pixels, the wait for a decoder included
    due: float = 0.0  # its place in the queue
    dispatched: bool = False
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
