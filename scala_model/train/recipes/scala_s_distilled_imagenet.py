"""The recipe of the paper's table: as scala-s-imagenet, with two tokens and an external teacher (hard distillation).

torchrun --nproc-per-node 8 -m server train scala-s-distilled-imagenet --data DIR --teacher CHECKPOINT

Published (DeiT teacher): 59.8, 70.3, 74.2 and 76.5 % at 0.25, 0.5, 0.75 and 1.0. Not run, see scala-s-imagenet.
"""

from dataclasses import replace

from scala_model.train.recipes.scala_s_imagenet import RECIPE as PLAIN

RECIPE = replace(PLAIN, config=replace(PLAIN.config, distilled=True))
