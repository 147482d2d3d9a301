"""Derives recorded decisions again, bit for bit, and asks another policy about the same situations. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from scala_model.width import Width
from server.planner import PlanInputs
from server.policies import Policy, fixed_width, policy_of
from server.policies.adaptive import Adaptive
from server.policies.threshold import Remembered, Threshold
from server.replay_log import Header, Moment
from server.types import Decision, QueueView


class Player:
    """One policy on its way through a log: by default that of the log itself."""

    def __init__(self, name: str | None = None) -> None:
        self._name = name
        self._header: Header | None = None
        self._policy: Policy = policy_of(name or "adaptive")
        self._fixed: Width | None = None
        self._recorded_fixed: Width | None = None
        self._inputs: PlanInputs | None = None

    def decide(self, moment: Moment) -> Decision:
        """Raises ValueError for a policy that these widths or this log do not allow."""
        if moment.header is not self._header:
            self._begin(moment.header)
        queue = moment.queue
        if self._name is not None:
            queue = self._allowing(queue, tuple(moment.header.accuracy))
        if isinstance(self._policy, Adaptive):
            self._follow_plan(self._policy, moment)
        if isinstance(self._policy, Threshold) and isinstance(moment.decision, Remembered) and self._name is None:
            self._policy.memory = moment.decision.memory
        return self._policy(queue, moment.load, moment.profile, moment.now)

    def _begin(self, header: Header) -> None:
        """Another policy than the log's may remember what it did: it goes on from file to file, and not from one
        server to the next."""
        name, widths = self._name or header.policy, tuple(header.accuracy)
        self._fixed, self._recorded_fixed = fixed_width(name, widths), fixed_width(header.policy, widths)
        if not header.continues(self._header):
            self._policy, self._inputs = policy_of(name), None
        self._header = header

    def _allowing(self, queue: QueueView, everything: tuple[Width, ...]) -> QueueView:
        """The queue as this policy would have found it. Whoever allows just the width that the server was fixed to is
        taken to allow all."""
        seen = {kind: self._allowed(kind, everything) for kind in queue.kinds}
        counts: Counter[tuple[Width, ...]] = Counter()
        for kind, count in queue.kinds.items():
            counts[seen[kind]] += count
        return QueueView(queue.due, [seen[kind] for kind in queue.widths], counts)

    def _allowed(self, kind: tuple[Width, ...], everything: tuple[Width, ...]) -> tuple[Width, ...]:
        if kind == (self._recorded_fixed,):
            kind = everything
        if self._fixed is None:
            return kind
        return (self._fixed,) if self._fixed in kind else kind[:1]

    def _follow_plan(self, policy: Adaptive, moment: Moment) -> None:
        inputs = moment.plan
        if self._name is not None:
            inputs = self._planned_for(moment)
        if inputs != self._inputs:
            self._inputs, policy.plan = inputs, None if inputs is None else inputs.make()

    def _planned_for(self, moment: Moment) -> PlanInputs:
        """The plan's inputs, with the rows of the widths that this policy would have planned for."""
        recorded, profile = moment.plan, moment.profile
        if recorded is None:
            raise ValueError(
                f"{moment.path} was recorded under the policy {moment.header.policy}, which plans nothing: to judge "
                f"{self._name}, record under adaptive or fixed:<width>"
            )
        wanted = profile.widths if self._fixed is None else (self._fixed,)
        rows = [
            (row or tuple((cell.batch, cell.p50_s) for cell in profile.rows(width))) if width in wanted else ()
            for width, row in zip(profile.widths, recorded.seconds, strict=True)
        ]
        return replace(recorded, seconds=tuple(rows))


@dataclass(slots=True)
class Tally:
    """What a policy decided in a log's situations: ``images`` run at each width, how many of them ``in_time`` by their
    predicted p99, and how many were shed."""

    images: Counter[Width] = field(default_factory=Counter)
    in_time: int = 0
    shed: int = 0
    sum_accuracy: float = 0.0

    def add(self, moment: Moment, decision: Decision) -> None:
        load, count = moment.load, len(decision.batch)
        finish = moment.now + load.hop_s + decision.predicted_s + load.respond_s
        if count:
            self.images[decision.width] += count
        self.in_time += sum(moment.queue.due[i] >= finish for i in decision.batch)
        self.shed += len(decision.shed)
        self.sum_accuracy += count * moment.header.accuracy[decision.width]

    @property
    def in_time_share(self) -> float:
        """Of those that were run or shed."""
        return self.in_time / max(1, self.images.total() + self.shed)

    @property
    def mean_accuracy(self) -> float | None:
        """Expected, of those that were run; None when none was."""
        return self.sum_accuracy / self.images.total() if self.images.total() else None


@dataclass(slots=True)
class Report:
    """``first_difference`` is the moment and what is decided there now; ``tallies`` are by the policy's name."""

    decisions: int = 0
    different: int = 0
    first_difference: tuple[Moment, Decision] | None = None
    tallies: dict[str, Tally] = field(default_factory=dict)

    @property
    def identical(self) -> int:
        return self.decisions - self.different


def replay(moments: Iterable[Moment], other: str | None = None) -> Report:
    """Derive every decision again; with ``other``, the name of a policy, ask that one about the same situations, too.

    A situation is what the recorded decisions led to: ``other`` would soon have met different ones. Raises ValueError
    for a policy that the log does not allow, and what reading the moments raises.
    """
    report, again, rival = Report(), Player(), Player(other) if other is not None else None
    for moment in moments:
        report.decisions += 1
        derived = again.decide(moment)
        if not _same(derived, moment.decision):
            report.different += 1
            report.first_difference = report.first_difference or (moment, derived)
        if rival is not None and other is not None:
            recorded = f"{moment.header.policy} (recorded)"
            report.tallies.setdefault(recorded, Tally()).add(moment, moment.decision)
            report.tallies.setdefault(other, Tally()).add(moment, rival.decide(moment))
    return report


def _same(one: Decision, other: Decision) -> bool:
    """Bit for bit; a range and a list of the same positions are the same."""
    return _parts(one) == _parts(other)


def _parts(decision: Decision) -> tuple[object, ...]:
    return decision.width, [*decision.batch], [*decision.shed], decision.predicted_s, decision.reason
