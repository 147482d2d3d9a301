"""What the attacks came to, told when all have run: a table of faults and, as the last line, one object of JSON.

``--reliability FILE.md`` writes the table of docs/reliability.md.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.seed import SEED
from tests.service.service_process import draw_photos

OUTCOMES = ("passed", "failed", "error", "skipped")


@dataclass(frozen=True)
class Fault:
    """One way to break the server, what callers saw of it, and how soon the server was well again."""

    name: str
    seen: str
    recovery_s: float | None  # None where it was well all along, or left
    left_s: float | None  # where leaving is right, and the supervisor starts another
    test: str
    injected: bool = True  # or all was well, and stayed so

    @property
    def after(self) -> str:
        if self.left_s is not None:
            return f"leaves after {self.left_s:.2f} s"
        return "not interrupted" if self.recovery_s is None else f"{self.recovery_s:.2f} s"


@dataclass
class Tally:
    """Counts over the whole run. A request is lost when it had no answer, or one that nobody could foresee."""

    test: str = ""
    finished: bool = False  # and not cut off
    tests: dict[str, int] = field(default_factory=dict)  # by what became of them
    num_inputs: int = 0
    num_connections: int = 0  # of attackers, those included that say nothing and are no inputs
    num_requests: int = 0
    num_lost: int = 0
    faults: list[Fault] = field(default_factory=list)
    rss_slopes: list[float] = field(default_factory=list)  # MiB per 10,000 requests, after the first 10,000

    def connections(self, count: int) -> None:
        self.num_connections += count

    def inputs(self, count: int) -> None:
        self.num_inputs += count

    def requests(self, count: int, lost: int = 0) -> None:
        self.num_requests += count
        self.num_lost += lost

    def fault(self, name: str, seen: str, recovery_s: float | None, left_s: float | None = None) -> None:
        self.faults.append(Fault(name, seen, recovery_s, left_s, self.test))

    def no_fault(self, load: str, seen: str) -> None:
        self.faults.append(Fault(f"none: {load}", seen, None, None, self.test, injected=False))

    def rss_slope(self, mib_per_10k_requests: float) -> None:
        self.rss_slopes.append(mib_per_10k_requests)

    def as_json(self) -> str:
        recoveries = [fault.recovery_s for fault in self.faults if fault.recovery_s is not None]
        figures = {
            "finished": self.finished,
            **{kind: self.tests.get(kind, 0) for kind in OUTCOMES},
            "seed": SEED,
            "inputs": self.num_inputs,
            "connections": self.num_connections,
            "faults": sum(fault.injected for fault in self.faults),
            "requests": self.num_requests,
            "requests_lost": self.num_lost,
            "worst_recovery_s": round(max(recoveries), 2) if recoveries else None,
            "rss_mib_per_10k_requests": round(max(self.rss_slopes), 2) if self.rss_slopes else None,
        }
        return json.dumps(figures)

    def as_markdown(self) -> str:
        lines = ["| fault | what the caller saw | well again after | test |", "|---|---|---|---|"]
        lines += [f"| {fault.name} | {fault.seen} | {fault.after} | `{fault.test}` |" for fault in self.faults]
        return "\n".join(lines) + "\n"


TALLY = pytest.StashKey[Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", type=Path, metavar="FILE.md", help="write the table of faults")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = Tally()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    tally = config.stash[TALLY]
    tally.finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
    tally.tests = {kind: len(terminalreporter.stats.get(kind, ())) for kind in OUTCOMES}


def pytest_unconfigure(config: pytest.Config) -> None:
    tally = config.stash[TALLY]
    if tally.faults or tally.num_inputs or tally.num_requests:
        table = tally.as_markdown()
        if path := config.getoption("--reliability"):
            path.write_text(table, encoding="utf-8")
        print(f"\n{table}\n{tally.as_json()}", flush=True)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """The run's one tally, which knows the test that adds to it."""
    tally = request.config.stash[TALLY]
    tally.test = request.node.nodeid.removeprefix("tests/chaos/")
    return tally


@pytest.fixture(scope="session")
def photos() -> list[bytes]:
    return draw_photos(40)
