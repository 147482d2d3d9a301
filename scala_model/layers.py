"""Layers that run on a slice of their channels. The parameters are those of the full network, named as in DeiT.

Shape letters: B batch, T tokens, C active channels, D full channels, H heads, K = C/H head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scala_model.slicing import Slices


class SlicedLinear(nn.Linear):
    """A linear layer of which only some rows (outputs) and columns (inputs) take part."""

    def forward(self, x_BTC: Tensor, rows: slice, cols: slice) -> Tensor:  # type: ignore[override]
        return F.linear(x_BTC, self.weight[rows, cols], self.bias[rows])


class SlicedLayerNorm(nn.LayerNorm):
    """Layer normalisation with statistics over the active channels."""

    def forward(self, x_BTC: Tensor, active: slice) -> Tensor:  # type: ignore[override]
        return F.layer_norm(x_BTC, x_BTC.shape[-1:], self.weight[active], self.bias[active], self.eps)


class PatchEmbed(nn.Module):
    """Image to tokens: non-overlapping patches through one linear map, held as a convolution's weights."""

    def __init__(self, patch_size: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, patch_size, patch_size)

    def forward(self, images: Tensor, active: slice) -> Tensor:
        """(B, 3, S, S) -> (B, T, C)."""
        stride = self.proj.stride
        return F.conv2d(images, self.proj.weight[active], self.proj.bias[active], stride).flatten(2).transpose(1, 2)  # type: ignore[index]


def attend(q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, scale: float) -> Tensor:
    """softmax(scale * q k^T) v -> (B, H, T, K).

    Fused on CUDA. On a CPU with tens of tokens and heads of 8 to 64 channels, torch 2.13's fused kernel made a whole
    training step 2.3 times slower than these two matrix products (measured, bf16, 65 tokens).
    """
    if q_BHTK.is_cuda:
        return F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, scale=scale)
    return ((q_BHTK * scale) @ k_BHTK.transpose(-2, -1)).softmax(-1) @ v_BHTK


class Attention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (embed_dim // num_heads) ** -0.5  # of the FULL head, at every width
        self.qkv = SlicedLinear(embed_dim, 3 * embed_dim)
        self.proj = SlicedLinear(embed_dim, embed_dim)

    def forward(self, x_BTC: Tensor, s: Slices) -> Tensor:
        batch, tokens, channels = x_BTC.shape
        qkv = self.qkv(x_BTC, s.qkv, s.embed).reshape(batch, tokens, 3, self.num_heads, -1)
        q_BHTK, k_BHTK, v_BHTK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed_BHTK = attend(q_BHTK, k_BHTK, v_BHTK, self.scale)
        out: Tensor = self.proj(mixed_BHTK.transpose(1, 2).reshape(batch, tokens, channels), s.embed, s.embed)
        return out


class Mlp(nn.Module):
    def __init__(self, embed_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = SlicedLinear(embed_dim, hidden_dim)
        self.fc2 = SlicedLinear(hidden_dim, embed_dim)

    def forward(self, x_BTC: Tensor, s: Slices) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_BTC, s.hidden, s.embed)), s.embed, s.hidden)
        return out


class DropPath(nn.Module):
    """Leaves a branch out for some images while training, each with the chance ``rate`` (Huang et al. 2016).

    The rate is a buffer, not a number, so that one compiled block serves every depth.
    """

    rate: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.register_buffer("rate", torch.tensor(rate), persistent=False)

    def forward(self, branch_BTC: Tensor) -> Tensor:
        if not self.training:
            return branch_BTC
        keep = 1.0 - self.rate
        return branch_BTC * ((torch.rand(len(branch_BTC), 1, 1, device=branch_BTC.device) < keep) / keep)


class Block(nn.Module):
    """Pre-norm transformer block; ``drop`` stands at the end of both branches."""

    def __init__(self, embed_dim: int, hidden_dim: int, num_heads: int, eps: float, drop: nn.Module) -> None:
        super().__init__()
        self.norm1 = SlicedLayerNorm(embed_dim, eps)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = SlicedLayerNorm(embed_dim, eps)
        self.mlp = Mlp(embed_dim, hidden_dim)
        self.drop = drop

    def forward(self, x_BTC: Tensor, s: Slices) -> Tensor:
        x_BTC = x_BTC + self.drop(self.attn(self.norm1(x_BTC, s.embed), s))
        out: Tensor = x_BTC + self.drop(self.mlp(self.norm2(x_BTC, s.embed), s))
        return out
