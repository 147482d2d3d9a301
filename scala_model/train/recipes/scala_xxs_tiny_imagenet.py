"""A comparison of all methods that two CPU cores can afford: Tiny ImageNet at 32 px, four widths, three epochs.

scala-serve train scala-xxs-tiny-imagenet:METHOD --data DIR --threads 1

Three epochs show which parts matter early, not what a method reaches in the end; docs/training.md has the table.
"""

from scala_model.config import ScalaConfig
from scala_model.train.recipe import Recipe

RECIPE = Recipe(
    config=ScalaConfig(
        image_size=32,
        patch_size=8,
        embed_dim=128,
        depth=4,
        num_heads=2,
        mlp_ratio=4.0,
        num_classes=200,
        smallest=0.25,
        largest=1.0,
        granularity=0.25,
    ),
    epochs=3,
    largest_only_epochs=0.3,
    batch_size=128,
    learning_rate=1.5e-3,
    warmup_epochs=0.3,
    clip_grad_norm=5.0,
)
