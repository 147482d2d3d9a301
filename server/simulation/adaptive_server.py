"""The server itself in the simulator: its own policies, admission rule, queue order, planner, profile and monitor."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from scala_model.width import Width
from server.latency_profile import LatencyProfile
from server.load_monitor import LoadMonitor
from server.planner import Planner
from server.policies import Policy
from server.policies.adaptive import Adaptive
from server.policies.deadlines import admissible
from server.simulation.simulator import Batch
from server.types import QueueView

PLAN_EVERY_S = 0.5


class Server:
    """Admission, one queue ordered by deadline, and ``policy``, joined as ``server/app.py`` does.

    All requests name a budget; ``widths`` are those that they allow, by default all of the profile's.
    """

    def __init__(
        self,
        policy: Policy,
        profile: LatencyProfile,
        *,
        widths: Sequence[Width] | None = None,
        max_images: int = 256,
        default_budget_s: float = 1.0,
    ) -> None:
        self.profile, self.monitor, self._policy, self._max_images = profile, LoadMonitor(), policy, max_images
        self._widths = tuple(widths or profile.widths)
        self._planner = None
        if isinstance(policy, Adaptive):
            self._planner = Planner(policy, profile, self.monitor, self._widths, default_budget_s, max_images)
        best = max(profile.accuracy[width] for width in self._widths)
        self._worth = [profile.accuracy[width] / best for width in profile.widths]
        self._index = {width: i for i, width in enumerate(profile.widths)}
        self._due: list[float] = []

    @property
    def num_waiting(self) -> int:
        """Images that are decoded and wait."""
        return len(self._due)

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        self._arrivals, self._deadlines = arrivals_s, deadlines_s
        self._due = []
        self._images: list[int] = []
        self._preparing: set[int] = set()
        self._arrived = -1
        self._next_plan_s = self._profiled_s = self._free_at = 0.0

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        admitted = self._admits(image, now, device_free_at)
        if not admitted:
            self.settled(None, now)
        return admitted

    def _admits(self, image: int, now: float, device_free_at: float) -> bool:
        decoded = image <= self._arrived
        if decoded:
            self._preparing.discard(image)
        else:
            self._arrived = image
            self.monitor.arrived(1, self._deadlines[image] - self._arrivals[image], 1.0, now)
            self._keep_plan(now)
            if len(self._due) + len(self._preparing) >= self._max_images:
                return False
        admitted = admissible(
            self._deadlines[image],
            self._widths,
            self._view(),
            self.monitor.load(now),
            self.profile,
            now=now,
            free_at=self._free_at if device_free_at > now else now,
            decoded_at=now,
            preparing=len(self._preparing),
        )
        if admitted and not decoded:
            self._preparing.add(image)
        return admitted

    def queued(self, image: int, now: float) -> None:
        self._preparing.discard(image)
        place = bisect_right(self._due, self._deadlines[image])
        self._due.insert(place, self._deadlines[image])
        self._images.insert(place, image)

    def next_batch(self, now: float) -> Batch | None:
        while self._due:
            decision = self._policy(self._view(), self.monitor.load(now), self.profile, now)
            images = [self._images[i] for i in decision.batch]
            for _ in decision.shed:
                self.settled(None, now)
            for i in sorted([*decision.batch, *decision.shed], reverse=True):
                del self._due[i], self._images[i]
            if images:
                self._profiled_s = self.profile.p50(decision.width, len(images))
                self._free_at = now + decision.predicted_s
                return Batch(self._index[decision.width], images, decision.predicted_s)
        return None

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        if self.monitor.calm(now):
            self.profile.record(self.profile.widths[batch.width], len(batch.images), [seconds])
        self.monitor.ran(seconds, 0.0, 0.0, self._profiled_s, batch.predicted_s, now)
        worth = self._worth[batch.width]
        for image in batch.images:
            self.settled(worth if now <= self._deadlines[image] else None, now)

    def settled(self, worth: float | None, now: float) -> None:
        """An image was answered or refused, as ``LoadMonitor.settled`` wants to hear it."""
        self.monitor.settled(worth, now)

    def _view(self) -> QueueView:
        count = len(self._due)
        return QueueView(self._due, [self._widths] * count, {self._widths: count} if count else {})

    def _keep_plan(self, now: float) -> None:
        if self._planner is not None and now >= self._next_plan_s:
            self._planner.refresh(now)
            self._next_plan_s = now + PLAN_EVERY_S
