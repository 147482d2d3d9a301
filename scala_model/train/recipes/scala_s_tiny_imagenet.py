"""DeiT-S with seven widths on Tiny ImageNet at 64 px, patch 8.

scala-serve train scala-s-tiny-imagenet --data DIR --device cuda

One data-centre GPU, 151 PFLOP; estimated at 20 % of a bf16 rate of 700 TFLOP/s: 18 minutes. Goal: 62 % at width 1.0,
50 % at 0.25. Not run yet: neither its duration nor its accuracy is known.
"""

from scala_model.config import variant
from scala_model.train.recipe import Recipe

RECIPE = Recipe(
    config=variant("deit-s", image_size=64, patch_size=8, num_classes=200),
    epochs=100,
    largest_only_epochs=10,
    batch_size=1024,
    learning_rate=2e-3,
    warmup_epochs=3,
    mixup=0.8,
    cutmix=1.0,
    min_crop_area=0.2,
    rand_augment=9,
    erasing=0.25,
    drop_path=0.1,
    ema_decay=0.999,
    compile=True,
)
