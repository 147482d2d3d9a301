"""Recipes: everything that decides a training run, as values.

Each recipe says what it costs and what it gave, so that a change can be judged before it is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from scala_model.config import ScalaConfig, variant


@dataclass(frozen=True)
class Recipe:
    """``resident_size``: pixels a side of the images kept in memory, from which crops are taken. Rates are per step."""

    config: ScalaConfig
    epochs: int
    largest_only_epochs: float
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    min_crop_area: float = 0.35
    drop_path: float = 0.0
    clip_grad_norm: float | None = None
    resident_size: int = 64
    autocast: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False


# scala-serve train scala-xs-tiny-imagenet --data DIR
# Two CPU cores with AVX512-BF16, 260 to 300 images/s: 95 minutes. Top-1: 20.5, 25.6, 26.7, 27.1 % (2026-11-22).
XS = Recipe(
    config=ScalaConfig(
        image_size=48,
        patch_size=8,
        embed_dim=128,
        depth=5,
        num_heads=2,
        mlp_ratio=4.0,
        num_classes=200,
        smallest=0.25,
        largest=1.0,
        granularity=0.25,
    ),
    epochs=15,
    largest_only_epochs=1.5,
    batch_size=256,
    learning_rate=2e-3,
    warmup_epochs=0.75,
    clip_grad_norm=5.0,
)

# scala-serve train scala-s-tiny-imagenet --data DIR --device cuda
# One data-centre GPU. Not run yet: neither its duration nor its accuracy is known.
S = Recipe(
    config=variant("deit-s", image_size=64, patch_size=8, num_classes=200),
    epochs=100,
    largest_only_epochs=10,
    batch_size=1024,
    learning_rate=2e-3,
    warmup_epochs=3,
    mixup=0.8,
    cutmix=1.0,
    min_crop_area=0.2,
    drop_path=0.1,
    compile=True,
)

RECIPES = {"scala-xs-tiny-imagenet": XS, "scala-s-tiny-imagenet": S}
