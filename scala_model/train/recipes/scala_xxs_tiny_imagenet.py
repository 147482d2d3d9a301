"""A comparison of all methods that a CPU can afford: as scala-xs-tiny-imagenet, but 32 px, depth 4, three epochs.

scala-serve train scala-xxs-tiny-imagenet:METHOD --data DIR --threads 1

One CPU core with AVX512-BF16, 540 images/s: 10 minutes. Top-1 (2026-11-22): 9.6, 10.6, 11.0 and 11.0 % at 0.25, 0.5,
0.75 and 1.0. Three epochs show which parts matter early, not what a method reaches; docs/training.md has the table.
"""

from dataclasses import replace

from scala_model.train.recipes.scala_xs_tiny_imagenet import RECIPE as XS

RECIPE = replace(
    XS,
    config=replace(XS.config, image_size=32, depth=4),
    epochs=3,
    largest_only_epochs=0.3,
    batch_size=128,
    learning_rate=1.5e-3,
    warmup_epochs=0.3,
)
