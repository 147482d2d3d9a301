"""THE rule which channels a width uses (Scala, section 3.1, Isolated Activation).

The smallest and the largest width use the first C channels of everything; every width in between uses the last C.
A middle width r and the smallest s therefore share only max(0, r + s - 1) of the channels. In the fused qkv matrix the
3C active rows are one contiguous block at the same end, not C rows of each third.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from scala_model.config import ScalaConfig
from scala_model.width import Width

Array = TypeVar("Array", bound=Any)  # of numpy or torch


@dataclass(frozen=True, slots=True)
class Slices:
    """The active channels of one width. ``embed`` of D, ``qkv`` of 3D, ``hidden`` of the MLP's hidden channels."""

    embed: slice
    qkv: slice
    hidden: slice


def slices_of(config: ScalaConfig, width: Width) -> Slices:
    """The channels that ``width`` activates; without Isolated Activation (US-Net, the ablation) always the first."""
    prefix = not config.isolated_activation or width in (config.widths[0], config.widths[-1])
    embed = width.channels(config.embed_dim)
    hidden = width.channels(config.hidden_dim)
    return Slices(
        embed=_end(config.embed_dim, embed, prefix),
        qkv=_end(3 * config.embed_dim, 3 * embed, prefix),
        hidden=_end(config.hidden_dim, hidden, prefix),
    )


def cut(name: str, array: Array, s: Slices) -> Array:
    """The part of one named parameter that a width uses: a view of the whole."""
    if "attn.qkv" in name:
        part = array[s.qkv] if name.endswith("bias") else array[s.qkv, s.embed]
    elif "mlp.fc1" in name:
        part = array[s.hidden] if name.endswith("bias") else array[s.hidden, s.embed]
    elif "mlp.fc2.weight" in name or "attn.proj.weight" in name:
        part = array[s.embed, s.hidden if "fc2" in name else s.embed]
    elif name.startswith("head"):
        part = array if name.endswith("bias") else array[:, s.embed]
    elif name.endswith(("token", "pos_embed")):
        part = array[..., s.embed]
    else:
        part = array[s.embed]  # patch embedding, norms, remaining biases
    return part  # type: ignore[no-any-return]


def _end(full: int, active: int, prefix: bool) -> slice:
    return slice(0, active) if prefix else slice(full - active, full)
