"""A checkpoint that answers exactly as a trained one does, and costs as much as a bigger network.

    python -m benchmarks.heavier OUT [--checkpoint DIR] [--mlp-factor N] [--extra-depth N]

The checkpoint that comes with the package takes less time than its HTTP request does, so a server of it has little to
choose between. Two enlargements change what a width costs and leave its function alone, and with it its accuracy and
the images that it gets right:

* more hidden channels, whose weights out are zero. The trained ones lie apart, channel i at ``mlp_factor`` * i, so that
  the first or last channels of any width hold the same trained ones as before;
* more blocks behind the trained ones, whose both branches end in zeros: they add nothing to the residual stream.

Everywhere else the new weights are as initialised, and a runtime does the work. By default one image takes 0.9 to 1.7
ms at width 0.25 and 8.5 to 10.4 ms at 1.0 on one core with AVX512-BF16: the less, the quieter the machine is.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from scala_model.checkpoint import build_model, default_checkpoint, read_card, read_checkpoint, save_checkpoint
from scala_model.config import ScalaConfig
from scala_model.correctness import read_correctness, write_correctness
from scala_model.cost import cost_of
from scala_model.vit import ScalaViT
from scala_model.width import Width

MLP_FACTOR, EXTRA_DEPTH = 8, 9


def heavier(
    checkpoint_folder: str | os.PathLike[str], out_folder: str | os.PathLike[str], *, mlp_factor: int, extra_depth: int
) -> None:
    """Write a checkpoint with ``mlp_factor`` times the hidden channels and ``extra_depth`` more blocks, function kept.

    It is named after its folder, keeps the precision of the weights, and takes over what was measured of each width and
    the correctness matrix. Raises CheckpointError as reading one does, and ValueError when a number is too small, the
    widths' hidden channels cannot be multiplied, or the two folders are one.
    """
    source, target = Path(checkpoint_folder), Path(out_folder)
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} holds the checkpoint to start from: write the heavier one to another folder")
    checkpoint, matrix = read_checkpoint(source), read_correctness(source)
    model = enlarged(build_model(checkpoint), mlp_factor, extra_depth)
    if all(array.dtype == np.float16 for array in checkpoint.weights.values()):
        model.half()
    told = f"{mlp_factor} x the hidden channels and {extra_depth} more blocks, which add nothing, after training"
    training = (checkpoint.card["training"] or {}) | {
        "made heavier": f"{told}: the answers, and what was measured of them, are those of {checkpoint.card['name']}"
    }
    save_checkpoint(target, model, checkpoint.card | {"training": training})
    if matrix is not None:
        write_correctness(target, matrix)


@torch.no_grad()
def enlarged(model: ScalaViT, mlp_factor: int, extra_depth: int) -> ScalaViT:
    """A bigger float32 network of the same function at every width; the same bytes each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        bigger = ScalaViT(_enlarged_config(model.config, mlp_factor, extra_depth)).eval()
    weights = bigger.state_dict()
    for name, trained in model.state_dict().items():
        if "mlp.fc1" in name:
            weights[name][::mlp_factor] = trained
        elif "mlp.fc2.weight" in name:
            weights[name].zero_()[:, ::mlp_factor] = trained
        else:
            weights[name].copy_(trained)
    for i in range(model.config.depth, bigger.config.depth):
        weights[f"blocks.{i}.attn.proj.weight"].zero_()  # the biases are zero as initialised
        weights[f"blocks.{i}.mlp.fc2.weight"].zero_()
    return bigger


def _enlarged_config(config: ScalaConfig, mlp_factor: int, extra_depth: int) -> ScalaConfig:
    if mlp_factor < 1:
        raise ValueError(f"mlp_factor is {mlp_factor}: give a whole number from 1")
    if extra_depth < 0:
        raise ValueError(f"extra_depth is {extra_depth}: give a whole number from 0")
    bigger = replace(config, mlp_ratio=config.mlp_ratio * mlp_factor, depth=config.depth + extra_depth)
    for width in (*config.widths, Width(1)):  # a share that is rounded down would hold other trained channels
        before, after = width.channels(config.hidden_dim), width.channels(bigger.hidden_dim)
        if after != mlp_factor * before:
            raise ValueError(
                f"mlp_factor {mlp_factor} leaves width {width} with {after} hidden channels, not {mlp_factor} x "
                f"{before}: its share of them is not whole; leave mlp_factor at 1 and add blocks"
            )
    return bigger


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write, such as runs/heavier")
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", default=default_checkpoint())
    parser.add_argument("--mlp-factor", type=int, metavar="N", default=MLP_FACTOR, help="default: %(default)s")
    parser.add_argument("--extra-depth", type=int, metavar="N", default=EXTRA_DEPTH, help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        heavier(options.checkpoint, options.out, mlp_factor=options.mlp_factor, extra_depth=options.extra_depth)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    (before, _), (after, _) = read_card(options.checkpoint), read_card(options.out)
    print(f"{options.out}: multiply-adds of an image")
    for width in before.widths:
        print(f"  width {width}: {cost_of(before, width).macs:,} -> {cost_of(after, width).macs:,}")


if __name__ == "__main__":
    main()
