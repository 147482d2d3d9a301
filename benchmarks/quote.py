"""Does ``/v1/quote`` tell the truth? A quote just before each request, judged by what then became of that request.

    python -m benchmarks.quote [--machine cpu|gpu] [--seconds N] [--seed N]
    python -m benchmarks.quote --live URL [--rate N] [--seconds N] [--seed N]

Without a server, the simulator plays a mix of loads one after the other, and asks as each request arrives. With one, it
is asked right before each request is sent. Two figures of the chance p that was quoted, y being 1 for an answer within
the budget and 0 for anything else:

* the Brier skill, 1 - mean (p - y)^2 / (b (1 - b)), against quoting the base rate b to everybody (Brier 1950);
* the calibration error: the mean of |mean p - mean y| over ten equal bins of p, weighted by their sizes.

Prints a table and, as the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from scala_model.width import Width
from server.bench.client import Client, until
from server.bench.play import run
from server.policies.adaptive import Adaptive
from server.quote import QuoteBook, width_foreseen
from server.simulation.adaptive_server import Server
from server.simulation.device import Machine, SimulatedDevice
from server.simulation.machines import built_in
from server.simulation.scenarios import Scenario
from server.simulation.simulator import Batch, simulate
from server.simulation.workload import Workload, make_workload

NUM_BINS = 10
LIVE_ARRIVALS, LIVE_BUDGETS = "gamma:4", "lognormal:60"
# The load in capacities of the widest width: from calm to more than the narrowest can serve.
MIXED = (
    ("poisson", 0.5, "40-200"),
    ("gamma:4", 1.5, "40-200"),
    ("ramp:0.3-8", 1.0, "40-200"),
    ("gamma:4", 2.0, "bimodal:20-200:0.9"),
    ("gamma:4", 8.0, "lognormal:100"),
)


@dataclass(frozen=True, slots=True)
class Quoted:
    """Columns of N quotes: the chance, whether the request was answered in budget, the accuracy that was quoted and
    that of the width that answered (nan where there was none)."""

    chance: NDArray[np.float64]
    success: NDArray[np.bool_]
    expected: NDArray[np.float64]
    got: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Score:
    """``brier_skill`` is None where all requests ended alike: there is nothing to foresee.

    ``accuracy_error`` is the mean of quoted less served accuracy over the answers, ``accuracy_off`` of its magnitude.
    """

    quotes: int
    base_rate: float
    brier_skill: float | None
    calibration_error: float
    accuracy_error: float | None
    accuracy_off: float | None


def score(quoted: Quoted) -> Score:
    chance, success = quoted.chance, quoted.success.astype(float)
    base = float(success.mean())
    brier, naive = float(((chance - success) ** 2).mean()), base * (1 - base)
    bins = np.minimum((chance * NUM_BINS).astype(int), NUM_BINS - 1)
    off = np.abs(np.bincount(bins, chance - success, NUM_BINS))
    differences = (quoted.expected - quoted.got)[~np.isnan(quoted.expected) & ~np.isnan(quoted.got)]
    return Score(
        quotes=len(chance),
        base_rate=base,
        brier_skill=1 - brier / naive if naive else None,
        calibration_error=float(off.sum()) / len(chance),
        accuracy_error=float(differences.mean()) if differences.size else None,
        accuracy_off=float(np.abs(differences).mean()) if differences.size else None,
    )


def joined(parts: Sequence[Quoted]) -> Quoted:
    columns = ("chance", "success", "expected", "got")
    return Quoted(*(np.concatenate([getattr(part, name) for part in parts]) for name in columns))


# -- in the simulator


class QuotingServer(Server):
    """The server in the simulator, asked for a quote as each request arrives; it also hears what became of each."""

    def start(self, arrivals_s: Sequence[float], deadlines_s: Sequence[float]) -> None:
        super().start(arrivals_s, deadlines_s)
        self._book = QuoteBook()
        self.chance, self.width = [0.0] * len(arrivals_s), [-1] * len(arrivals_s)

    def admits(self, image: int, now: float, device_free_at: float) -> bool:
        """The quote is of the instant of arrival, so it cannot but agree with admission."""
        first = image > self._arrived
        admitted = super().admits(image, now, device_free_at)
        if first and admitted:
            self.chance[image] = self._book.chance(True, self.monitor.promises, now)
            self.width[image] = self._index[self._foreseen(image, now, device_free_at)]
        if not first and not admitted:
            self.monitor.promises.add(False, now)
        return admitted

    def next_batch(self, now: float) -> Batch | None:
        waited = set(self._images)
        batch = super().next_batch(now)
        for _ in waited - {*self._images, *(batch.images if batch is not None else ())}:
            self.monitor.promises.add(False, now)
        return batch

    def ran(self, batch: Batch, seconds: float, now: float) -> None:
        super().ran(batch, seconds, now)
        for image in batch.images:
            self.monitor.promises.add(now <= self._deadlines[image], now)

    def _foreseen(self, image: int, now: float, device_free_at: float) -> Width:
        load, starts_at = self.monitor.load(now), max(now, device_free_at)
        due = self._deadlines[image]
        return width_foreseen(due, self._widths, self._view(), load, self.profile, self._policy, starts_at=starts_at)


def simulated(machine: Machine, workload: Workload, *, seed: int) -> Quoted:
    server = QuotingServer(Adaptive(), machine.profile())
    outcome = simulate(workload, server, SimulatedDevice(machine), machine.frontend, seed=seed)
    of_width = np.append(machine.accuracy, np.nan)  # [-1]: of no width
    return Quoted(
        np.array(server.chance),
        outcome.finished_s <= workload.deadlines_s,
        of_width[server.width],
        of_width[outcome.width],
    )


def mixed_load(machine: Machine, *, seconds: float, seed: int) -> dict[str, Quoted]:
    """Quotes of every load of the mix, by its name."""
    return {
        f"{arrivals} {load:g}x, {budgets} ms": simulated(
            machine,
            Scenario("mixed", "budgets", arrivals, load, seconds, budgets).workload(machine, seed),
            seed=seed,
        )
        for arrivals, load, budgets in MIXED
    }


# -- against a running server


def noise(size: int = 64) -> bytes:
    """A JPEG of no meaning: only the time that it takes counts."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


async def live(client: Client, workload: Workload) -> Quoted:
    """Ask and send, request by request, in open loop.

    Raises OSError when the server does not answer, ValueError when it gives no quote.
    """
    image, started = noise(), time.monotonic() + 0.1
    sent = []
    with closing(client):
        for arrival_s, budget_s in zip(workload.arrivals_s.tolist(), workload.budgets_s.tolist(), strict=True):
            await until(started + arrival_s)
            sent.append(asyncio.create_task(_ask_and_send(client, image, 1000 * budget_s)))
        await asyncio.gather(*sent, return_exceptions=True)  # cut off by another's failure, one may hang uvloop's end
        answers = [task.result() for task in sent]
    chance, success, expected, got = (np.array(column) for column in zip(*answers, strict=True))
    return Quoted(chance, success, expected, got)


async def _ask_and_send(client: Client, image: bytes, budget_ms: float) -> tuple[float, bool, float, float]:
    budget = f"{budget_ms:g}"
    asked = await client.get(f"/v1/quote?budget_ms={budget}")
    if asked.status != 200:
        raise ValueError(
            f"{client.host}:{client.port} answers /v1/quote?budget_ms={budget} with {asked.status}: give a scala-serve "
            "server that is ready"
        )
    quote = asked.json()
    reply = await client.classify(image, {"X-Latency-Budget-Ms": budget})
    met = reply.status == 200 and reply.headers.get("x-budget-met") == "true"
    got = reply.json()["expected_accuracy"] if reply.status == 200 else None
    return quote["chance"], met, _or_nan(quote["expected_accuracy"]), _or_nan(got)


def _or_nan(value: float | None) -> float:
    return np.nan if value is None else value


# -- the command


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", choices=("cpu", "gpu"), default="cpu", help="to simulate; default: %(default)s")
    parser.add_argument("--live", metavar="URL", help="a running server, such as http://127.0.0.1:8000")
    parser.add_argument("--rate", type=float, default=200.0, metavar="N", help="requests/s to it; default: %(default)g")
    parser.add_argument("--seconds", type=float, default=20.0, metavar="N", help="of each load; default: %(default)g")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        if options.live is None:
            machine = built_in(options.machine)
            parts = mixed_load(machine, seconds=options.seconds, seed=options.seed)
        else:
            address = urlsplit(options.live)
            workload = make_workload(
                LIVE_ARRIVALS, LIVE_BUDGETS, rate=options.rate, seconds=options.seconds, num_images=1, seed=options.seed
            )
            client = Client(address.port or 80, address.hostname or "127.0.0.1")
            parts = {workload.name: run(live(client, workload))}
    except (ValueError, OSError) as error:
        parser.error(str(error))
    scores = {name: score(quoted) for name, quoted in parts.items()}
    scores["all"] = score(joined(list(parts.values())))
    for name, one in scores.items():
        skill = "–" if one.brier_skill is None else f"{one.brier_skill:.3f}"
        print(f"{name:48} {one.quotes:7} quotes  in budget {one.base_rate:.4f}  skill {skill:>6}  ", end="")
        off = "–" if one.accuracy_off is None else f"{one.accuracy_error:+.4f}, {one.accuracy_off:.4f}"
        print(f"calibration error {one.calibration_error:.4f}  accuracy off by {off}")
    print(json.dumps({name: asdict(one) for name, one in scores.items()}))


if __name__ == "__main__":
    main()
