"""What a decision is worth beyond its own batch: the queue it leaves behind and the arrivals that it will meet.

Serving is seen as a semi-Markov decision process. Its state is the number n of images that wait when the device is
free, an action a width w and a number b of them, its reward the b x accuracy(w) answers that will be right. The batch
takes t(w, b), in which a random number of images arrive; one that would come too late, though the device did nothing
but the fastest width from then on, is lost. Howard's policy iteration finds the schedule with the most right answers a
second, and with it the relative value of every state, by which the actions of a state are ranked (Puterman, Markov
Decision Processes, 1994, section 11.4).

The ranking depends on the profile, on the budgets that callers name, and on how many images a second arrive: a
``Plan`` holds one for each of a ladder of rates. Deadlines enter as a distribution only; whether those of the images
that wait can be met is for the policy to check, exactly.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

STEP, LEVELS = 2**0.25, 25  # rates: from a quarter of what the widest width can serve to sixteen times as many
SLOWDOWNS, BETWEEN = (1.0, 1.5, 2.25, 3.375), (1.225, 1.837, 2.756)  # interference, and where one gives way to the next
IMPROVEMENTS, TOLERANCE = 30, 1e-9
POINTS, AGES = 24, 8  # of the distributions of arrivals, and of how long those that wait have waited
LEAST_SHARE, LULL = 1e-3, 1e-7


class Action(NamedTuple):
    """Run ``batch`` images, or all that wait, at the width of index ``width``.

    ``worth`` is in right answers, and says something only beside that of the same state's other actions.
    """

    width: int
    batch: int
    worth: float


@dataclass(frozen=True, eq=False)
class Plan:
    """``worth`` (F, L, S, A) of all actions, the best first: ``order`` tells which of ``actions`` (A, 2) it is.

    F are the ``SLOWDOWNS``; level l is for ``lowest_rate[f] * STEP**l`` images/s. ``state_of[n - 1]`` is the state of n
    waiting images; of more, its last.
    """

    lowest_rate: Floats
    state_of: Counts
    actions: Counts
    order: Counts
    worth: Floats

    def ranked(self, rate: float, interference: float, waiting: int) -> tuple[Action, ...]:
        """For ``rate`` images/s, when everything takes ``interference`` times as long as in the profile."""
        slow = min(bisect_left(BETWEEN, interference), len(SLOWDOWNS) - 1)
        excess = rate * interference / SLOWDOWNS[slow] / self.lowest_rate[slow]
        level = 0 if excess <= 1 else min(round(math.log(excess, STEP)), LEVELS - 1)
        return self._actions_of(slow, level, int(self.state_of[min(waiting, len(self.state_of)) - 1]))

    @cached_property
    def _actions_of(self) -> Callable[[int, int, int], tuple[Action, ...]]:
        """Made once they are asked for: all at once they are ten thousands."""

        @cache
        def actions_of(slow: int, level: int, state: int) -> tuple[Action, ...]:
            place = slow, level, state
            columns = (*self.actions[self.order[place]].T, self.worth[place])
            return tuple(map(Action, *(column.tolist() for column in columns)))

        return actions_of

    def write(self, file: BinaryIO) -> None:
        np.savez(file, **{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def read(cls, file: BinaryIO) -> Plan:
        """Raises ValueError for what ``write`` has not written."""
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        return cls(**arrays)


@dataclass(frozen=True, slots=True)
class Choices:
    """All actions, as arrays (A): index of the width, images, seconds, share of right answers."""

    width: Counts
    batch: Counts
    seconds: Floats
    accuracy: Floats

    @property
    def per_image_s(self) -> float:
        """The least that an image can cost."""
        return float((self.seconds / self.batch).min())

    @property
    def seconds_per_image_at_best(self) -> float:
        """Of the most accurate width, in its best batch."""
        best = self.accuracy == self.accuracy.max()
        return float((self.seconds[best] / self.batch[best]).min())

    def seconds_for(self, batch: Floats) -> Floats:
        """Seconds (A, S) when only so many images (A, S) are run: between two sizes, on the line that joins them."""
        taken = np.empty(batch.shape)
        for width in np.unique(self.width):
            mine = self.width == width
            taken[mine] = np.interp(batch[mine], self.batch[mine], self.seconds[mine])
        return taken


def make_plan(
    seconds: Sequence[Sequence[tuple[int, float]]],
    accuracy: Sequence[float],
    budgets_s: Sequence[float],
    max_waiting: int,
    overhead_s: float = 0.0,
) -> Plan:
    """A plan for widths whose batches take ``seconds[width]``: pairs of images and seconds, ascending.

    ``accuracy`` is that of each width, ``budgets_s`` a sample of what callers grant; more than ``max_waiting`` images
    are not let in. Between two batches ``overhead_s`` pass.
    """
    choices = [_choices(seconds, accuracy, slowdown, overhead_s) for slowdown in SLOWDOWNS]
    budgets = np.sort(np.asarray(budgets_s, float))
    most = max(2, min(max_waiting, math.ceil(budgets[-1] / choices[0].per_image_s)))
    states = _states(most)
    lowest = np.array([0.25 / each.seconds_per_image_at_best for each in choices])
    worth = np.array([_ladder(each, states, budgets, rate) for each, rate in zip(choices, lowest, strict=True)])
    order = np.argsort(-worth, axis=-1, kind="stable")
    return Plan(
        lowest,
        np.maximum(np.searchsorted(states, np.arange(1, most + 1), side="right") - 2, 0),
        np.stack([choices[0].width, choices[0].batch], axis=-1),
        order.astype(np.int16),
        np.take_along_axis(worth, order, axis=-1),
    )


def _ladder(choices: Choices, states: Counts, budgets: Floats, lowest_rate: float) -> Floats:
    """Worth (L, S - 1, A) of every action in every state, from the lowest rate on."""
    crowd = _Crowd(budgets, choices.per_image_s, states[-1] + choices.seconds.max() / choices.per_image_s)
    return np.array([_worth(choices, states, crowd, lowest_rate * STEP**level).T for level in range(LEVELS)])


def _choices(
    seconds: Sequence[Sequence[tuple[int, float]]], accuracy: Sequence[float], slowdown: float, overhead_s: float
) -> Choices:
    rows = [
        (width, batch, slowdown * taken + overhead_s, accuracy[width])
        for width, cells in enumerate(seconds)
        for batch, taken in cells
    ]
    return Choices(*map(np.array, zip(*rows, strict=True)))


def _states(most: int) -> Counts:
    """0, 1, 2, ... and from 24 on ever larger steps, up to ``most``."""
    large = np.geomspace(min(24, most), most, 24).round().astype(np.int64)
    return np.unique(np.concatenate([np.arange(min(24, most)), large]))


def _worth(choices: Choices, states: Counts, crowd: _Crowd, rate: float) -> Floats:
    """Of every action in every state but the empty one (A, S - 1): its right answers, less what the same time brings on
    average, and the value of the state that it leads to. By policy iteration."""
    waiting, rows = states[1:], np.arange(len(states) - 1)
    batch = np.minimum(choices.batch[:, None], waiting).astype(float)
    taken = choices.seconds_for(batch)
    late = crowd.late(waiting, taken, rate)
    served = np.minimum(batch, waiting - late)  # the policy gives up who would be late, and runs others
    reward: Floats = choices.accuracy[:, None] * served
    moves = _moves(states, crowd.joined(waiting - late - served, taken, _arrivals(rate * taken)))
    moves = (1 - LULL) * moves + LULL * np.eye(len(states))[0]  # so that every state can lead to every other
    after_empty = np.eye(len(states))[1]
    best, worth = np.argmax(reward / taken, axis=0), reward
    for _ in range(IMPROVEMENTS):
        # value[s] + gain * seconds[s] = reward[s] + sum of moves[s] x value, where value[0] = 0: its place is gain's
        system = np.eye(len(states)) - np.vstack([after_empty, moves[best, rows]])
        system[:, 0] = np.append(1 / rate, taken[best, rows])
        gain, *value = np.linalg.solve(system, np.append(0.0, reward[best, rows]))
        worth = reward - gain * taken + moves @ np.array([0.0, *value])
        improved = np.argmax(worth, axis=0)
        if (worth[improved, rows] <= worth[best, rows] + TOLERANCE).all():
            break
        best = improved
    return worth


class _Crowd:
    """Who waits, and who is lost by waiting, when budgets are drawn from a sample (ascending).

    ``per_image_s`` is the least that an image ahead costs. Of one that finds i others, and the device busy for another
    s seconds, the chance to stay is that of a budget above s + (i + 1) x ``per_image_s``.
    """

    def __init__(self, budgets: Floats, per_image_s: float, most: float) -> None:
        self._budgets, self._per_image_s = budgets, per_image_s
        self._above = 1 - (np.arange(len(budgets)) + 0.5) / len(budgets)
        # How many must come until a queue has grown to this length; to be read in both directions.
        self._length = np.arange(math.ceil(most) + 1.0)
        stays = self._share_above((self._length[:-1] + 1) * per_image_s)
        self._needed = np.append(0.0, np.cumsum(1 / np.maximum(stays, LEAST_SHARE)))

    def late(self, waiting: Counts, taken: Floats, rate: float) -> Floats:
        """How many of those that wait (S) are late once the device has been busy for ``taken`` (A, S) seconds.

        They are taken to have waited between no time and that in which as many arrive, or could have been served.
        """
        longest = np.minimum(waiting / rate, waiting * self._per_image_s)
        ages = longest[:, None] * (np.arange(AGES) + 0.5) / AGES
        # Few have waited for long: who is still there is as likely of an age as a budget is to exceed it.
        in_time: Floats = self._share_above(ages + taken[..., None]).sum(-1) / self._share_above(ages).sum(-1)
        return waiting * (1 - in_time)

    def joined(self, left: Floats, taken: Floats, arrivals: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
        """Lengths of the queue after ``taken`` seconds and their probabilities (A, S, Q), when ``left`` wait at first.

        A newcomer finds the device busy for half of that time.
        """
        counts, weights = arrivals
        busy = taken / 2 / self._per_image_s  # as if so many were ahead
        needed = np.interp(left + busy, self._length, self._needed)[..., None] + counts
        return np.interp(needed, self._needed, self._length) - busy[..., None], weights

    def _share_above(self, seconds: Floats) -> Floats:
        """The share of budgets that are longer, without steps."""
        return np.interp(seconds, self._budgets, self._above, left=1.0, right=0.0)


def _arrivals(mean: Floats) -> tuple[Floats, Floats]:
    """Numbers of arrivals and their Poisson probabilities (..., Q); of many, every so many stand for all."""
    step = np.maximum(1.0, (mean + 5 * np.sqrt(mean)) / (POINTS - 1))[..., None]
    counts = step * np.arange(POINTS)
    log = counts * np.log(mean)[..., None] - _log_factorial(counts)
    weights = np.exp(log - log.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    # Exactly as many as come: one in a hundred more would make idle time look like an income.
    return counts * (mean[..., None] / (counts * weights).sum(-1, keepdims=True)), weights


def _log_factorial(count: Floats) -> Floats:
    """Gosper's formula: within 0.5 % of n!, and close to 1 at 0."""
    result: Floats = count * np.log(np.maximum(count, 1e-300)) - count + 0.5 * np.log((2 * count + 1 / 3) * np.pi)
    return result


def _moves(states: Counts, lengths: tuple[Floats, Floats]) -> Floats:
    """Probabilities (A, S - 1, S) of the next state; a length between two states counts for both."""
    length, weights = lengths
    upper = np.searchsorted(states, length).clip(1, len(states) - 1)
    share = ((length - states[upper - 1]) / (states[upper] - states[upper - 1])).clip(0, 1)
    cell = np.arange(upper[..., 0].size).reshape(*upper.shape[:-1], 1) * len(states)
    size = upper[..., 0].size * len(states)
    flat: Floats = np.bincount((cell + upper).ravel(), (weights * share).ravel(), size).astype(float)
    flat += np.bincount((cell + upper - 1).ravel(), (weights * (1 - share)).ravel(), size)
    return flat.reshape(*upper.shape[:-1], len(states))
