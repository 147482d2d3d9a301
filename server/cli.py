"""``scala-serve``: what a person can ask for on the command line.

Commands import what they need when they run: ``--help`` answers at once, and serving needs no training extra. Tables go
to standard output, its last line is JSON where a program may want the numbers; progress goes to standard error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from typer.models import OptionInfo

from server.api_key_command import api_key
from server.bench.command import bench
from server.classify_command import classify
from server.flags import JsonFlag
from server.import_command import import_weights
from server.replay_command import replay
from server.simulation.command import simulate
from server.train_command import evaluate, train

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",  # examples are code, and paragraphs fit the terminal
    pretty_exceptions_enable=False,
)


@app.callback()
def scala_serve() -> None:
    """An image-classification server that spends as much network on each request as its latency budget allows.

    Tables go to standard output and progress to standard error. Where a command has --json, the last line of its
    output is one JSON object, and with --json the only one. Every command has examples in its help:

        scala-serve classify --help
        scala-serve --install-completion

    Exit codes: 0 done; 2 wrong usage, setting or input, told in a sentence on standard error; what others mean, a
    command's help says.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. What a user got wrong ends in its sentence and exit code 2, never in a traceback."""
    try:
        app(arguments, prog_name="scala-serve")
    except (ValueError, OSError) as error:
        print(f"scala-serve: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _setting(metavar: str, help: str, default: str) -> OptionInfo:
    """A flag that ``Settings`` checks, as it checks the environment; the default is its own, told to people here."""
    text = f"{help} Default: {default}."
    return typer.Option(metavar=metavar, help=text, show_default=False)  # type: ignore[no-any-return]


# What serving and measuring have in common.
CheckpointFlag = Annotated[str | None, _setting("DIR", "The checkpoint's folder.", "the package's own")]
EngineFlag = Annotated[
    str | None, _setting("NAME", "What runs the network: auto, openvino, torch or cuda_graphs.", "auto")
]
DeviceFlag = Annotated[str | None, _setting("NAME", "cpu, cuda, or auto: a GPU if there is one.", "auto")]
NumThreadsFlag = Annotated[str | None, _setting("N", "Engine threads on a CPU.", "from the CPU limit")]
MaxBatchFlag = Annotated[str | None, _setting("N", "Images in a batch.", "16 on a CPU, 256 on a GPU")]
ProfileDirFlag = Annotated[
    str | None, _setting("DIR", "Keeps measured latencies for the next start.", "scala-serve in the user's cache")
]


@app.command()
def serve(
    host: Annotated[
        str | None, _setting("HOST", "Address to listen on; 0.0.0.0: every interface.", "127.0.0.1")
    ] = None,
    port: Annotated[str | None, _setting("N", "TCP port to listen on; 0 takes any free one.", "8000")] = None,
    admin_address: Annotated[
        str | None, _setting("HOST:PORT", "Where pages, metrics and settings are alone.", "beside the API")
    ] = None,
    workers: Annotated[str | None, _setting("N", "Processes: always 1. More devices need more replicas.", "1")] = None,
    log_level: Annotated[str | None, _setting("LEVEL", "debug, info, warning, error or critical.", "info")] = None,
    log_format: Annotated[str | None, _setting("NAME", "text, or json: one object a line.", "text")] = None,
    access_log: Annotated[str | None, _setting("SWITCH", "on: a line for every request.", "off")] = None,
    checkpoint: CheckpointFlag = None,
    model_name: Annotated[str | None, _setting("NAME", "What clients call the model.", "its card's name")] = None,
    engine: EngineFlag = None,
    device: DeviceFlag = None,
    num_threads: NumThreadsFlag = None,
    policy: Annotated[
        str | None, _setting("NAME", "adaptive, fixed:WIDTH for always the same, slackfit or threshold.", "adaptive")
    ] = None,
    default_budget_ms: Annotated[
        str | None, _setting("MS", "Places requests that name no budget in the queue.", "1000")
    ] = None,
    max_body_bytes: Annotated[str | None, _setting("N", "Bytes that a request's body may have.", "20971520")] = None,
    max_pixels: Annotated[str | None, _setting("N", "Pixels that an image may have.", "50000000")] = None,
    max_batch: MaxBatchFlag = None,
    max_queue: Annotated[str | None, _setting("N", "Images that may wait; more are refused.", "256")] = None,
    max_connections: Annotated[
        str | None, _setting("N", "Connections at once; of more, the longest waited for are closed.", "1000")
    ] = None,
    client_timeout_s: Annotated[
        str | None, _setting("S", "Seconds to send a request in, and to take an answer in.", "30")
    ] = None,
    profile_dir: ProfileDirFlag = None,
    decision_log: Annotated[str | None, _setting("DIR", "Records every decision, for replay.", "no record")] = None,
    decision_log_bytes: Annotated[str | None, _setting("N", "Bytes that the record may have.", "67108864")] = None,
    api_keys_file: Annotated[
        str | None, _setting("FILE", "Asks for an API key whose hash is in it; see api-key.", "no keys")
    ] = None,
    rate_limit: Annotated[
        str | None, _setting("RATE", "Requests of each API key, such as 100/second.", "no limit")
    ] = None,
    cors_origins: Annotated[
        str | None, _setting("URL,...", "Origins whose pages may call the server, or *.", "its own")
    ] = None,
    tls_cert: Annotated[str | None, _setting("FILE", "Certificate chain (PEM): HTTPS only.", "plain HTTP")] = None,
    tls_key: Annotated[str | None, _setting("FILE", "Private key of the certificate (PEM).", "none")] = None,
    tls_client_ca: Annotated[
        str | None, _setting("FILE", "Authorities (PEM) of the certificates that clients must show.", "none")
    ] = None,
    drain_grace_s: Annotated[str | None, _setting("S", "Seconds of serving on after SIGTERM.", "5")] = None,
    drain_timeout_s: Annotated[str | None, _setting("S", "Seconds from SIGTERM to leaving anyway.", "30")] = None,
) -> None:
    """Serve a checkpoint over HTTP.

    A setting may also be a variable, SCALA_PORT=9000, or stand in the TOML file that SCALA_CONFIG names. A flag wins.
    The password of an encrypted --tls-key is no flag, which everybody on the machine could read, but a variable or a
    line of the file: SCALA_TLS_KEY_PASSWORD.

        scala-serve serve --host 0.0.0.0 --port 9000
        scala-serve serve --checkpoint runs/fine-tune/checkpoint/fine-tune --default-budget-ms 250
        scala-serve serve --log-format json --access-log on

    Exit codes: 0 left as asked, by SIGTERM, SIGHUP or Ctrl-C; 1 it could not listen, or stood still for a minute; 2
    wrong setting or checkpoint; 70 the engine failed or a decoder hung, and the supervisor should start it again; 128
    and more a second signal.

    """
    flags = dict(locals())
    from server.lifecycle import run
    from server.settings import Settings

    run(Settings.load(flags))


@app.command()
def profile(
    checkpoint: CheckpointFlag = None,
    engine: EngineFlag = None,
    device: DeviceFlag = None,
    num_threads: NumThreadsFlag = None,
    max_batch: MaxBatchFlag = None,
    profile_dir: ProfileDirFlag = None,
    seconds: Annotated[
        float, typer.Option(min=0, max=3600, help="Of each width at each batch size, at least; and at least 30 runs.")
    ] = 1.0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw latency against batch size: a PNG.")] = None,
    only_json: JsonFlag = False,
) -> None:
    """Measure how long every width takes at every batch size, on an otherwise idle machine.

    Prints a table and, as the last line, one JSON object. What was measured is kept: a server with the same engine and
    checkpoint then starts without measuring it again. Settings are those of `serve`.

        scala-serve profile --plot latency.png
        scala-serve profile --seconds 5 --json > latency.json

    Exit codes: 0 measured; 2 wrong usage, setting or checkpoint.
    """
    flags: dict[str, object] = {
        "checkpoint": checkpoint,
        "engine": engine,
        "device": device,
        "num_threads": num_threads,
        "max_batch": max_batch,
        "profile_dir": profile_dir,
    }
    if plot is not None and find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'scala-serve[train]'")
    if plot is not None and not plot.parent.is_dir():
        raise ValueError(f"{plot} cannot be written: there is no folder {plot.parent}; make it first")
    from server.console import print_latency, progress
    from server.profile_store import ProfileStore, default_folder
    from server.profiling import measure, plot_latency
    from server.settings import Settings

    settings = Settings.load(flags)
    with progress(True) as bar:
        task = bar.add_task("measuring", visible=False)
        report = measure(
            settings,
            seconds,
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
        )
    ProfileStore(settings.profile_dir or default_folder()).write(report.table)
    if plot is not None:
        plot_latency(plot, report)
    if not only_json:
        print_latency(report)
    print(json.dumps(report.as_json()))


for command in (classify, bench, simulate, replay, train, evaluate, import_weights, api_key):
    app.command()(command)
