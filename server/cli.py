"""``scala-serve``: what a person can ask for on the command line.

Commands import what they need when they run: ``--help`` answers at once, and serving needs no training extra. Tables go
to standard output, its last line is JSON where a program may want the numbers; progress goes to standard error.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.models import OptionInfo

from scala_model.train.recipe import names
from server.bench.command import bench
from server.replay_command import replay
from server.simulation.command import simulate

if TYPE_CHECKING:
    import torch

    from scala_model.train.loop import Trainer

app = typer.Typer(
    help="An image-classification server that spends as much network on each request as its latency budget allows.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. What a user got wrong ends in its sentence and exit code 2, never in a traceback."""
    try:
        app(arguments)
    except (ValueError, OSError) as error:
        print(f"scala-serve: {error}", file=sys.stderr)
        raise SystemExit(2) from None


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


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
    workers: Annotated[str | None, _setting("N", "Processes: always 1. More devices need more replicas.", "1")] = None,
    log_level: Annotated[str | None, _setting("LEVEL", "debug, info, warning, error or critical.", "info")] = None,
    log_format: Annotated[str | None, _setting("NAME", "text, or json: one object a line.", "text")] = None,
    access_log: Annotated[str | None, _setting("SWITCH", "on: a line for every request.", "off")] = None,
    checkpoint: CheckpointFlag = None,
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
    profile_dir: ProfileDirFlag = None,
    decision_log: Annotated[str | None, _setting("DIR", "Records every decision, for replay.", "no record")] = None,
    decision_log_bytes: Annotated[str | None, _setting("N", "Bytes that the record may have.", "67108864")] = None,
    drain_grace_s: Annotated[str | None, _setting("S", "Seconds of serving on after SIGTERM.", "5")] = None,
    drain_timeout_s: Annotated[str | None, _setting("S", "Seconds from SIGTERM to leaving anyway.", "30")] = None,
) -> None:
    """Serve a checkpoint over HTTP.

    A setting may also be a variable, SCALA_PORT=9000, or stand in the TOML file that SCALA_CONFIG names. A flag wins.
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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the line of JSON here, too.")
    ] = None,
) -> None:
    """Measure how long every width takes at every batch size, on an otherwise idle machine.

    Prints a table and, as the last line, one JSON object. What was measured is kept: a server with the same engine and
    checkpoint then starts without measuring it again. Settings are those of `serve`.
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
    for path in (plot, json_file):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; make it first")
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
    line = json.dumps(report.as_json())
    if json_file is not None:
        json_file.write_text(line + "\n", encoding="utf-8")
    print_latency(report)
    print(line)


for command in (bench, simulate, replay):
    app.command()(command)


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help=f"{', '.join(names())}, one of them with :METHOD, or a FILE.py of your own."
        ),
    ],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder with train/CLASS/*.jpg and val/CLASS/*.jpg, or Parquet shards.")
    ],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder. Default: runs/RECIPE.")] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Another length than the recipe's, phases in proportion.")
    ] = None,
    init: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint to start from.")] = None,
    teacher: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint of the external teacher of a distilled network.")
    ] = None,
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random choice of the run.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
) -> None:
    """Train a network and measure every width of it.

    The run's folder receives state.pt, to go on from after a stop, log.jsonl, and checkpoint/RECIPE, ready to serve.
    A METHOD is a baseline of the paper: us-net, separate-WIDTH, no-isolated-activation, no-progressive-transfer,
    no-stable-sampling or no-noise-calibration. Several GPUs: torchrun --nproc-per-node N -m server train ...
    """
    _check_train_extra()
    import torch

    from scala_model.train.layouts import has_split
    from scala_model.train.parallel import processes
    from scala_model.train.run import prepare

    if threads is not None:
        torch.set_num_threads(threads)
    with processes(_torch_device(device)) as (group, place):
        first = group.rank == 0
        run = prepare(
            recipe,
            data,
            out,
            device=place,
            processes=group,
            seed=seed,
            epochs=epochs,
            init=init,
            teacher=teacher,
            say=_say if first else _say_nothing,
        )
        trainer = run.trainer
        _run(trainer, show=first)
        if trainer.step < trainer.num_steps:
            if first:
                done = f"Stopped at step {trainer.step} of {trainer.num_steps}, all saved."
                _say(f"{done} To go on, run the same command again.")
            raise typer.Exit(130)
    if first:  # the others are done, and must not wait in the group while this one measures
        for checkpoint in run.save_checkpoints():
            _say(f"Wrote {checkpoint}")
            if has_split(data, "val"):
                _measure(checkpoint, data, place, write=True)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with val/CLASS/*.jpg, or val-*.parquet.")],
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.AUTO,
    write: Annotated[bool, typer.Option(help="Record what is measured in the checkpoint's folder.")] = True,
) -> None:
    """Measure every width of a checkpoint: accuracy, calibration, and which images it gets right.

    Prints a table and, as the last line, one JSON object.
    """
    _check_train_extra()
    import torch

    _measure(checkpoint, data, torch.device(_torch_device(device)), write=write)


class Kind(StrEnum):
    SCALA = "scala"
    VIT = "vit"


@app.command()
def import_weights(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="State dict: .pth, .pt, .bin or .safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the checkpoint: new or empty.")],
    kind: Annotated[
        Kind | None, typer.Option(help="scala, or vit for DeiT and timm. Default: as the file shows.")
    ] = None,
    smallest: Annotated[float | None, typer.Option(help="Smallest trained width, if the file does not say.")] = None,
    largest: Annotated[float | None, typer.Option(help="Largest trained width, if the file does not say.")] = None,
    granularity: Annotated[float | None, typer.Option(help="Step between widths, if the file does not say.")] = None,
    num_heads: Annotated[int | None, typer.Option(min=1, help="Attention heads. Default: of 64 channels each.")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Resize the position embedding to this, in px.")] = None,
    ema: Annotated[bool, typer.Option("--ema", help="Take the moving average of the weights (model_ema).")] = False,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="One line a class: LABEL, or ID tab LABEL.")
    ] = None,
    crop_ratio: Annotated[float, typer.Option(help="Share of the shorter side that the centre crop keeps.")] = 0.875,
    mean: Annotated[
        tuple[float, float, float] | None, typer.Option(metavar="R G B", help="Default: ImageNet's.")
    ] = None,
    std: Annotated[
        tuple[float, float, float] | None, typer.Option(metavar="R G B", help="Default: ImageNet's.")
    ] = None,
) -> None:
    """Turn published Scala, DeiT or timm ViT weights into a checkpoint.

    A network that was never trained for several widths gets the one width 1.0. Accuracy is unknown until `evaluate`.
    """
    if find_spec("torch") is None:
        raise ValueError("reading published weights needs torch: pip install 'scala-serve[torch]'")
    from scala_model import importing
    from scala_model.preprocess import Preprocessing

    found = importing.import_weights(
        source,
        out,
        kind=None if kind is None else kind.value,
        smallest=smallest,
        largest=largest,
        granularity=granularity,
        num_heads=num_heads,
        image_size=image_size,
        ema=ema,
        labels=labels,
        crop_ratio=crop_ratio,
        mean=mean or Preprocessing.mean,
        std=std or Preprocessing.std,
    )
    config = found.config
    shape = f"{config.image_size} px, patch {config.patch_size}, {config.embed_dim} channels, depth {config.depth}"
    print(f"{found.kind}: {shape}, {config.num_heads} heads ({found.num_heads_from}), {config.num_classes} classes")
    print(f"widths {', '.join(map(str, config.widths))} ({found.widths_from})")
    if found.resized_from is not None:
        print(f"position embedding resized from {found.resized_from} px")
    if found.ignored:
        print(f"not needed: {', '.join(found.ignored)}")
    print(f"wrote {out}; its accuracy is unknown until: scala-serve evaluate {out} --data DIR")


def _check_train_extra() -> None:
    if any(find_spec(name) is None for name in ("torch", "pyarrow", "matplotlib")):
        raise ValueError("training and evaluation need torch, pyarrow and matplotlib: pip install 'scala-serve[train]'")


def _torch_device(device: Device) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ValueError("torch finds no CUDA device: use --device cpu")
    return "cuda" if available and device is not Device.CPU else "cpu"


def _run(trainer: Trainer, *, show: bool) -> None:
    """Train with a progress bar. The first Ctrl-C or SIGTERM ends the run after its step, a second Ctrl-C at once."""
    from server.console import progress

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer.stop()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with progress(show) as bar:
            task = bar.add_task("training", total=trainer.num_steps, completed=trainer.step)
            trainer.run(progress=lambda step, text: bar.update(task, completed=step, description=text))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _measure(folder: Path, data: Path, device: torch.device, *, write: bool) -> None:
    """Evaluate a checkpoint with a progress bar, print the table and the line of JSON."""
    from scala_model.train.run import measure
    from server.console import print_accuracy, progress

    with progress(True) as bar:
        task = bar.add_task("evaluating", visible=False)
        card = measure(
            folder,
            data,
            device=device,
            write=write,
            progress=lambda done, total: bar.update(task, completed=done, total=total, visible=True),
            say=_say,
        )
    print_accuracy(folder, card)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass
