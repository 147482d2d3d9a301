"""One slimmable Vision Transformer that holds many trained widths (Scala, NeurIPS 2024).

``ScalaConfig`` and ``Width`` are plain values; ``ScalaViT`` and the checkpoint functions load torch on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from scala_model.config import ScalaConfig
from scala_model.width import Width

if TYPE_CHECKING:
    from scala_model.checkpoint import load_checkpoint, save_checkpoint
    from scala_model.vit import ScalaViT

__all__ = ["ScalaConfig", "ScalaViT", "Width", "load_checkpoint", "save_checkpoint"]


def __getattr__(name: str) -> object:
    if name == "ScalaViT":
        from scala_model.vit import ScalaViT

        return ScalaViT
    if name in ("load_checkpoint", "save_checkpoint"):
        from scala_model import checkpoint

        return getattr(checkpoint, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
