"""``scala-serve import-weights``: what a person can ask for; the work is in ``scala_model.importing``."""

from __future__ import annotations

from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


class Kind(StrEnum):
    SCALA = "scala"
    VIT = "vit"


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

        scala-serve import-weights deit_small_patch16_224.pth deit-small
        scala-serve import-weights scala.pth scala-s --smallest 0.25 --largest 1 --granularity 0.125

    Exit codes: 0 written; 2 wrong usage or input.
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
