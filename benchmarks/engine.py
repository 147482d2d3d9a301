"""Our engine beside other runtimes, at every width, and what its server costs to start and to hold.

    python -m benchmarks.engine [--device cpu|cuda] [--checkpoint DIR] [--minutes N] [--widths W ...] [--batches B ...]
        [--compile] [--markdown FILE.md]

Rivals run each width as a dense network of its own, exported or compiled for it: see ``engine_rivals.py``. All have the
same threads, every core of the container, and take turns: see ``engine_timing.py``. Before it is timed, each must give
the answers of the eager float32 network. Without a checkpoint it is DeiT-S for 64 px in patches of 8, with random
weights, whose time is that of any others. Seven minutes on two cores; on a GPU compiling takes most of an hour, so
``--widths`` measures a part.

Also measured: a switch of widths; how much of the rate of a large matrix product is reached; and of a real server, on
an otherwise idle machine, the time until it is ready and its memory.

Prints a table and, last, one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from benchmarks.dated_file import say, setting_of, show
from benchmarks.engine_report import Report, Row, as_json, markdown, row_of, summary, table
from benchmarks.engine_rivals import Pixels, Run, export, half_precision, rivals_of
from benchmarks.engine_server import measure_server
from benchmarks.engine_timing import in_turns, matmul_rate, switch_cost
from scala_model.checkpoint import build_model, read_checkpoint, save_checkpoint
from scala_model.config import ScalaConfig, variant
from scala_model.cost import cost_of
from scala_model.vit import ScalaViT
from scala_model.width import Width
from server.cgroup import available_cpus
from server.engine import engine_of
from server.engine.contract import Engine
from server.engine.cuda_graphs import CudaGraphsEngine
from server.settings import Settings

BATCHES = {"cpu": (1, 4, 16), "cuda": (1, 16, 64, 256)}
PACKAGES = ("numpy", "torch", "openvino", "onnxruntime", "onnx")
SWITCHES, PRODUCTS = 20, 25  # repeats
TOLERANCE = 0.03  # of the largest probability: bfloat16 stays within a hundredth on random weights
OURS = "ours"


def main(arguments: Sequence[str] | None = None) -> None:
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        try:
            checkpoint = options.checkpoint or random_checkpoint(Path(folder))
            config = read_checkpoint(checkpoint).config
            widths = [config.width(width) for width in options.widths or config.widths]
            batches = _batches(options.batches or BATCHES[options.device])
            if not 0 < options.minutes < math.inf:
                raise ValueError(f"--minutes is {options.minutes}: give a number above 0")
            engine = _engine(options.device, checkpoint, max(batches), compile=options.compile)
        except ValueError as error:
            _parser().error(str(error))
        report = measure(engine, checkpoint, options.device, widths, batches, 60 * options.minutes)
    setting = setting_of("benchmarks.engine", given, PACKAGES, config, options.checkpoint)
    show(f"{report.device}, {report.threads} threads: ms", table(report), summary(report))
    try:
        if options.markdown:
            options.markdown.write_text(markdown(report, setting, options.minutes), encoding="utf-8")
    finally:
        print(json.dumps(as_json(report, setting.versions)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=list(BATCHES), default=default_device)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="default: DeiT-S with random weights")
    parser.add_argument(
        "--minutes", type=float, default=3, help="for timing the engines, compiling left out (default 3)"
    )
    parser.add_argument("--widths", type=float, nargs="+", metavar="W", help="default: every trained width")
    parser.add_argument("--batches", type=int, nargs="+", metavar="B", help="default: 1 4 16, on a GPU 1 16 64 256")
    parser.add_argument("--compile", action="store_true", help="on a GPU: record compiled code (minutes to load)")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md", help="write a dated file of results")
    return parser


def _batches(given: Sequence[int]) -> tuple[int, ...]:
    if wrong := [batch for batch in given if batch < 1]:
        raise ValueError(f"--batches has {wrong[0]}: give numbers of images, at least 1")
    return tuple(sorted(set(given)))


def _num_threads() -> int:
    return max(1, math.floor(available_cpus()))


def random_checkpoint(folder: Path) -> Path:
    """DeiT-S, seven widths, as initialised."""
    torch.manual_seed(0)
    model = ScalaViT(variant("deit-s", image_size=64, patch_size=8, num_classes=200))
    save_checkpoint(folder / "deit-s-random", model)
    return folder / "deit-s-random"


def _engine(device: str, checkpoint: Path, max_batch: int, *, compile: bool) -> Engine:
    """What the server takes by itself on this device, but with every core: nothing else runs here.

    With ``compile``, the GPU's graphs record compiled code. Raises ValueError on a CPU, which has none.
    """
    if compile:
        if device != "cuda":
            raise ValueError("--compile is for the graphs of a GPU: leave it out, or add --device cuda")
        return CudaGraphsEngine(read_checkpoint(checkpoint), device=device, max_batch=max_batch, compile=True)
    settings = Settings.load({"device": device, "num_threads": _num_threads(), "max_batch": max_batch}, environ={})
    return engine_of(settings, read_checkpoint(checkpoint), available_cpus())


def measure(
    engine: Engine, checkpoint: Path, device: str, widths: Sequence[Width], batches: Sequence[int], budget_s: float
) -> Report:
    """The server first, while nothing else runs here; then all engines in turns, within ``budget_s`` seconds."""
    say("starting a server")
    served = measure_server(checkpoint, device, max(batches))
    place, threads = torch.device(device), _num_threads()
    torch.set_num_threads(threads)
    say("loading every width")
    model = build_model(read_checkpoint(checkpoint))
    for width in model.config.widths:
        engine.load(width, engine.max_batch)
    precision = half_precision(place)
    rates = [matmul_rate(place, precision, PRODUCTS)]
    cell_budget_s = budget_s / (len(widths) * len(batches))
    rows = list(measure_rows(engine, model, place, widths, batches, cell_budget_s))
    rates.append(matmul_rate(place, precision, PRODUCTS))
    switch_s = _switch_cost(engine, model.config)
    engine.close()
    return Report(
        device=engine.device,
        engine=engine.name,
        threads=threads,
        precision=str(precision).removeprefix("torch."),
        rows=rows,
        ceiling_flops=max(rates),
        switch_ms=1000 * switch_s,
        served=served,
    )


def measure_rows(
    engine: Engine,
    model: ScalaViT,
    device: torch.device,
    widths: Sequence[Width],
    batches: Sequence[int],
    budget_s: float,
) -> Iterator[Row]:
    """One cell after the other, ``budget_s`` seconds each."""
    random = np.random.default_rng(0)
    size, ends = model.config.image_size, (min(widths), max(widths))
    for width in widths:
        with tempfile.TemporaryDirectory() as folder:
            dense = export(model, width, Path(folder))
            for batch in batches:
                pixels = random.integers(0, 256, (batch, size, size, 3), np.uint8)
                compiled = device.type == "cuda" or width in ends
                rivals = rivals_of(dense, batch, device, _num_threads(), compiled=compiled)
                runs: dict[str, Run] = {OURS: lambda pixels, width=width: engine.run(pixels, width)}  # type: ignore[misc]
                runs |= {name: prepare() for name, prepare in rivals.items()}
                _check(runs, pixels, dense.classifier(torch.float32))
                row = row_of(width, batch, cost_of(model.config, width), _time(runs, pixels, budget_s), OURS)
                say(f"width {width}, batch {batch}: {row.ours_ms:.2f} ms, {row.ratio:.2f} of {row.best_rival}")
                yield row


def _time(runs: dict[str, Run], pixels: Pixels, budget_s: float) -> dict[str, float]:
    return in_turns({name: _bound(run, pixels) for name, run in runs.items()}, budget_s)


def _bound(run: Run, pixels: Pixels) -> Callable[[], object]:
    return lambda: run(pixels)


@torch.inference_mode()
def _check(runs: dict[str, Run], pixels: Pixels, specification: torch.nn.Module) -> None:
    """All of them compute the same network, or their times could not be compared."""
    expected = specification(torch.from_numpy(pixels)).numpy()
    for name, run in runs.items():
        distance = np.abs(run(pixels) - expected).max() / expected.max()
        assert distance < TOLERANCE, f"{name} answers something else: {distance:.0%} from the eager network"


def _switch_cost(engine: Engine, config: ScalaConfig) -> float:
    """Seconds, at batch 1, between neighbours and between the narrowest and the widest."""
    pixels = np.zeros((1, config.image_size, config.image_size, 3), np.uint8)
    pairs = [(config.widths[0], config.widths[-1]), *pairwise(config.widths)]
    return switch_cost(lambda width: engine.run(pixels, width), pairs, SWITCHES)


if __name__ == "__main__":
    main()
