"""``scala-serve train`` and ``evaluate``: what a person can ask for; the work is in ``scala_model.train``."""

from __future__ import annotations

import json
import signal
import sys
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scala_model.train.recipe import names
from server.flags import JsonFlag

if TYPE_CHECKING:
    import torch

    from scala_model.train.loop import Trainer


class Device(StrEnum):
    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


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

        scala-serve train fine-tune --init checkpoints/scala-xs-tiny-imagenet --data photos
        scala-serve train scala-xs-tiny-imagenet --data tiny-imagenet --epochs 5
        scala-serve train scala-xs-tiny-imagenet:us-net --data tiny-imagenet

    Exit codes: 0 trained; 130 stopped by Ctrl-C or SIGTERM with all saved; 2 wrong usage or input.
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


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Folder of the checkpoint.")],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Folder with val/CLASS/*.jpg, or val-*.parquet.")],
    device: Annotated[Device, typer.Option(help="Where to run; auto takes a GPU if there is one.")] = Device.AUTO,
    write: Annotated[bool, typer.Option(help="Record what is measured in the checkpoint's folder.")] = True,
    only_json: JsonFlag = False,
) -> None:
    """Measure every width of a checkpoint: accuracy, calibration, and which images it gets right.

    Prints a table and, as the last line, one JSON object.

        scala-serve evaluate runs/fine-tune/checkpoint/fine-tune --data photos
        scala-serve evaluate deit --data imagenet --no-write --json > deit.json

    Exit codes: 0 measured; 2 wrong usage or input.
    """
    _check_train_extra()
    import torch

    _measure(checkpoint, data, torch.device(_torch_device(device)), write=write, only_json=only_json)


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


def _measure(folder: Path, data: Path, device: torch.device, *, write: bool, only_json: bool = False) -> None:
    """Evaluate a checkpoint with a progress bar, print the table and the line of JSON."""
    from scala_model.train.run import measure
    from server.console import accuracy_as_json, print_accuracy, progress

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
    if not only_json:
        print_accuracy(card)
    print(json.dumps(accuracy_as_json(folder, card)))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_nothing(text: str) -> None:
    pass
