"""The smallest network that shows the method: 1 M parameters, four widths, Tiny ImageNet at 48 px.

scala-serve train scala-xs-tiny-imagenet --data DIR

Two CPU cores with AVX512-BF16, 260 to 300 images/s: 95 minutes.
Top-1 (2026-11-22): 20.5, 25.6, 26.7 and 27.1 % at 0.25, 0.5, 0.75 and 1.0; scala-xs-tiny-imagenet-more goes on.
"""

from scala_model.config import ScalaConfig
from scala_model.train.recipe import Recipe

RECIPE = Recipe(
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
