"""Who may come in. Everything is bounded here, before a byte is decoded: images, bytes, and predicted lateness.

An image that is let in is counted until it is answered, so the work of the decoders is part of the queue and cannot
hide in waiting coroutines.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from scala_model.width import Width
from server.errors import Impossible, Shed, TooLarge, Unavailable
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.request_queue import RequestQueue
from server.types import Load, Terms

MAX_INFLIGHT_BODIES = 8  # of the largest size; as many bytes may be held in request bodies at once


@dataclass(slots=True)
class Permit:
    """What one request holds while it is inside."""

    admission: Admission
    images: int = 0
    num_bytes: int = 0

    def add_bytes(self, count: int) -> None:
        """Raises TooLarge when the body passes the limit, Shed when all bodies together do."""
        self.admission.check_body(self.num_bytes + count, count)
        self.num_bytes += count
        self.admission.inflight_bytes += count

    def set_images(self, count: int) -> None:
        """Raises Shed when the queue has no room for that many."""
        self.admission.check_room(count - self.images)
        self.admission.images += count - self.images
        self.images = count


class Admission:
    """Bounds and predictions for one server. ``images`` are inside: being read, decoded, queued or run."""

    def __init__(
        self,
        queue: RequestQueue,
        profile: LatencyProfile,
        monitor: LoadMonitor,
        *,
        max_images: int,
        max_body_bytes: int,
    ) -> None:
        self._queue, self._profile, self._monitor = queue, profile, monitor
        self.max_images, self.max_body_bytes = max_images, max_body_bytes
        self.images = 0
        self.inflight_bytes = 0
        self.device_free_at = 0.0  # when the running batch should end; the serve loop keeps it

    @contextmanager
    def permit(self, declared_bytes: int | None) -> Iterator[Permit]:
        """Room for one request of one image; more is asked of the permit when its body shows more.

        Raises TooLarge for a declared size over the limit, Shed when there is no room.
        """
        if declared_bytes is not None:
            self.check_body(declared_bytes, declared_bytes)
        permit = Permit(self)
        permit.set_images(1)
        try:
            yield permit
        finally:
            self.images -= permit.images
            self.inflight_bytes -= permit.num_bytes

    def check_body(self, body_bytes: int, more_bytes: int) -> None:
        if body_bytes > self.max_body_bytes:
            raise TooLarge(f"The body has {body_bytes} bytes or more; the limit is {self.max_body_bytes}: send less.")
        if self.inflight_bytes + more_bytes > MAX_INFLIGHT_BODIES * self.max_body_bytes:
            raise self._shed("The server holds as many bytes of uploads as it may")

    def check_room(self, images: int) -> None:
        if images > self.max_images:
            raise TooLarge(f"The request holds {images} images; the queue holds {self.max_images}: send fewer at once.")
        if self.images + images > self.max_images:
            raise self._shed(f"The queue is full ({self.max_images} images)")

    def widths_for(self, pinned: Width | None, min_accuracy: float | None) -> tuple[Width, ...]:
        """The trained widths that a pin and an accuracy floor allow. Raises Impossible, listing what exists."""
        if pinned is None and min_accuracy is None:
            return self._profile.widths
        floor = min_accuracy or 0.0
        allowed = tuple(
            w for w in self._profile.widths if self._profile.accuracy[w] >= floor and (pinned is None or w == pinned)
        )
        if allowed:
            return allowed
        asked = f"an accuracy of at least {floor:g}" + ("" if pinned is None else f" at width {pinned}")
        best = max(self._profile.accuracy.values())
        raise Impossible(
            f"No trained width has {asked}; the most accurate has {best:.4f}: lower the floor.", extra=self._offers()
        )

    def check_possible(self, widths: Sequence[Width], budget_s: float) -> None:
        """Raises Impossible when even the idle machine is slower than the budget; the answer lists what can.

        Raises Unavailable while none of the widths is warmed.
        """
        if not any(self._profile.ready(w) for w in widths):
            raise Unavailable(f"Width {', '.join(map(str, widths))} is still being warmed; try again in a second.")
        fastest = self._fastest_p99(widths)
        if fastest > budget_s:
            raise Impossible(
                f"A budget of {1000 * budget_s:g} ms cannot be met at any width this request allows, even when the "
                f"server is idle: the fastest takes {1000 * fastest:.1f} ms. Ask for more.",
                extra=self._offers(),
            )

    def check_in_time(self, terms: Terms, *, decoded: bool) -> None:
        """Raises Shed when even the narrowest width would be late for it now."""
        now = time.monotonic()
        load = self._monitor.load(now)
        prepare_s = 0.0 if decoded else self._monitor.prepare.value_s(now)
        start = max(now + prepare_s, self.device_free_at + self._backlog_s(terms.order_by, load))
        if start + load.interference * self._fastest_p99(terms.widths) + load.respond_s > terms.deadline:
            raise self._shed("Even the narrowest width would be late")

    def _fastest_p99(self, widths: Sequence[Width]) -> float:
        fastest = self._profile.fastest
        return self._p99(fastest) if fastest in widths else min(self._p99(w) for w in widths)

    def _p99(self, width: Width) -> float:
        return self._profile.p99(width, 1) if self._profile.ready(width) else math.inf

    def _backlog_s(self, order_by: float, load: Load) -> float:
        """Seconds of work, at the fastest width, ahead of an image ordered by ``order_by``. Decoders' images count."""
        ahead = self._queue.ahead_of(order_by) + max(0, self.images - len(self._queue) - 1)
        if not ahead:
            return 0.0
        width, profile = self._profile.fastest, self._profile
        batches = math.ceil(ahead / profile.best_batch(width))
        return ahead * load.interference * profile.seconds_per_image(width) + batches * load.hop_s

    def _shed(self, why: str) -> Shed:
        """Come back when what is inside has been served, spread out so that not everyone does at once."""
        drain_s = self._backlog_s(math.inf, self._monitor.load(time.monotonic()))
        retry_after_s = math.ceil(drain_s + random.uniform(0, 2))
        return Shed(f"{why}; try again in {retry_after_s} s.", retry_after_s=retry_after_s)

    def _offers(self) -> dict[str, object]:
        return {
            "widths": [
                {"width": float(w), "accuracy": self._profile.accuracy[w], "latency_ms": round(1000 * self._p99(w), 3)}
                for w in self._profile.widths
                if self._profile.ready(w)
            ]
        }
