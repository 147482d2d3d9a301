"""The sliced Vision Transformer: the specification that every faster path must agree with.

Y. Zhang et al., "Slicing Vision Transformer for Flexible Inference", NeurIPS 2024 (arXiv 2412.04786).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from scala_model.config import ScalaConfig
from scala_model.layers import Block, DropPath, PatchEmbed, SlicedLayerNorm, SlicedLinear
from scala_model.slicing import Slices, slices_of
from scala_model.width import Width

if TYPE_CHECKING:
    from scala_model.subnet import DenseViT

EVERY = slice(None)


class ScalaViT(nn.Module):
    """One set of weights, one forward pass per trained width; state-dict names as in DeiT and timm.

    ``drop_path`` grows linearly over the depth to the given rate (training only).
    """

    def __init__(self, config: ScalaConfig, *, drop_path: float = 0.0) -> None:
        super().__init__()
        self.config = config
        self.card: dict[str, Any] = {}
        self._slices = {width: slices_of(config, width) for width in config.widths}
        dim, eps = config.embed_dim, config.layer_norm_eps
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, dim))
        self.patch_embed = PatchEmbed(config.patch_size, dim)
        self.blocks = nn.ModuleList(
            Block(dim, config.hidden_dim, config.num_heads, eps, DropPath(rate) if drop_path else nn.Identity())
            for rate in torch.linspace(0, drop_path, config.depth, device="cpu").tolist()
        )
        if config.global_pool == "avg":
            self.fc_norm = SlicedLayerNorm(dim, eps)
        else:
            self.norm = SlicedLayerNorm(dim, eps)
        self.head = SlicedLinear(dim, config.num_classes)
        if config.distilled:
            self.head_dist = SlicedLinear(dim, config.num_classes)
        self.apply(_init_weights)
        for token in (self.cls_token, self.pos_embed, *([self.dist_token] if config.distilled else [])):
            nn.init.trunc_normal_(token, std=0.02)

    def forward(self, images: Tensor, width: Width | float) -> Tensor:
        """Normalised images (B, 3, S, S) -> logits (B, classes); the distilled variant's are the mean of its two heads.

        Raises ValueError for a width that was not trained, listing those that were.
        """
        heads = self.heads(images, width)
        return heads[0] if len(heads) == 1 else (heads[0] + heads[1]) / 2

    def heads(self, images: Tensor, width: Width | float) -> tuple[Tensor, ...]:
        """Logits (B, classes) of the class head and, in the distilled variant, of the distillation head."""
        s = self._slices[self.config.width(width)]
        x_BTC = self._tokens(images, s)
        for block in self.blocks:
            x_BTC = block(x_BTC, s)
        if self.config.global_pool == "avg":
            return (self.head(self.fc_norm(x_BTC[:, 1:].mean(1), s.embed), EVERY, s.embed),)
        x_BTC = self.norm(x_BTC, s.embed)
        logits = self.head(x_BTC[:, 0], EVERY, s.embed)
        return (logits, self.head_dist(x_BTC[:, 1], EVERY, s.embed)) if self.config.distilled else (logits,)

    def _tokens(self, images: Tensor, s: Slices) -> Tensor:
        patches_BTC = self.patch_embed(images, s.embed)
        tokens = [self.cls_token, self.dist_token] if self.config.distilled else [self.cls_token]
        leading = [token[..., s.embed].expand(len(images), -1, -1).to(patches_BTC.dtype) for token in tokens]
        return torch.cat([*leading, patches_BTC], dim=1) + self.pos_embed[..., s.embed]

    def subnet(self, width: Width | float) -> DenseViT:
        """One width cut out as a dense plain ViT with contiguous weights of its own."""
        from scala_model.subnet import extract

        width = self.config.width(width)
        return extract(self, width, self._slices[width])


def _init_weights(module: nn.Module) -> None:
    """DeiT's initialisation: truncated normal of 0.02 for linear maps, zero biases."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
