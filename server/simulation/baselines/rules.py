"""What a rule is: it says which width and how many images, and leaves to a queue who they are and who is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from server.simulation.baselines.table import Table


class Choice(NamedTuple):
    """Run the first ``batch`` images that wait at the width of this position."""

    width: int
    batch: int


class Rule:
    """Chooses for one run. ``widths`` are those that it may use at present: admission and early drop are judged by
    the fastest of them."""

    def __init__(self, table: Table, widths: tuple[int, ...]) -> None:
        self.table, self.widths = table, widths

    def arrived(self, now: float) -> None:
        """A request came, whether or not it will be let in."""

    def choose(self, due: Sequence[float], oldest_s: float, now: float) -> Choice | float:
        """What to run, or when to ask again. ``due`` are the deadlines of those that wait, in the order in which they
        will be served and not empty; ``oldest_s`` is when the first of them arrived."""
        raise NotImplementedError

    def ran(self, choice: Choice, seconds: float, on_time: bool, now: float) -> None:
        """A batch is done; ``on_time``: all of it."""

    def alone_s(self) -> float:
        """What a single image would take, the least in which anybody can be answered."""
        return min(self.table.p50_s[width][1] for width in self.widths)

    def at_most(self, width: int, due: Sequence[float]) -> Choice:
        """As many as wait and as fit into a batch."""
        return Choice(width, min(len(due), self.table.max_batch(width)))
