"""What others do, to be compared with: each published rule in its own queue, and in the queue that is the same for all.

A rule says which width and how many images (``fixed_width``, ``variable_width``), a queue who is let in, in which order
they are served and who is dropped (``queues``). ``schedulers`` joins them under the names by which they are reported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import numpy as np

from server.latency_profile import LatencyProfile
from server.simulation.baselines.fixed_width import Aimd, Clockwork, Delayed, Fixed
from server.simulation.baselines.queues import Edf, Expiring, Fifo, Hopeless, Predicting, Punctual
from server.simulation.baselines.rules import Rule
from server.simulation.baselines.table import Table, table_of
from server.simulation.baselines.tuning import EDF, Tuning, tunings
from server.simulation.baselines.variable_width import Bands, Cheapest, Greedy, ModelSwitching, SlackFit, Switching
from server.simulation.simulator import Device, Frontend, Scheduler, simulate
from server.simulation.workload import Workload

__all__ = ["MAX_IMAGES", "Tuning", "schedulers", "switching_table", "tunings"]

MAX_IMAGES = 256


def schedulers(
    profile: LatencyProfile, *, tuning: Tuning, max_images: int = MAX_IMAGES
) -> Mapping[str, Callable[[], Scheduler]]:
    """Makers of a scheduler for one run, by name: ``F-0.5``, ``SF-b``, or ``SF-b+EDF``, that rule in the other queue.

    AS is F's rule behind a prediction, so that ``F-0.5+EDF`` stands for both: a fixed width whose admission, order and
    early drop are the server's, judged at that width. All know the profile as it is now; in none do more than
    ``max_images`` wait. Raises ValueError where no image may wait, or a width has no measured batch; the maker of
    ``MS`` does when ``tuning`` has no ``switching``.
    """
    if max_images < 1:
        raise ValueError(f"a queue of {max_images} images lets nobody in: give 1 or more")
    made: dict[str, Callable[[], Scheduler]] = {}
    for name, rule, native in _rules(table_of(profile), tuning):
        made[name] = partial(_join, native, rule, max_images)
        if native is not Predicting:
            made[name + EDF] = partial(_join, Punctual, rule, max_images)
    return made


def switching_table(
    profile: LatencyProfile,
    rates: Iterable[float],
    workload_at: Callable[[float], Workload],
    device: Device,
    frontend: Frontend,
    *,
    edf: bool,
    max_images: int = MAX_IMAGES,
    seed: int = 0,
) -> Switching:
    """For each of ``rates`` (requests/s) the fixed width of most effective accuracy on the workload of that rate.

    It is simulated in the queue for which the table is meant: the one that is the same for all if ``edf``, or F's own.
    The widths' accuracies are the profile's; of widths that are worth the same, the cheapest is best.
    """
    table, queue = table_of(profile), Punctual if edf else Fifo
    rules = {width: partial(Fixed, table, width) for width in table.cheapest_first()}

    def best_for(workload: Workload) -> int:
        worth: dict[int, float] = {}
        for width, rule in rules.items():
            outcome = simulate(workload, _join(queue, rule, max_images), device, frontend, seed=seed)
            worth[width] = table.accuracy[width] * float(np.mean(outcome.finished_s <= workload.deadlines_s))
        return max(worth, key=worth.__getitem__)

    return tuple((rate, best_for(workload_at(rate))) for rate in sorted(rates))


def _rules(table: Table, tuning: Tuning) -> Iterable[tuple[str, Callable[[], Rule], type[Fifo]]]:
    """Names, makers of the rule, and the queue that is native to it."""
    for width, ratio in enumerate(table.profile.widths):
        yield f"F-{ratio}", partial(Fixed, table, width), Fifo
        yield f"TR-{ratio}", partial(Delayed, table, width, tuning.delay_s), Expiring
        yield f"C+-{ratio}", partial(Aimd, table, width), Fifo
        yield f"CW-{ratio}", partial(Clockwork, table, width, tuning.window), Hopeless
        yield f"AS-{ratio}", partial(Fixed, table, width), Predicting
    least, most = min(table.accuracy), max(table.accuracy)
    yield "INF-0", partial(Cheapest, table, least), Fifo
    yield "INF-a", partial(Cheapest, table, min(most, least + tuning.floor * (most - least))), Fifo
    yield "MS", partial(ModelSwitching, table, tuning.switching), Fifo
    yield "TH", partial(Bands, table, tuning.low, tuning.high, tuning.period_s), Fifo
    yield "MA", partial(Greedy, table, batch_first=False), Edf
    yield "MB", partial(Greedy, table, batch_first=True), Edf
    yield "SF-a", partial(SlackFit, table, tuning.buckets, batch_first=False), Edf
    yield "SF-b", partial(SlackFit, table, tuning.buckets, batch_first=True), Edf


def _join(queue: type[Fifo], rule: Callable[[], Rule], max_images: int) -> Fifo:
    return queue(rule(), max_images)
