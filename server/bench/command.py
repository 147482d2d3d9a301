"""``scala-serve bench``: what a person can ask for; the work is in the modules beside this one."""

from __future__ import annotations

import ipaddress
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from server.flags import JsonFlag

if TYPE_CHECKING:
    from server.bench.play import Played

MAX_SECONDS = 3600


def bench(
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Labelled images: folder with val/CLASS/*.jpg, or val-*.parquet.")
    ],
    rate: Annotated[float, typer.Option(metavar="N", help="Requests a second, in the mean.")],
    arrivals: Annotated[
        str, typer.Option(metavar="FORM", help="When requests come: poisson, gamma:4, ramp:0.5-3, trace:FILE, ...")
    ] = "poisson",
    seconds: Annotated[float, typer.Option(min=0.1, max=MAX_SECONDS, help="How long requests come.")] = 60.0,
    budgets: Annotated[
        str, typer.Option(metavar="FORM", help="In ms: 100, 40-200, bimodal:50-500, lognormal:100, hostile, ...")
    ] = "40-200",
    seed: Annotated[int, typer.Option(min=0, help="Decides arrivals, budgets and images.")] = 0,
    url: Annotated[str | None, typer.Option(metavar="URL", help="The server. Default: http://127.0.0.1:8000.")] = None,
    remote: Annotated[
        bool, typer.Option("--remote", help="Allow a server on another machine: load it as you may.")
    ] = False,
    compare: Annotated[
        str | None,
        typer.Option(metavar="POLICY,...", help="Start a server of each policy and compare, instead of a URL."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Turns of each policy of --compare.")] = 2,
    server_cpus: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Cores of the servers of --compare. Default: all but the last."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the run over time: a PNG.")] = None,
    save_records: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep what became of each request: a NumPy archive, .npz.")
    ] = None,
    only_json: JsonFlag = False,
) -> None:
    """Load a running server with labelled images and judge its answers.

    Open loop: requests leave when their time has come, whatever the server does. Prints a table and, as the last line,
    one JSON object. Of several policies, each gets files of its own, with its name in theirs.

        scala-serve bench --data tiny-imagenet --rate 100
        scala-serve bench --data tiny-imagenet --rate 300 --arrivals gamma:4 --seconds 10
        scala-serve bench --data tiny-imagenet --rate 300 --compare adaptive,fixed:1

    Exit codes: 0 judged; 1 requests left late, p99 above 1 ms (2 ms above 1,000 requests/s), or not at all, with 900
    open: give this command a core of its own; 2 wrong usage or input.
    """
    if compare is not None and (url is not None or remote):
        raise ValueError("--compare starts its own servers: leave out --url and --remote")
    if compare is None and server_cpus is not None:
        raise ValueError("--server-cpus is for the servers of --compare: pin a running one with its own means")
    policies = [] if compare is None else compare.split(",")
    if "" in policies or len(set(policies)) < len(policies):
        raise ValueError(f"--compare is {compare!r}; it must be different policies with commas between them")
    _check_can_write(plot, save_records)
    host, port = address(url or "http://127.0.0.1:8000", remote=remote)
    if any(find_spec(name) is None for name in ("torch", "pyarrow")):
        raise ValueError("reading labelled images needs torch and pyarrow: pip install 'scala-serve[train]'")
    from server.bench.client import Client
    from server.bench.compare import compare_policies
    from server.bench.photos import open_photos, take
    from server.bench.play import play_once, run
    from server.console import progress
    from server.simulation.workload import make_workload

    found = open_photos(data)
    workload = make_workload(arrivals, budgets, rate=rate, seconds=seconds, num_images=len(found.labels), seed=seed)
    photos = take(found, workload)
    bar = progress(True)
    bar.live.refresh_per_second = 1  # each drawing holds up what is due
    with bar:
        task = bar.add_task("starting", total=len(workload) * max(1, len(policies) * rounds))

        def show(num_sent: int, text: str) -> None:
            bar.update(task, completed=num_sent, description=text)

        if policies:
            cpus = _cpus(server_cpus)
            played = compare_policies(policies, workload, photos, num_rounds=rounds, server_cpus=cpus, progress=show)
        else:
            played = {f"{host}:{port}": run(play_once(Client(port, host), workload, photos, show))}
    _tell(played, {"workload": workload.name, "seed": seed}, plot, save_records, only_json=only_json)


def address(url: str, *, remote: bool) -> tuple[str, int]:
    """Host and port. Raises ValueError for what is no plain HTTP address, or another machine's without ``remote``."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if host is None or parts.scheme != "http" or parts.path not in ("", "/") or parts.query:
        raise ValueError(f"--url is {url!r}; it must look like http://127.0.0.1:8000, without TLS or a path")
    if not remote and not _is_loopback(host):
        raise ValueError(f"--url is {url!r}, on another machine: add --remote if you may load it")
    return host, port


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def _cpus(text: str | None) -> list[int]:
    """Cores for the servers: those named, or all but the last, which is left to the requests."""
    from server.bench.compare import available_cpus

    available = sorted(available_cpus())
    if text is None:
        return available[:-1] or available
    words = text.split(",")
    if not all(word.isascii() and word.isdigit() and int(word) in available for word in words):
        raise ValueError(f"--server-cpus is {text!r}; it must be some of {','.join(map(str, available))}")
    return [int(word) for word in words]


def _check_can_write(plot: Path | None, *others: Path | None) -> None:
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'scala-serve[train]'")
    for path in (plot, *others):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first")


def _tell(
    played: Mapping[str, Played],
    setting: Mapping[str, Any],
    plot: Path | None,
    save_records: Path | None,
    *,
    only_json: bool,
) -> None:
    """Write the files, print the table and the line of JSON, and end with 1 if requests left late."""
    from server.bench.records import joined, save
    from server.bench.summary import Summary, gains, off_schedule, table

    records = {name: joined(one.rounds) for name, one in played.items()}
    summaries = {name: Summary.of(of_all, played[name].counters) for name, of_all in records.items()}
    for name, of_all in records.items():
        if plot is not None:
            from server.bench.plot import plot_run

            plot_run(_named(plot, name, len(played)), of_all, f"{name}: {setting['workload']}")
        if save_records is not None:
            save(_named(save_records, name, len(played)), of_all)
    gained = gains({name: one.rounds for name, one in played.items()})
    runs = {name: one.as_json() | {"counters": _totals(played[name].counters)} for name, one in summaries.items()}
    line = json.dumps(
        {**setting, "runs": runs, "gains": {name: [round(end, 5) for end in gain] for name, gain in gained.items()}}
    )
    if not only_json:
        _print_table(table(summaries), str(setting["workload"]))
        for other, (gain, low, high) in gained.items():
            over = f"{next(iter(played))} over {other}"
            print(f"{over}: {100 * gain:+.2f} points ({100 * low:+.2f} to {100 * high:+.2f})")
    print(line)
    for sentence in (late := off_schedule(summaries)):
        print(f"scala-serve: {sentence}", file=sys.stderr)
    if late:
        raise typer.Exit(1)


def _totals(counters: Mapping[str, float]) -> dict[str, float]:
    """Without the buckets of histograms, of which there are hundreds."""
    return {name: value for name, value in counters.items() if "_bucket{" not in name}


def _print_table(lines: Sequence[Sequence[str]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    heading, *rows = lines
    shown = Table(*heading, title=title)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def _named(path: Path, run: str, num_runs: int) -> Path:
    """The file of one run: as asked, or of several with the run's name in it."""
    return path if num_runs == 1 else path.with_stem(f"{path.stem}-{run.replace(':', '-')}")
