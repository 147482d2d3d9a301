"""One width of a Scala network as an ordinary dense ViT, for engines that want plain contiguous matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scala_model.config import ScalaConfig
from scala_model.layers import attend
from scala_model.slicing import Slices, cut
from scala_model.width import Width

if TYPE_CHECKING:
    from scala_model.vit import ScalaViT


class DenseBlock(nn.Module):
    """A pre-norm block on all of its channels. ``scale`` is the softmax scale of the network it was cut from."""

    def __init__(self, channels: int, hidden: int, num_heads: int, eps: float, scale: float) -> None:
        super().__init__()
        self.num_heads, self.scale = num_heads, scale
        self.norm1 = nn.LayerNorm(channels, eps)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(channels, 3 * channels), "proj": nn.Linear(channels, channels)})
        self.norm2 = nn.LayerNorm(channels, eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(channels, hidden), "fc2": nn.Linear(hidden, channels)})

    def forward(self, x_BTC: Tensor) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        qkv = self.attn["qkv"](self.norm1(x_BTC)).view(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, self.scale)
        x_BTC = x_BTC + self.attn["proj"](mixed_BHTK.transpose(1, 2).reshape(batch, tokens, channels))
        out_BTC: Tensor = x_BTC + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x_BTC))))
        return out_BTC


class DenseViT(nn.Module):
    """A plain ViT of one width; state-dict names as in DeiT and timm, every weight contiguous."""

    def __init__(self, config: ScalaConfig, width: Width) -> None:
        super().__init__()
        self.config, self.width = config, width
        channels, eps = width.channels(config.embed_dim), config.layer_norm_eps
        scale = (config.embed_dim // config.num_heads) ** -0.5
        self.cls_token = nn.Parameter(torch.empty(1, 1, channels))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, channels))
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, channels))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, channels, config.patch_size, config.patch_size)})
        hidden = width.channels(config.hidden_dim)
        self.blocks = nn.Sequential(
            *(DenseBlock(channels, hidden, config.num_heads, eps, scale) for _ in range(config.depth))
        )
        if config.global_pool == "avg":
            self.fc_norm = nn.LayerNorm(channels, eps)
        else:
            self.norm = nn.LayerNorm(channels, eps)
        self.head = nn.Linear(channels, config.num_classes)
        if config.distilled:
            self.head_dist = nn.Linear(channels, config.num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images (B, 3, S, S) -> logits (B, classes)."""
        patches_BTC = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = [self.cls_token, self.dist_token] if self.config.distilled else [self.cls_token]
        leading = [token.expand(images.shape[0], -1, -1) for token in tokens]
        x_BTC = self.blocks(torch.cat([*leading, patches_BTC], dim=1) + self.pos_embed)
        if self.config.global_pool == "avg":
            return self.head(self.fc_norm(x_BTC[:, 1:].mean(1)))  # type: ignore[no-any-return]
        if self.config.distilled:
            x_BTC = self.norm(x_BTC[:, :2])
            return (self.head(x_BTC[:, 0]) + self.head_dist(x_BTC[:, 1])) / 2  # type: ignore[no-any-return]
        return self.head(self.norm(x_BTC[:, 0]))  # type: ignore[no-any-return]


def extract(model: ScalaViT, width: Width, s: Slices) -> DenseViT:
    """Copy the slices of one width into a dense network of the model's data type and mode."""
    weights = {name: cut(name, tensor, s).contiguous().clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        dense = DenseViT(model.config, width)
    dense.load_state_dict(weights, assign=True)
    return dense.requires_grad_(False).train(model.training)
