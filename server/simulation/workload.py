"""What is asked of a server: when requests arrive, by when each wants its answer, and of which image.

An arrival process is a function of (rate, seconds, rng), a mix of budgets one of (how many, rng). Both can be told in a
few words, ``gamma:4`` and ``40-200``, and are exact for their seed: the simulator and the load generator play the same.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.random import Generator, SeedSequence, default_rng
from numpy.typing import NDArray

Seconds: TypeAlias = NDArray[np.float64]
Arrivals: TypeAlias = Callable[[float, float, Generator], Seconds]  # (rate, seconds, rng) -> ascending, below seconds
Budgets: TypeAlias = Callable[[int, Generator], Seconds]  # (how many, rng) -> one for each request

ARRIVAL_FORMS = (
    "poisson, gamma:CV2, ramp:LOW-HIGH, on-off:LOW-HIGH:ON_S:OFF_S, diurnal, diurnal:PERIOD_S, trace:FILE, "
    "trace:FILE:OFFSET"
)
BUDGET_FORMS = (
    "MS, LOW-HIGH, bimodal:LOW-HIGH, bimodal:LOW-HIGH:SHARE_LOW, lognormal:MEDIAN, lognormal:MEDIAN:SIGMA, hostile"
)
MAX_ARRIVALS = 10_000_000
MAX_CV2 = 1000.0  # some 500 requests at one instant, and then none for as long; more takes for ever to draw
HOSTILE_MS = 0.01
PERIOD_S = 1200.0  # of a day that passes in twenty minutes
PEAK, TROUGH = 1.6, 0.4  # of a day's mean rate: four to one


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """N requests in the order of their arrival; every policy that plays it gets the same images in the same order.

    ``arrivals_s`` (N) are seconds from the start, ascending; ``budgets_s`` (N); ``images`` (N) are numbers of images of
    a labelled data set. Raises ValueError when there is no request.
    """

    name: str
    arrivals_s: Seconds
    budgets_s: Seconds
    images: NDArray[np.int64]

    def __post_init__(self) -> None:
        if not self.arrivals_s.size:
            raise ValueError(f"the workload {self.name!r} has no request: give a higher rate or more seconds")
        assert self.arrivals_s.shape == self.budgets_s.shape == self.images.shape
        assert self.arrivals_s[0] >= 0
        assert (np.diff(self.arrivals_s) >= 0).all()

    def __len__(self) -> int:
        return len(self.arrivals_s)

    @property
    def deadlines_s(self) -> Seconds:
        """Seconds from the start (N)."""
        return self.arrivals_s + self.budgets_s

    @property
    def seconds(self) -> float:
        """Until the last arrival."""
        return float(self.arrivals_s[-1])

    @property
    def rate(self) -> float:
        """Requests a second; infinite when all arrive at once."""
        return len(self) / self.seconds if self.seconds else math.inf


def make_workload(
    arrivals: str, budgets: str, *, rate: float, seconds: float, num_images: int, seed: int = 0
) -> Workload:
    """The workload that these words describe. ``rate`` is in requests/s; images are drawn with replacement.

    Times, budgets and images have a stream of chance each, so that one can be changed and the others stay. Raises
    ValueError for words that mean nothing, and for a rate, a length, or both that are none or ask for too much.
    """
    for name, value in (("the rate", rate), ("the length in seconds", seconds), ("the number of images", num_images)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}: give a number above 0")
    _check_number(rate, seconds)
    times, mix, choice = map(default_rng, SeedSequence(seed).spawn(3))
    arrivals_s = parse_arrivals(arrivals)(rate, seconds, times)
    return Workload(
        f"{arrivals}, {rate:g}/s for {seconds:g} s, budgets {budgets}",
        arrivals_s,
        parse_budgets(budgets)(len(arrivals_s), mix),
        choice.integers(0, num_images, len(arrivals_s)),
    )


# -- when requests arrive


def poisson(rate: float, seconds: float, rng: Generator) -> Seconds:
    """Independent arrivals at a constant rate."""
    return np.sort(rng.uniform(0, seconds, rng.poisson(rate * seconds)))


def gamma(cv2: float) -> Arrivals:
    """Gaps from a gamma distribution of this squared coefficient of variation: 1 is Poisson, more comes in bursts."""
    _check(0 < cv2 <= MAX_CV2, f"CV^2 is {cv2:g}", f"it must be above 0 and at most {MAX_CV2:g}")

    def arrivals(rate: float, seconds: float, rng: Generator) -> Seconds:
        arrivals_s = np.zeros(0)
        while not arrivals_s.size or arrivals_s[-1] < seconds:
            gaps = rng.gamma(1 / cv2, cv2 / rate, int(rate * seconds) + 100)
            arrivals_s = np.append(arrivals_s, (arrivals_s[-1] if arrivals_s.size else 0.0) + np.cumsum(gaps))
        return arrivals_s[arrivals_s < seconds]

    return arrivals


def ramp(low: float, high: float) -> Arrivals:
    """Poisson whose rate climbs on a line from ``low`` to ``high`` times the rate, and comes down again."""
    _check_levels(low, high)

    def arrivals(rate: float, seconds: float, rng: Generator) -> Seconds:
        return _thinned(
            lambda at_s: rate * (high - (high - low) * np.abs(2 * at_s / seconds - 1)), rate * high, seconds, rng
        )

    return arrivals


def on_off(low: float, high: float, on_s: float, off_s: float) -> Arrivals:
    """Poisson at ``low`` times the rate for ``off_s``, then at ``high`` times the rate for ``on_s``, and over again."""
    _check_levels(low, high)
    _check(on_s > 0 and off_s > 0, f"{on_s:g} s on and {off_s:g} s off", "both must be above 0")

    def arrivals(rate: float, seconds: float, rng: Generator) -> Seconds:
        def rate_at(at_s: Seconds) -> Seconds:
            return np.where(at_s % (off_s + on_s) < off_s, rate * low, rate * high)

        return _thinned(rate_at, rate * high, seconds, rng)

    return arrivals


def diurnal(period_s: float = PERIOD_S) -> Arrivals:
    """Poisson whose rate is a sinusoid, its peak four times its trough; over whole periods ``rate`` is the mean."""
    _check(period_s > 0, f"the period is {period_s:g} s", "it must be above 0")

    def arrivals(rate: float, seconds: float, rng: Generator) -> Seconds:
        def rate_at(at_s: Seconds) -> Seconds:
            return rate * ((PEAK + TROUGH) / 2 + (PEAK - TROUGH) / 2 * np.sin(2 * np.pi * at_s / period_s))

        return _thinned(rate_at, rate * PEAK, seconds, rng)

    return arrivals


def trace(path: Path, offset: float = 0.0) -> Arrivals:
    """Arrivals that were recorded: a CSV file with a column TIMESTAMP, played so fast that its mean rate is ``rate``.

    A window begins at this share of the recording, and where that ends, at its start again. Nothing is left to chance.
    Raises ValueError for a file that is no such recording, or an offset outside [0, 1); OSError for none to read.
    """
    _check(0 <= offset < 1, f"the offset is {offset:g}", "it must be a share of the recording, 0 or more and below 1")
    recorded_s = read_timestamps(path)

    def arrivals(rate: float, seconds: float, rng: Generator) -> Seconds:
        period_s = len(recorded_s) / rate  # one mean gap longer than from first to last, before it is played again
        played_s = recorded_s / recorded_s[-1] * (period_s - 1 / rate)
        start_s = offset * period_s
        repeats = np.arange(math.ceil((start_s + seconds) / period_s))
        times_s: Seconds = (played_s + period_s * repeats[:, None]).ravel() - start_s
        return times_s[(times_s >= 0) & (times_s < seconds)]

    return arrivals


def read_timestamps(path: Path) -> Seconds:
    """Of a recording, in seconds from the first, ascending. Raises ValueError for a file that is none, and OSError."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        instants = np.array([row["TIMESTAMP"] for row in rows], "datetime64[ns]")
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a CSV file with a column TIMESTAMP of dates and times ({error})") from None
    _check(len(np.unique(instants)) > 1, f"{path} has {len(instants)} arrivals", "there must be two different ones")
    return np.sort(instants - instants.min()).astype(np.int64) / 1e9


def _thinned(rate_at: Callable[[Seconds], Seconds], highest: float, seconds: float, rng: Generator) -> Seconds:
    """Poisson of a varying rate, out of one at the highest: each arrival stays by chance (Lewis and Shedler 1979).

    Raises ValueError where there would be too many to choose from.
    """
    _check_number(highest, seconds)
    candidates = poisson(highest, seconds, rng)
    return candidates[rng.uniform(0, highest, len(candidates)) < rate_at(candidates)]


# -- by when each wants its answer


def one(ms: float) -> Budgets:
    """The same budget for all."""
    _check(ms > 0, f"the budget is {ms:g} ms", "it must be above 0")
    return lambda count, rng: np.full(count, ms / 1000)


def uniform(low: float, high: float) -> Budgets:
    """Anything between the two, in ms, equally likely."""
    _check(0 < low <= high, f"budgets from {low:g} to {high:g} ms", "the first must be above 0 and the lower")
    return lambda count, rng: rng.uniform(low, high, count) / 1000


def bimodal(low: float, high: float, share_low: float = 0.5) -> Budgets:
    """Two classes of requests, ``share_low`` of them with the lower budget; in ms."""
    _check(0 < low <= high, f"budgets of {low:g} and {high:g} ms", "the first must be above 0 and the lower")
    _check(0 <= share_low <= 1, f"the lower budget's share is {share_low:g}", "it must be from 0 to 1")
    return lambda count, rng: np.where(rng.uniform(size=count) < share_low, low, high) / 1000


def lognormal(median: float, sigma: float = 0.5) -> Budgets:
    """Half of them below ``median`` ms; ``sigma`` is the standard deviation of their logarithm."""
    _check(median > 0 and sigma >= 0, f"a median of {median:g} ms, sigma {sigma:g}", "the median must be above 0")
    return lambda count, rng: median / 1000 * np.exp(rng.normal(0, sigma, count))


def hostile() -> Budgets:
    """What no server can do."""
    return one(HOSTILE_MS)


# -- in words


def parse_arrivals(text: str) -> Arrivals:
    """The arrival process that ``ARRIVAL_FORMS`` spells like this. Raises ValueError, listing the forms."""
    try:
        match text.split(":"):
            case ["poisson"]:
                return poisson
            case ["gamma", cv2]:
                return gamma(_number(cv2))
            case ["ramp", levels]:
                return ramp(*_span(levels))
            case ["on-off", levels, on_s, off_s]:
                return on_off(*_span(levels), _number(on_s), _number(off_s))
            case ["diurnal"]:
                return diurnal()
            case ["diurnal", period_s]:
                return diurnal(_number(period_s))
            case ["trace", path]:
                return trace(Path(path))
            case ["trace", path, offset]:
                return trace(Path(path), _number(offset))
    except ValueError as error:
        raise ValueError(f"arrivals {text!r}: {error}; there are {ARRIVAL_FORMS}") from None
    raise ValueError(f"arrivals {text!r} are unknown; there are {ARRIVAL_FORMS}")


def parse_budgets(text: str) -> Budgets:
    """The mix of budgets that ``BUDGET_FORMS`` spells like this, in ms. Raises ValueError, listing the forms."""
    try:
        match text.split(":"):
            case ["hostile"]:
                return hostile()
            case ["bimodal", levels]:
                return bimodal(*_span(levels))
            case ["bimodal", levels, share_low]:
                return bimodal(*_span(levels), _number(share_low))
            case ["lognormal", median]:
                return lognormal(_number(median))
            case ["lognormal", median, sigma]:
                return lognormal(_number(median), _number(sigma))
            case [levels] if "-" in levels:
                return uniform(*_span(levels))
            case [ms]:
                return one(_number(ms))
    except ValueError as error:
        raise ValueError(f"budgets {text!r}: {error}; there are {BUDGET_FORMS}") from None
    raise ValueError(f"budgets {text!r} are unknown; there are {BUDGET_FORMS}")


def _number(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    _check(0 <= number < math.inf, repr(word), "a number is wanted, 0 or more")
    return number


def _span(word: str) -> tuple[float, float]:
    low, dash, high = word.partition("-")
    _check(bool(dash), repr(word), "two numbers are wanted, LOW-HIGH")
    return _number(low), _number(high)


def _check_number(rate: float, seconds: float) -> None:
    if rate * seconds > MAX_ARRIVALS:
        raise ValueError(f"{rate:g}/s for {seconds:g} s are more than {MAX_ARRIVALS:,} requests: lower one of them")


def _check_levels(low: float, high: float) -> None:
    _check(0 <= low <= high and high > 0, f"from {low:g} to {high:g} times the rate", "it must go up, from 0 or more")


def _check(holds: bool, what: str, accepted: str) -> None:
    if not holds:
        raise ValueError(f"{what}; {accepted}")
