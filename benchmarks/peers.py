"""Our server beside others that serve the same engine: requests/s, CPU time a request, and what HTTP costs.

    python -m benchmarks.peers [--checkpoint DIR] [--widths W ...] [--rounds N] [--seconds S]
        [--python NAME=INTERPRETER ...] [--markdown FILE.md]

The others are a bare FastAPI handler, LitServe, BentoML and Ray Serve (``peer_apps/``), with the same decoder, engine,
image and machine, and each with the best of some settings that are tried first. A framework that is installed elsewhere
is used with ``--python ray=/path/to/python``; one that is not installed gets a row that says so. Before it is timed,
each must give our server's answer. All servers of a width run at once and take turns; who has none is halted.

Our overhead, a request's ``total`` less its ``inference``, is measured with one caller and an instant engine.

Without a checkpoint the network is DeiT-S for 64 px, with random weights. Six minutes on two cores. Needs wrk.

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

from benchmarks.dated_file import say, setting_of, show
from benchmarks.engine import random_checkpoint
from benchmarks.peer_load import SCRIPT, Turn, play
from benchmarks.peer_report import BARE, LIT, OURS, Overhead, Report, Row, as_json, markdown, summary, table
from benchmarks.peer_servers import ROOT, Contender, Running, started
from benchmarks.quote import noise
from scala_model.checkpoint import read_card, read_checkpoint
from scala_model.width import Width
from server.bench.client import Client
from server.bench.compare import available_cpus, order_of_play, serving
from server.cgroup import available_cpus as num_cpus
from server.engine import engine_of
from server.settings import Settings

WARM_S, TRY_S, TRY_ROUNDS = 1, 2, 2  # whole seconds: wrk knows no others
OVERHEAD_ROUNDS, OVERHEAD_REQUESTS = 5, 1000
PIXELS = 64
TOLERANCE = 0.03  # of the best score: batches of several sizes differ in bfloat16
ADAPTIVE = f"{OURS}, adaptive"
# The module that serves with it, the package, and the settings to try: HTTP's form, or batching.
FRAMEWORKS = {
    BARE: ("bare_fastapi", "fastapi", ("--form inline", "--form thread", "--form sync")),
    LIT: (
        "lit_serve",
        "litserve",
        (
            "--max-batch 16",
            "--max-batch 16 --batch-wait-ms 2",
            "--max-batch 8",
            "--max-batch 16 --form zmq",
            "--max-batch 16 --workers 2 --threads 1",
        ),
    ),
    "BentoML": ("bento", "bentoml", ("--max-batch 1",)),
    "Ray Serve": ("ray_serve", "ray", ("--max-batch 16",)),
}
PACKAGES = ("openvino", "uvicorn", "starlette", "pydantic", "pillow", "numpy")


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = _parser()
    options = parser.parse_args(given)
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed, and the load comes from it: apt-get install wrk")
    if options.rounds < 1 or not 1 <= options.seconds <= 600:
        parser.error("give at least one round, of 1 to 600 seconds")
    with tempfile.TemporaryDirectory() as folder:
        try:
            interpreters = _interpreters(options.python)
            checkpoint = options.checkpoint or random_checkpoint(Path(folder))
            config, _ = read_card(checkpoint)
            widths = [config.width(width) for width in options.widths or (config.widths[0], config.widths[-1])]
        except ValueError as error:
            parser.error(str(error))
        bench = Bench(checkpoint, Path(folder), interpreters, options.rounds, options.seconds)
        rows = [row for width in widths for row in bench.measure(width)]
        engine = engine_of(Settings.load({}), read_checkpoint(checkpoint), num_cpus())
        report = Report(engine.name, engine.device, bench.overhead(), rows)
    setting = setting_of("benchmarks.peers", given, PACKAGES, config, options.checkpoint)
    show(f"{report.device}, {report.engine}", table(report), summary(report))
    try:
        if options.markdown:
            text = markdown(report, setting, options.rounds, options.seconds)
            options.markdown.write_text(text, encoding="utf-8")
    finally:
        print(json.dumps(as_json(report)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: DeiT-S with random weights")
    parser.add_argument("--widths", type=float, nargs="+", metavar="W", help="default: the narrowest and the widest")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--seconds", type=int, default=4, metavar="S", help="of a turn; default: %(default)s")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        metavar="NAME=INTERPRETER",
        help="what runs a framework that is installed elsewhere, beside all that ours needs; may be repeated",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write a dated file of results")
    return parser


def _interpreters(given: Sequence[str]) -> dict[str, str]:
    """Of each package, ours unless ``--python`` says otherwise. Raises ValueError for an unknown package."""
    packages = [package for _, package, _ in FRAMEWORKS.values()]
    found = dict.fromkeys(packages, sys.executable)
    for text in given:
        package, equals, interpreter = text.partition("=")
        if package not in found or not equals or shutil.which(interpreter) is None:
            raise ValueError(f"--python is {text!r}; give NAME=INTERPRETER, with one of {', '.join(packages)}")
        found[package] = interpreter
    return found


class Bench:
    """``interpreters``: what runs each framework, by its package. ``folder`` is for files that nobody keeps."""

    def __init__(
        self, checkpoint: Path, folder: Path, interpreters: Mapping[str, str], rounds: int, seconds: int
    ) -> None:
        self._checkpoint, self._interpreters = checkpoint, interpreters
        self._rounds, self._seconds = rounds, seconds
        self._image, self._script = folder / "image.jpg", folder / "post.lua"
        self._image.write_bytes(noise(PIXELS))
        self._script.write_text(SCRIPT, encoding="utf-8")
        os.environ |= {"SCALA_CHECKPOINT": str(checkpoint), "SCALA_PROFILE_DIR": str(folder / "profiles")}

    def measure(self, width: Width) -> list[Row]:
        """All servers at one width, ours first. Raises RuntimeError or ValueError for one that does not serve."""
        versions: dict[str, str | None] = {OURS: "", ADAPTIVE: ""}
        versions |= {
            name: _version(self._interpreters[package], package) for name, (_, package, _) in FRAMEWORKS.items()
        }
        tried: dict[str, dict[str, float]] = {}
        with ExitStack() as stack:
            servers = {
                OURS: self._ours(stack, f"fixed:{width}", {}),
                ADAPTIVE: self._ours(stack, "adaptive", {"X-Width": str(width)}),
            }
            settings = {OURS: f"policy fixed:{width}", ADAPTIVE: f"X-Width: {width}"}
            expected = self._asked(servers[OURS])
            servers[OURS].halt()
            self._check(servers[ADAPTIVE], expected, ADAPTIVE)
            for name in (name for name in FRAMEWORKS if versions[name]):
                forms = {form: self._theirs(stack, name, form, width, expected) for form in FRAMEWORKS[name][2]}
                rates = tried[name] = self._try(forms)
                settings[name] = max(rates, key=rates.__getitem__)
                servers[name] = forms[settings[name]]
            turns = self._in_turns(servers, self._rounds, self._seconds)
        return [
            Row(
                width,
                name,
                "not installed" if found is None else found,
                settings.get(name, ""),
                tried.get(name, {}),
                turns.get(name, []),
            )
            for name, found in versions.items()
        ]

    def overhead(self) -> Overhead:
        """Of our server with an engine that takes no time. Raises RuntimeError when it does not serve."""
        say("overhead: one caller, an engine that takes no time")
        command = [sys.executable, "-m", "benchmarks.instant_server"]
        with started(Contender(OURS, "an instant engine", command, "/v1/classify"), self._image.read_bytes()) as server:
            rounds = asyncio.run(_overheads_ms(server.port, self._image.read_bytes()))
        cuts = [quantiles(overheads_ms, n=100, method="inclusive") for overheads_ms in rounds]
        return Overhead([cut[49] for cut in cuts], [cut[98] for cut in cuts])

    def _ours(self, stack: ExitStack, policy: str, headers: Mapping[str, str]) -> Running:
        say(f"starting {OURS}, {policy}")
        warm = stack.enter_context(serving(policy, sorted(available_cpus())))
        return Running(warm.pid, warm.port, "/v1/classify", headers)

    def _theirs(self, stack: ExitStack, name: str, form: str, width: Width, expected: Mapping[str, Any]) -> Running:
        say(f"starting {name}, {form}")
        module, package, _ = FRAMEWORKS[name]
        command = [self._interpreters[package], "-m", f"benchmarks.peer_apps.{module}", *form.split()]
        command += ["--checkpoint", str(self._checkpoint.resolve()), "--width", str(width)]
        server = stack.enter_context(started(Contender(name, form, command), self._image.read_bytes()))
        self._check(server, expected, f"{name}, {form}")
        return server

    def _asked(self, server: Running) -> Mapping[str, Any]:
        best: Mapping[str, Any] = server.ask(self._image.read_bytes())["predictions"][0]
        return best

    def _check(self, server: Running, expected: Mapping[str, Any], name: str) -> None:
        """All of them compute the same network, or their rates could not be compared. The server is halted."""
        best = self._asked(server)
        off = abs(best["score"] - expected["score"]) / expected["score"]
        if best["class_id"] != expected["class_id"] or off > TOLERANCE:
            raise ValueError(f"{name} answers {best} where our server answers {expected}")
        server.halt()

    def _try(self, forms: Mapping[str, Running]) -> dict[str, float]:
        """Mean requests/s of each."""
        turns = self._in_turns(forms, TRY_ROUNDS, TRY_S) if len(forms) > 1 else {}
        return {form: fmean(turn.rate for turn in turns[form]) if turns else 0.0 for form in forms}

    def _in_turns(self, servers: Mapping[str, Running], rounds: int, seconds: int) -> dict[str, list[Turn]]:
        turns: dict[str, list[Turn]] = {name: [] for name in servers}
        for server in servers.values():
            play(server, self._image, self._script, WARM_S)
        for name in order_of_play([*servers], rounds):
            turns[name].append(play(servers[name], self._image, self._script, seconds))
            say(f"{name}: {turns[name][-1].rate:.0f}/s")
        return turns


async def _overheads_ms(port: int, image: bytes) -> list[list[float]]:
    """``total`` less ``inference`` of every request of every round, the first round left out."""
    rounds = []
    with closing(Client(port)) as client:
        for _ in range(1 + OVERHEAD_ROUNDS):
            replies = [await client.classify(image, {}) for _ in range(OVERHEAD_REQUESTS)]
            timings = [reply.json()["timing_ms"] for reply in replies]
            rounds.append([timing["total"] - timing["inference"] for timing in timings])
    return rounds[1:]


def _version(interpreter: str, package: str) -> str | None:
    """Of a package that this interpreter has; None where it cannot import it."""
    program = f"import {package}, importlib.metadata; print(importlib.metadata.version({package!r}))"
    ran = subprocess.run([interpreter, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    return ran.stdout.splitlines()[-1] if ran.returncode == 0 else None


if __name__ == "__main__":
    main()
