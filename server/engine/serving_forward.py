"""The forward pass of the GPU engine: one width, over views of the one set of weights that all widths share.

The arithmetic is the specification's (``scala_model/vit.py``), rearranged where that changes nothing but rounding:

* the patch embedding reads pixels less 128, which half precision holds exactly; mean and deviation are part of its
  weights, and what all images share of the first tokens (positions, class token, biases) is one tensor;
* in the last block only the tokens that the head reads ask, and go on (7 % of the work of 12 blocks).

Linear maps and attention run in the data type of their weights. The residual stream, its norms and the head stay in
float32: 99.2 to 99.5 % of 10,000 images then keep their top-1, of a network all in bfloat16 only 98.3 to 98.9 %.

Shape letters: B batch, T tokens, L leading tokens (those that a head reads), R tokens that go on, C active channels,
H heads, K = C/H head size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from scala_model.checkpoint import Checkpoint
from scala_model.config import ScalaConfig
from scala_model.preprocess import Preprocessing
from scala_model.slicing import cut, slices_of
from scala_model.width import Width

GREY = 128  # what the patch embedding takes a pixel's distance from
PATCH = "patch_embed.proj"


class BlockWeights(NamedTuple):
    """One block's parameters at one width, named as in the state dict with underscores for dots."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    attn_qkv_weight: Tensor
    attn_qkv_bias: Tensor
    attn_proj_weight: Tensor
    attn_proj_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    mlp_fc1_weight: Tensor
    mlp_fc1_bias: Tensor
    mlp_fc2_weight: Tensor
    mlp_fc2_bias: Tensor


class BlockShape(NamedTuple):
    """What else a block needs to know; ``scale`` is the softmax scale of the FULL head, at every width."""

    num_heads: int
    scale: float
    eps: float


BlockFunction = Callable[[Tensor, BlockWeights, BlockShape, int], Tensor]


def resident_weights(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The full network's weights on the device, by their names in the state dict: matrices in ``dtype``, else float32.

    The patch embedding is a matrix (D, P * P * 3) of pixels less 128; ``pos_embed`` (1, T, D) holds all that does not
    depend on the image before the first block, and replaces the tokens and the patch embedding's bias.
    """
    config = checkpoint.config
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in checkpoint.weights.items()}
    matrix, bias = _on_raw_pixels(weights[f"{PATCH}.weight"], checkpoint.preprocessing, dtype)
    bias += weights.pop(f"{PATCH}.bias")
    leading = [weights.pop(name) for name in ("cls_token", "dist_token")[: 1 + config.distilled]]
    weights["pos_embed"] += torch.cat([*leading, bias.expand(1, config.num_patches, -1)], 1)
    weights[f"{PATCH}.weight"] = matrix
    return {
        name: tensor.to(device, dtype if ".attn." in name or ".mlp." in name or PATCH in name else torch.float32)
        for name, tensor in weights.items()
    }


def _on_raw_pixels(weight: Tensor, spec: Preprocessing, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A map (D, 3, P, P) of normalised images as one (D, P * P * 3) of pixels less 128, and the bias that it needs.

    The bias is that of the map as rounded to ``dtype``: no error is left but in the pixels' deviations from the mean.
    """
    mean, std = 255 * torch.tensor(spec.mean), 255 * torch.tensor(spec.std)
    raw = (weight.permute(0, 2, 3, 1) / std).to(dtype).float()
    return raw.flatten(1), (raw * (GREY - mean)).sum((1, 2, 3))


class ServingForward:
    """One width's forward pass over views of ``weights``, as ``resident_weights`` made them: nothing is copied."""

    def __init__(self, config: ScalaConfig, weights: Mapping[str, Tensor], width: Width) -> None:
        s = slices_of(config, width)
        self.views = {name: cut(name, tensor, s) for name, tensor in weights.items()}
        self._config = config
        self._shape = BlockShape(
            config.num_heads, (config.embed_dim // config.num_heads) ** -0.5, config.layer_norm_eps
        )
        self._blocks = [
            BlockWeights(*(self.views[f"blocks.{i}.{field.replace('_', '.')}"] for field in BlockWeights._fields))
            for i in range(config.depth)
        ]
        self._pooled = config.global_pool == "avg"
        self._num_leading = 1 + config.distilled

    def __call__(self, pixels: Tensor, run_block: BlockFunction) -> Tensor:
        """uint8 (B, S, S, 3) -> probabilities, float32 (B, classes); ``run_block`` is ``block``, compiled or not."""
        x_BTC = self._tokens(pixels)
        for weights in self._blocks[:-1]:
            x_BTC = run_block(x_BTC, weights, self._shape, self._config.num_tokens)
        num_read = self._config.num_tokens if self._pooled else self._num_leading
        return self._head(run_block(x_BTC, self._blocks[-1], self._shape, num_read)).softmax(-1)

    def _tokens(self, pixels: Tensor) -> Tensor:
        """The leading tokens, then the patches: float32 (B, T, C)."""
        patch, num = self._config.patch_size, self._config.image_size // self._config.patch_size
        rows = pixels.reshape(-1, num, patch, num, patch * 3).transpose(2, 3)
        matrix, start_1TC = self.views[f"{PATCH}.weight"], self.views["pos_embed"]
        patches_BTC = F.linear(rows.reshape(-1, num * num, patch * patch * 3).to(matrix.dtype) - GREY, matrix)
        leading_BLC = start_1TC[:, : self._num_leading].expand(len(pixels), -1, -1)
        return torch.cat([leading_BLC, patches_BTC + start_1TC[:, self._num_leading :]], 1)

    def _head(self, x_BTC: Tensor) -> Tensor:
        """Logits, float32 (B, classes); the distilled variant's are the mean of its two heads."""
        if self._pooled:
            return F.linear(self._norm("fc_norm", x_BTC[:, 1:].mean(1)), *self._weight_and_bias("head"))
        x_BLC = self._norm("norm", x_BTC)
        logits = F.linear(x_BLC[:, 0], *self._weight_and_bias("head"))
        if not self._config.distilled:
            return logits
        return (logits + F.linear(x_BLC[:, 1], *self._weight_and_bias("head_dist"))) / 2

    def _norm(self, name: str, x_BTC: Tensor) -> Tensor:
        return F.layer_norm(x_BTC, x_BTC.shape[-1:], *self._weight_and_bias(name), self._shape.eps)

    def _weight_and_bias(self, name: str) -> tuple[Tensor, Tensor]:
        return self.views[f"{name}.weight"], self.views[f"{name}.bias"]


def block(x_BTC: Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> Tensor:
    """Pre-norm transformer block on the float32 residual stream: (B, T, C) -> its first ``num_read`` tokens (B, R, C).

    A function of its weights, so that compiled once it serves every depth.
    """
    normed_BTC = F.layer_norm(x_BTC, x_BTC.shape[-1:], w.norm1_weight, w.norm1_bias, shape.eps)
    mixed_BRC = _attention(normed_BTC.type_as(w.attn_qkv_weight), w, shape, num_read)
    x_BRC = x_BTC[:, :num_read] + F.linear(mixed_BRC, w.attn_proj_weight, w.attn_proj_bias)
    normed_BRC = F.layer_norm(x_BRC, x_BRC.shape[-1:], w.norm2_weight, w.norm2_bias, shape.eps)
    hidden = F.gelu(F.linear(normed_BRC.type_as(w.mlp_fc1_weight), w.mlp_fc1_weight, w.mlp_fc1_bias))
    return x_BRC + F.linear(hidden, w.mlp_fc2_weight, w.mlp_fc2_bias)


def _attention(x_BTC: Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> Tensor:
    """What the first ``num_read`` tokens take from all of them: (B, R, C), before the projection."""
    tokens, channels = x_BTC.shape[1:]
    if num_read == tokens:
        q, k, v = F.linear(x_BTC, w.attn_qkv_weight, w.attn_qkv_bias).chunk(3, -1)
    else:
        q = F.linear(x_BTC[:, :num_read], w.attn_qkv_weight[:channels], w.attn_qkv_bias[:channels])
        k, v = F.linear(x_BTC, w.attn_qkv_weight[channels:], w.attn_qkv_bias[channels:]).chunk(2, -1)
    q_BHRK, k_BHTK, v_BHTK = (_heads(part, shape.num_heads) for part in (q, k, v))
    mixed_BHRK = F.scaled_dot_product_attention(q_BHRK, k_BHTK, v_BHTK, scale=shape.scale)
    return mixed_BHRK.transpose(1, 2).flatten(2)


def _heads(x_BTC: Tensor, num_heads: int) -> Tensor:
    """(B, T, C) -> (B, H, T, K)."""
    batch, tokens, channels = x_BTC.shape
    return x_BTC.view(batch, tokens, num_heads, channels // num_heads).transpose(1, 2)
