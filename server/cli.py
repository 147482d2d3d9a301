"""``scala-serve``: what a person can ask for on the command line.

Commands import what they need when they run: ``--help`` answers at once, and serving needs no training extra. Tables go
to standard output, its last line is JSON where a program may want the numbers; progress goes to standard error.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.models import OptionInfo

from scala_model.train.recipes import RECIPES, Recipe

if TYPE_CHECKING:
    from rich.progress import Progress

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


@app.command()
def serve(
    host: Annotated[
        str | None, _setting("HOST", "Address to listen on; 0.0.0.0: every interface.", "127.0.0.1")
    ] = None,
    port: Annotated[str | None, _setting("N", "TCP port to listen on; 0 takes any free one.", "8000")] = None,
    workers: Annotated[str | None, _setting("N", "Processes: always 1. More devices need more replicas.", "1")] = None,
    log_level: Annotated[str | None, _setting("LEVEL", "debug, info, warning, error or critical.", "info")] = None,
    checkpoint: Annotated[str | None, _setting("DIR", "The checkpoint's folder.", "the package's own")] = None,
    engine: Annotated[str | None, _setting("NAME", "What runs the network: auto or torch.", "auto")] = None,
    device: Annotated[str | None, _setting("NAME", "cpu, cuda, or auto: a GPU if there is one.", "auto")] = None,
    num_threads: Annotated[str | None, _setting("N", "Engine threads on a CPU.", "from the CPU limit")] = None,
    policy: Annotated[str | None, _setting("NAME", "adaptive, or fixed:WIDTH for always the same.", "adaptive")] = None,
    default_budget_ms: Annotated[
        str | None, _setting("MS", "Places requests that name no budget in the queue.", "1000")
    ] = None,
    max_body_bytes: Annotated[str | None, _setting("N", "Bytes that a request's body may have.", "20971520")] = None,
    max_pixels: Annotated[str | None, _setting("N", "Pixels that an image may have.", "50000000")] = None,
    max_batch: Annotated[str | None, _setting("N", "Images in a batch.", "16 on a CPU, 256 on a GPU")] = None,
    max_queue: Annotated[str | None, _setting("N", "Images that may wait; more are refused.", "256")] = None,
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
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help=f"What to train: {', '.join(RECIPES)}.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with train-*.parquet, val-*.parquet, classes.tsv.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder. Default: runs/RECIPE.")] = None,
    device: Annotated[Device, typer.Option(help="Where to train; auto takes a GPU if there is one.")] = Device.AUTO,
    seed: Annotated[int, typer.Option(min=0, help="Decides every random choice of the run.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: one a core.")] = None,
) -> None:
    """Train a network and measure every width of it.

    The run's folder receives state.pt, to go on from after a stop, log.jsonl, and checkpoint/RECIPE, ready to serve.
    """
    chosen = _recipe(recipe)
    _check_train_extra()
    import torch

    from scala_model.checkpoint import save_checkpoint
    from scala_model.preprocess import Preprocessing
    from scala_model.train.data import load_split, read_classes
    from scala_model.train.loop import Trainer

    if threads is not None:
        torch.set_num_threads(threads)
    folder, place = out or Path("runs") / recipe, _torch_device(device)
    classes, expected = read_classes(data), chosen.config.num_classes
    if len(classes) != expected:  # said before hours of training, not after them
        raise ValueError(f"{data / 'classes.tsv'} lists {len(classes)} classes; the recipe {recipe} has {expected}")
    _say(f"Reading {data}")
    images = load_split(data, "train", Preprocessing(chosen.resident_size))
    trainer = Trainer(chosen, images, folder, device=place, seed=seed)
    if trainer.resume():
        _say(f"Going on from step {trainer.step} of {trainer.num_steps}, saved in {folder}")
    _run(trainer)
    if trainer.step < trainer.num_steps:
        _say(f"Stopped at step {trainer.step} of {trainer.num_steps}, all saved. To go on, run the same command again.")
        raise typer.Exit(130)
    card = {"classes": classes, "training": _training_facts(recipe, trainer, data.resolve().name)}
    checkpoint = folder / "checkpoint" / recipe
    save_checkpoint(checkpoint, trainer.model.half(), card)
    _say(f"Wrote {checkpoint}")
    if any(data.glob("val-*.parquet")):
        _measure(checkpoint, data, place, write=True)


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with val-*.parquet.")],
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.AUTO,
    write: Annotated[bool, typer.Option(help="Record the accuracies in the checkpoint's card.")] = True,
) -> None:
    """Measure the accuracy of every width of a checkpoint.

    Prints a table and, as the last line, one JSON object.
    """
    _check_train_extra()
    _measure(checkpoint, data, _torch_device(device), write=write)


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"there is no recipe {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]


def _check_train_extra() -> None:
    if find_spec("torch") is None or find_spec("pyarrow") is None:
        raise ValueError("training and evaluation need torch and pyarrow: pip install 'scala-serve[train]'")


def _torch_device(device: Device) -> str:
    import torch

    available = torch.cuda.is_available()
    if device is Device.CUDA and not available:
        raise ValueError("torch finds no CUDA device: use --device cpu")
    return "cuda" if available and device is not Device.CPU else "cpu"


def _run(trainer: Trainer) -> None:
    """Train with a progress bar. The first Ctrl-C ends the run after its step, a second one at once."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer.stop()

    previous = signal.signal(signal.SIGINT, stop)
    try:
        with _progress() as bar:
            task = bar.add_task("training", total=trainer.num_steps, completed=trainer.step)
            trainer.run(log_every=10, progress=lambda step, text: bar.update(task, completed=step, description=text))
    finally:
        signal.signal(signal.SIGINT, previous)


def _measure(folder: Path, data: Path, device: str, *, write: bool) -> None:
    """Evaluate a checkpoint, record it in its card, print the table and the line of JSON."""
    from scala_model.card import preprocessing_from_card
    from scala_model.checkpoint import load_checkpoint, write_card
    from scala_model.train import evaluation
    from scala_model.train.data import load_split

    model = load_checkpoint(folder)
    images = load_split(data, "val", preprocessing_from_card(model.card))
    with _progress() as bar:
        task = bar.add_task("evaluating", total=len(images.labels) * len(model.config.widths))
        result = evaluation.evaluate(model, images, device=device, progress=lambda done: bar.advance(task, done))
    card = evaluation.measured_card(model.card, result, f"{data.resolve().name} val")
    if write:
        write_card(folder, card)
    _print_accuracy(folder, card)


def _training_facts(recipe: str, trainer: Trainer, dataset: str) -> dict[str, Any]:
    """What the card tells people of how a network was made."""
    import torch

    return {
        "recipe": recipe,
        "data set": f"{dataset}, {len(trainer.data.labels)} images",
        "objective": "Scala: Isolated Activation, Progressive Knowledge Transfer, Stable Sampling, Noise Calibration",
        "epochs": trainer.recipe.epochs,
        "batch size": trainer.recipe.batch_size,
        "learning rate": trainer.recipe.learning_rate,
        "steps": trainer.num_steps,
        "seed": trainer.seed,
        "device": trainer.device.type,
        "torch": torch.__version__,
    }


def _print_accuracy(folder: Path, card: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("width", "top-1 %", "95 % interval", "parameters", "MACs")
    for entry in card["widths"]:
        low, high = entry["accuracy_ci95"]
        table.add_row(
            f"{entry['width']:g}",
            f"{100 * entry['accuracy']:.2f}",
            f"{100 * low:.2f} to {100 * high:.2f}",
            f"{entry['parameters'] / 1e6:.2f} M",
            f"{entry['macs'] / 1e6:.1f} M",
        )
    Console().print(table)
    measured = [{key: entry[key] for key in ("width", "accuracy", "accuracy_ci95")} for entry in card["widths"]]
    print(json.dumps({"checkpoint": str(folder), "images": card["evaluation"]["images"], "widths": measured}))


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    return Progress(*columns, console=Console(stderr=True))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
