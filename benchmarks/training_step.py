"""How fast a training step is, and which share of the device's matrix-product rate it reaches.

python -m benchmarks.training_step scala-s-tiny-imagenet --device cuda

Random pixels, no data set needed. For each method, and for Scala also without compilation: images/s (median of the
repeats), and the arithmetic of the step, 6 x multiply-adds of every network that it trained, over the time it took, as
a share of what a large bfloat16 matrix product reaches in the same run. Compilation is not timed. Last line: JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch

from scala_model.cost import cost_of
from scala_model.train.data import ImageSet
from scala_model.train.loop import Trainer
from scala_model.train.recipe import Recipe, find, separate, us_net
from scala_model.width import Width

FLOPS_PER_MAC = 6  # two forward, twice that backward


def matmul_rate(device: torch.device, repeats: int) -> float:
    """FLOP/s of a square bfloat16 matrix product, median of the repeats."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(repeats + 2):
        wait(device)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(device)
        seconds.append((time.perf_counter() - started) / 10)
    return 2 * size**3 / statistics.median(seconds[2:])


def step_rate(recipe: Recipe, device: torch.device, steps: int, repeats: int) -> dict[str, float]:
    """Images/s and FLOP/s of steps that train all networks of a step; medians of the repeats."""
    side, count = recipe.resident_size, 4 * recipe.batch_size
    pixels = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8)
    data = ImageSet(pixels, torch.arange(count) % recipe.config.num_classes).to(device)
    recipe = replace(recipe, largest_only_epochs=0, epochs=1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(recipe, data, Path(folder), device=device)
    compile_every_width(trainer)
    going = trainer.steps()
    next(going)
    rates, flops = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        records = list(islice(going, steps))  # each has waited for the device
        seconds = time.perf_counter() - started
        macs = sum(cost_of(recipe.config, Width(width)).macs for record in records for width, _ in record["loss"])
        rates.append(steps * recipe.batch_size / seconds)
        flops.append(FLOPS_PER_MAC * macs * recipe.batch_size / seconds)
    return {"images_per_s": statistics.median(rates), "flops_per_s": statistics.median(flops)}


def compile_every_width(trainer: Trainer) -> None:
    """One pass of each width, its gradient thrown away: a width's first pass compiles it."""
    config, batch = trainer.recipe.config, trainer.recipe.batch_size
    images = torch.randn(batch, 3, config.image_size, config.image_size, device=trainer.device)
    for width in config.widths:
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.recipe.autocast == "bfloat16"):
            torch.autograd.backward(trainer.model.heads(images, width)[0].float().sum())
    trainer.optimizer.zero_grad()


def methods(recipe: Recipe, only: str | None) -> dict[str, Recipe]:
    """What is timed: Scala, the same without compilation, the baselines that cost something else; or one of them.

    Raises ValueError, listing them, when ``only`` is none of them.
    """
    widths = [f"{width}" for width in recipe.config.widths if (4 * width.ratio).denominator == 1]
    eager = {"scala, not compiled": replace(recipe, compile=False)} if recipe.compile else {}
    alone = {f"separate-{width}": separate(recipe, width) for width in widths}
    every = {"scala": recipe, **eager, "us-net": us_net(recipe), **alone}
    if only is None:
        return every
    if only not in every:
        raise ValueError(f"there is no method {only!r} to time; there are: {'; '.join(every)}")
    return {only: every[only]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="scala-s-tiny-imagenet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch-size", type=int, help="default: the recipe's")
    parser.add_argument("--steps", type=int, default=10, help="steps in a repeat (default 10)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", help="time just this method")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    try:
        recipe = find(options.recipe)
        recipe = replace(recipe, batch_size=options.batch_size or recipe.batch_size)
        timed = methods(recipe, options.only)
    except ValueError as error:
        parser.error(str(error))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    peak = matmul_rate(device, options.repeats)
    print(f"{name}, torch {torch.__version__}: bfloat16 matrix product {peak / 1e12:.3g} TFLOP/s\n")
    print(f"| {options.recipe}, batch {recipe.batch_size} | images/s | TFLOP/s | share of the matrix product |")
    print("|---|---|---|---|")
    found: dict[str, dict[str, float]] = {}
    for method, chosen in timed.items():
        torch.compiler.reset()
        rate = step_rate(chosen, device, options.steps, options.repeats)
        share = rate["flops_per_s"] / peak
        print(
            f"| {method} | {rate['images_per_s']:,.0f} | {rate['flops_per_s'] / 1e12:.3g} | {share:.1%} |",
            flush=True,
        )
        found[method] = {"images_per_s": round(rate["images_per_s"], 1), "share_of_matmul": round(share, 4)}
    report = {"device": name, "recipe": options.recipe, "matmul_tflops": round(peak / 1e12, 3), "methods": found}
    print(json.dumps(report))


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
