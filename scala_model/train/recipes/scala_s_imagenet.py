"""The paper's DeiT-S on ImageNet-1K (224 px, 100 epochs), plain variant, seven widths.

torchrun --nproc-per-node 8 -m server train scala-s-imagenet --data DIR

Not run: it takes 6.4 EFLOP, 13 hours of one data-centre GPU at 20 % of 700 TFLOP/s. The published figures are those of
the distilled variant with an external teacher, scala-s-distilled-imagenet. Crops come from stored squares of 256 px,
the paper's from whole photos.
"""

from scala_model.config import variant
from scala_model.train.recipe import Recipe

RECIPE = Recipe(
    config=variant("deit-s", image_size=224, patch_size=16, num_classes=1000),
    epochs=100,
    largest_only_epochs=10,
    batch_size=1024,
    learning_rate=4e-3,
    warmup_epochs=3,
    mixup=0.8,
    cutmix=1.0,
    min_crop_area=0.08,
    rand_augment=1,
    erasing=0.25,
    drop_path=0.1,
    ema_decay=0.99996,
    resident_size=256,
    compile=True,
)
