"""Weights of one network as the start of another: other classes, other widths, another image size."""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor

from scala_model.config import ScalaConfig
from scala_model.importing import positions_at

# What may differ: no weight, or only the position embedding or the heads, depends on it.
FREE = ("image_size", "num_classes", "smallest", "largest", "granularity", "isolated_activation")


def transferred(weights: dict[str, Tensor], of: ScalaConfig, to: ScalaConfig, *, keep_head: bool) -> dict[str, Tensor]:
    """The weights of a network ``of`` one shape that one of shape ``to`` can start from; without heads if not kept.

    Raises ValueError, listing every difference, when the two differ in more than image size, classes and widths.
    """
    has, wants = asdict(of), asdict(to)
    different = [name for name in has if name not in FREE and has[name] != wants[name]]
    if different:
        listed = "; ".join(f"{name} {has[name]}, the recipe {wants[name]}" for name in different)
        raise ValueError(f"the checkpoint to start from has {listed}: take a recipe of its shape, such as fine-tune")
    start = {name: tensor for name, tensor in weights.items() if keep_head or not name.startswith("head")}
    return start | {"pos_embed": positions_at(weights["pos_embed"], to)}
