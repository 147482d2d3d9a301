"""Who may come in. Everything is bounded here, before a byte is decoded: images, bytes, and predicted lateness.

An image is counted from the moment its body is in until it is answered, so the work of the decoders is part of the
queue and cannot hide in waiting coroutines.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from scala_model.width import Width
from server.device import Device
from server.errors import Impossible, Shed, TooLarge, Unavailable
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.policies.deadlines import admissible, mixed_work_s, quickest_of
from server.request_queue import RequestQueue
from server.types import Load, Terms

MAX_INFLIGHT_BODIES = 8  # of the largest size; as many bytes may be held in request bodies at once, ...
RESERVED_BODIES, SMALL_SHARE = 1, 16  # ... so many of them only in bodies of at most a sixteenth of that size
MIN_UPLOAD_S = 1.0  # that nobody takes from an upload; then it may have to end for others
MAX_REQUESTS_PER_IMAGE = 4  # requests inside, most of them sending, for each image that the queue holds


@dataclass(slots=True, eq=False)
class Permit:
    """What one request holds while it is inside: bytes as they come in, and places in the queue once they are in.

    ``end_upload`` ends a request whose body is still coming in; None where it is in, or there is none.
    """

    admission: Admission
    since: float
    images: int = 0
    num_bytes: int = 0
    body_bytes: int = 0
    end_upload: Callable[[], object] | None = None
    gave_way: bool = False

    def add_bytes(self, count: int) -> None:
        """Raises TooLarge when the body passes the limit, Shed when all bodies together do, or when it gave way."""
        if self.gave_way:
            raise self.admission.outlasted()
        for other in self.admission.room_for(self.body_bytes + count, count, self):
            self.admission.end(other)
        self.body_bytes += count
        self.num_bytes += count
        self.admission.inflight_bytes += count

    def unpack(self) -> None:
        """What is added from now on is the same body without its compression, within the same limit."""
        self.body_bytes = 0

    def set_images(self, count: int) -> None:
        """Raises TooLarge when the queue could never hold that many, Shed when it has no room for them now."""
        self.admission.check_room(count)
        self.admission.images += count
        self.images = count


class Admission:
    """Bounds and predictions for one server. ``images`` are inside: decoded, queued or run.

    ``fixed``: the one width to serve at; an image whose pin or floor forbids it gets the narrowest that it allows.
    """

    def __init__(
        self,
        queue: RequestQueue,
        profile: LatencyProfile,
        monitor: LoadMonitor,
        device: Device,
        *,
        max_images: int,
        max_body_bytes: int,
        fixed: Width | None = None,
    ) -> None:
        self._queue, self._profile, self._monitor, self._device, self.fixed = queue, profile, monitor, device, fixed
        self.max_images, self.max_body_bytes = max_images, max_body_bytes
        self._wishes = {profile.widths: profile.widths}
        self._permits: set[Permit] = set()
        self.images = 0
        self.preparing = 0  # of them, those with a decoder
        self.inflight_bytes = 0

    @property
    def requests(self) -> int:
        return len(self._permits)

    @contextmanager
    def permit(self, declared_bytes: int | None) -> Iterator[Permit]:
        """Room for one request; its images are asked for when its body has come in, so that slow senders hold no place.

        Raises TooLarge for a declared size over the limit, Shed when there is no room.
        """
        if declared_bytes is not None:
            self.room_for(declared_bytes, declared_bytes)
        self.check_room(1)
        if self.requests >= MAX_REQUESTS_PER_IMAGE * self.max_images:
            if not (overdue := self._overdue()):
                raise self.shed(f"{self.requests} uploads are open, as many as may be")
            self.end(overdue[0])
        permit = Permit(self, time.monotonic())
        self._permits.add(permit)
        try:
            yield permit
        finally:
            self._release(permit)

    def _release(self, permit: Permit) -> None:
        self._permits.discard(permit)
        self.images -= permit.images
        self.inflight_bytes -= permit.num_bytes
        permit.images = permit.num_bytes = 0

    def end(self, permit: Permit) -> None:
        """End an upload for others: what it holds is theirs."""
        assert permit.end_upload is not None
        self._release(permit)
        permit.gave_way = True
        permit.end_upload()

    def outlasted(self) -> Shed:
        """What an upload hears that was ended for others."""
        return self.shed(
            f"The server is full, and of the uploads that have taken more than {MIN_UPLOAD_S:g} s this one held most"
        )

    def room_for(self, body_bytes: int, more_bytes: int, permit: Permit | None = None) -> list[Permit]:
        """The other uploads that have to end for so many bytes more of a body that has then ``body_bytes``.

        Raises TooLarge, or Shed when even that would not make room.
        """
        if body_bytes > self.max_body_bytes:
            raise TooLarge(
                f"The body has {body_bytes} bytes or more; the limit is {self.max_body_bytes} (SCALA_MAX_BODY_BYTES): "
                "send less."
            )
        small = SMALL_SHARE * body_bytes <= self.max_body_bytes
        most = (MAX_INFLIGHT_BODIES - (0 if small else RESERVED_BODIES)) * self.max_body_bytes
        excess, ending = self.inflight_bytes + more_bytes - most, list[Permit]()
        if excess > 0:
            for other in self._overdue():
                if excess > 0 and other is not permit:
                    ending.append(other)
                    excess -= other.num_bytes
        if excess > 0:
            raise self.shed(f"The uploads of all clients would be more than {most} bytes together, the limit")
        return ending

    def _overdue(self) -> list[Permit]:
        """Uploads that may be ended for others, first who has held most for longest."""
        now = time.monotonic()
        overdue = [each for each in self._permits if each.end_upload is not None and now - each.since > MIN_UPLOAD_S]
        return sorted(overdue, key=lambda each: (1 + each.num_bytes) * (now - each.since), reverse=True)

    def check_room(self, images: int) -> None:
        if images > self.max_images:
            raise TooLarge(
                f"The request holds {images} images; the queue holds {self.max_images} (SCALA_MAX_QUEUE): send fewer "
                "at once."
            )
        if self.images + images > self.max_images:
            raise self.shed(f"The queue is full (SCALA_MAX_QUEUE is {self.max_images} images)")

    def widths_for(self, pinned: Width | None, min_accuracy: float | None) -> tuple[Width, ...]:
        """The trained widths that a pin and an accuracy floor allow. Raises Impossible, listing what exists."""
        if pinned is None and min_accuracy is None:
            return self._one_of(self._profile.widths if self.fixed is None else (self.fixed,))
        floor = min_accuracy or 0.0
        allowed = tuple(
            w for w in self._profile.widths if self._profile.accuracy[w] >= floor and (pinned is None or w == pinned)
        )
        if allowed:
            if self.fixed is not None:
                allowed = (self.fixed if self.fixed in allowed else allowed[0],)
            return self._one_of(allowed)
        asked = f"an accuracy of at least {floor:g}" + ("" if pinned is None else f" at width {pinned}")
        best = max(self._profile.accuracy.values())
        raise Impossible(
            f"No trained width has {asked}; the most accurate has {best:.4f}: lower the floor.", extra=self.offers()
        )

    def _one_of(self, widths: tuple[Width, ...]) -> tuple[Width, ...]:
        """The one object of all equal ones: policies tell them apart by that."""
        return self._wishes.setdefault(widths, widths)

    def check_possible(self, widths: Sequence[Width], budget_s: float) -> None:
        """Raises Impossible when even the idle machine is slower than the budget; the answer lists what can.

        Raises Unavailable while none of the widths is on offer.
        """
        fastest = self._p50(self._quickest(widths)) + self._monitor.least_overhead_s(time.monotonic())
        if fastest > budget_s:
            raise Impossible(
                f"A budget of {1000 * budget_s:g} ms cannot be met at any width this request allows, even when the "
                f"server is idle: the fastest takes {1000 * fastest:.1f} ms. Ask for more.",
                extra=self.offers(),
            )

    def check_in_time(self, terms: Terms, *, undecoded_bytes: int | None = None) -> float:
        """The instant by which it can be answered: ``order_by``, or else ``deadline``, of whoever names no budget.

        ``undecoded_bytes``: size of a body that has yet to be decoded. Raises Shed when it would be late now, or make
        others late, even at the fastest width.
        """
        now = time.monotonic()
        self._quickest(terms.widths)
        load = self._monitor.load(now)
        decode_s = 0.0 if undecoded_bytes is None else self._monitor.decode(undecoded_bytes).value_s(now)
        for due in sorted({terms.order_by, terms.deadline}):
            if self._admissible(due, terms.widths, load, now, now + decode_s):
                return due
        raise self.shed("Even the narrowest width would be late")

    def _admissible(self, due: float, widths: tuple[Width, ...], load: Load, now: float, decoded_at: float) -> bool:
        return admissible(
            due,
            widths,
            self._queue.view(),
            load,
            self._profile,
            now=now,
            free_at=self._device.free_by,
            decoded_at=decoded_at,
            preparing=self.preparing,
        )

    def _quickest(self, widths: Sequence[Width]) -> Width:
        """The one that takes least for one image. Raises Unavailable while none is on offer: not warmed yet, or out of
        the device's memory."""
        if (width := quickest_of(widths, self._profile)) is None:
            named = ", ".join(map(str, widths))
            raise Unavailable(f"Width {named} is not on offer now: still being warmed, or out of the device's memory.")
        return width

    def _p50(self, width: Width) -> float:
        return self._profile.p50(width, 1)

    def shed(self, why: str) -> Shed:
        """Come back when what is inside has been served, spread out so that not everyone does at once."""
        retry_after_s = math.ceil(self._drain_s() + random.uniform(0, 2))
        return Shed(f"{why}; try again in {retry_after_s} s.", retry_after_s=retry_after_s)

    def _drain_s(self) -> float:
        """Seconds of work inside, each image at the fastest width that it allows."""
        load = self._monitor.load(time.monotonic())
        kinds = self._queue.view().kinds or {self._profile.widths: 1}
        return mixed_work_s(len(self._queue) + self.preparing, kinds, load, self._profile)

    def offers(self) -> dict[str, object]:
        """What would be let in on an idle machine: by width its accuracy, and the least budget in ms."""
        overhead_s = self._monitor.least_overhead_s(time.monotonic())
        return {
            "widths": [
                {
                    "width": float(w),
                    "accuracy": self._profile.accuracy[w],
                    "latency_ms": math.ceil(1e6 * (self._p50(w) + overhead_s)) / 1000,
                }
                for w in self._profile.widths
                if self._profile.ready(w)
            ]
        }
