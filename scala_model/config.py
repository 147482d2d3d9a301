"""The shape of a Scala network, and the variants known by name.

No torch here: servers, schedulers and tools read shapes without loading a deep-learning runtime.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from scala_model.width import Width

# name: (embed_dim, depth, num_heads), Touvron et al. 2021, table 1. Any image and patch size goes with each.
VARIANTS = {"deit-ti": (192, 12, 3), "deit-s": (384, 12, 6), "deit-b": (768, 12, 12)}
MOST = 1_000_000  # of anything counted: a damaged card must not make its reader work for hours


@dataclass(frozen=True)
class ScalaConfig:
    """Architecture and trained widths.

    The trained widths run from ``smallest`` to ``largest`` in steps of ``granularity``; ``smallest == largest``
    describes an ordinary network with one width. Heads keep their number at every width and change their size, so
    every width's channels must divide by ``num_heads``. Without ``isolated_activation`` every width is a prefix of the
    next, as in US-Net.

    Raises ValueError, naming the value and what would be accepted.
    """

    image_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    num_classes: int
    smallest: float
    largest: float
    granularity: float
    distilled: bool = False
    global_pool: Literal["token", "avg"] = "token"
    layer_norm_eps: float = 1e-5
    isolated_activation: bool = True

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= MOST:
                raise ValueError(f"{name} must be a whole number from 1 to {MOST}; got {value!r}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        for name in ("mlp_ratio", "layer_norm_eps", "granularity"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number, positive and finite; got {value!r}")
        for name in ("distilled", "isolated_activation"):
            if type(value := getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false; got {value!r}")
        if self.global_pool not in ("token", "avg"):
            raise ValueError(f"global_pool must be 'token' or 'avg'; got {self.global_pool!r}")
        if self.distilled and self.global_pool == "avg":
            raise ValueError("a distilled network reads its two tokens: global_pool must be 'token'")
        for width in self.widths:
            if width.channels(self.embed_dim) % self.num_heads or not width.channels(self.embed_dim):
                raise ValueError(
                    f"width {width} has {width.channels(self.embed_dim)} channels, which {self.num_heads} heads cannot "
                    "share evenly: choose another embed_dim, num_heads or granularity"
                )
        if not self.widths[0].channels(self.hidden_dim):
            raise ValueError(f"mlp_ratio {self.mlp_ratio} leaves width {self.widths[0]} without hidden channels")

    @cached_property
    def widths(self) -> tuple[Width, ...]:
        """The trained widths, ascending."""
        low, high = Width(self.smallest).ratio, Width(self.largest).ratio
        step = Fraction(str(self.granularity))
        if low > high or (high - low) % step:
            raise ValueError(f"steps of {self.granularity} do not lead from {self.smallest} to {self.largest}")
        if (high - low) / step > self.embed_dim:
            raise ValueError(f"steps of {self.granularity} are finer than one channel of {self.embed_dim}")
        return tuple(Width(low + k * step) for k in range(int((high - low) / step) + 1))

    def width(self, ratio: Width | float | str) -> Width:
        """The trained width of this ratio.

        A ViT does not interpolate between trained widths, so any other ratio is a ValueError that lists them.
        """
        wanted = ratio if isinstance(ratio, Width) else Width(ratio)
        for width in self.widths:
            if abs(float(width) - float(wanted)) < 1e-6:
                return width
        raise ValueError(f"width {wanted} was not trained; trained widths: {', '.join(map(str, self.widths))}")

    @property
    def hidden_dim(self) -> int:
        """Channels of the MLP's hidden layer at width 1.0."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_tokens(self) -> int:
        """Patches, class token and, in the distilled variant, distillation token."""
        return self.num_patches + 1 + self.distilled


def variant(
    name: str,
    *,
    image_size: int,
    patch_size: int,
    num_classes: int,
    smallest: float = 0.25,
    largest: float = 1.0,
    granularity: float = 0.125,
    **overrides: Any,
) -> ScalaConfig:
    """A configuration by name: ``deit-ti``, ``deit-s`` or ``deit-b``, plain, or distilled with ``-distilled`` appended.

    Raises ValueError for an unknown name, listing the known ones.
    """
    base, distilled = name.removesuffix("-distilled"), name.endswith("-distilled")
    if base not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}; known: {', '.join(VARIANTS)}, each also with -distilled")
    embed_dim, depth, num_heads = VARIANTS[base]
    return ScalaConfig(
        image_size=image_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=num_heads,
        mlp_ratio=4.0,
        num_classes=num_classes,
        smallest=smallest,
        largest=largest,
        granularity=granularity,
        distilled=distilled,
        **overrides,
    )
