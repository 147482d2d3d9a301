"""One width of a network as an OpenVINO graph, made from its weights: no torch, no tracing, no export.

The graph is the specification's (``scala_model/vit.py``), rearranged where that changes no result but its rounding:

* mean and deviation of the preprocessing are part of the patch embedding;
* the affine part of each layer norm and the softmax scale are part of the linear layer that follows;
* after the last attention only the tokens that the head reads go on (7 % of the work of 12 blocks).

The graph ends before the head, and ``Head`` is the rest, in float32: logits tie in bfloat16. OpenVINO also keeps in
float32 what no matrix product follows on the way to the graph's end, and that is the whole residual stream. It costs 6
to 20 % of the time, so only networks of few channels have it, whose rounding errors average out least; the others end
in a product with the identity. Of 10,000 images 99.1 to 99.3 % keep their top-1, at 32, 64, 96 and 128 channels;
without the stream in float32 98.8 % at 32, with the head in bfloat16 98.2 to 98.9 %.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import Node
from openvino import opset13 as ops

from scala_model.checkpoint import Checkpoint
from scala_model.slicing import cut, slices_of
from scala_model.width import Width

Array = NDArray[np.float32]
MID_GREY = np.float32(128)  # whole numbers from -128 to 127 are exact in bfloat16, and their sums stay small
MANY_CHANNELS = 64  # from here on the residual stream may be bfloat16
AS_IT_IS = 0  # of a dimension, in ``ops.reshape``


@dataclass(frozen=True)
class Head:
    """Leading tokens, normalised, float32 (B, L, C) -> probabilities (B, classes)."""

    weight: Array
    bias: Array

    def __call__(self, tokens_BLC: Array) -> Array:
        # Not by BLAS, whose threads look for more work beside OpenVINO's: 16 images took 165 ms instead of 118.
        logits: Array = np.einsum("bc,ck->bk", tokens_BLC.reshape(len(tokens_BLC), -1), self.weight) + self.bias
        logits -= logits.max(1, keepdims=True)
        np.exp(logits, out=logits)
        logits /= logits.sum(1, keepdims=True)
        return logits


class NetworkBuilder:
    """Makes graph and head of one width, to be run in ``precision``: ``bf16`` or ``f32``.

    ``constant`` turns an array into a node, and decides where its bytes lie.
    """

    def __init__(
        self, checkpoint: Checkpoint, width: Width, precision: str, constant: Callable[[Array], Node] = ops.constant
    ) -> None:
        self._config, self._width, self._constant = checkpoint.config, width, constant
        self._rounded: Callable[[Array], Array] = _to_bfloat16 if precision == "bf16" else np.asarray
        self._slices = slices_of(checkpoint.config, width)
        self._stored: Mapping[str, NDArray[Any]] = checkpoint.weights
        self._preprocessing = checkpoint.preprocessing
        self._channels = width.channels(checkpoint.config.embed_dim)
        self._num_leading = 1 + checkpoint.config.distilled
        self._pooled = checkpoint.config.global_pool == "avg"

    def graph(self, batch: int | None) -> ov.Model:
        """uint8 (batch, S, S, 3), any batch for None -> float32 (batch, L, C), normalised, for ``head``."""
        size = self._config.image_size
        pixels = ops.parameter([-1 if batch is None else batch, size, size, 3], ov.Type.u8, name="pixels")
        x_BTC = self._tokens(pixels)
        for i in range(self._config.depth):
            x_BTC = self._block(x_BTC, i)
        if self._pooled:
            x_BTC = ops.reduce_mean(_span(x_BTC, 1, self._config.num_tokens), _ints(1), keep_dims=True)
        if self._channels >= MANY_CHANNELS:
            x_BTC = ops.matmul(x_BTC, ops.constant(np.eye(self._channels, dtype=np.float32)), False, True)
        return ov.Model([self._standardised(x_BTC)], [pixels], f"width {self._width}")

    def head(self) -> Head:
        norm = "fc_norm" if self._pooled else "norm"
        maps = [self._after_norm(head, norm) for head in ("head", "head_dist")[: self._num_leading]]
        weights, biases = zip(*maps, strict=True)
        share = np.float32(1 / len(maps))  # the distilled variant's answer is the mean of two
        return Head(np.ascontiguousarray(np.concatenate(weights, 1).T * share), sum(biases) * share)

    def _weight(self, name: str) -> Array:
        return np.asarray(cut(name, self._stored[name], self._slices), np.float32)

    def _after_norm(self, linear: str, norm: str) -> tuple[Array, Array]:
        """Weight and bias of a linear layer, with the affine part of the layer norm before it."""
        weight, bias = self._weight(f"{linear}.weight"), self._weight(f"{linear}.bias")
        return weight * self._weight(f"{norm}.weight"), bias + weight @ self._weight(f"{norm}.bias")

    def _linear(self, x_BTC: Node, weight: Array, bias: Array) -> Node:
        return ops.add(ops.matmul(x_BTC, self._constant(weight), False, True), ops.constant(bias))

    def _standardised(self, x_BTC: Node) -> Node:
        return ops.mvn(x_BTC, _ints(-1), True, self._config.layer_norm_eps, "INSIDE_SQRT")

    def _tokens(self, pixels: Node) -> Node:
        """uint8 (B, S, S, 3) -> (B, T, C): the leading tokens, then the patches, with their positions."""
        patch, num = self._config.patch_size, self._config.image_size // self._config.patch_size
        centred = ops.subtract(ops.convert(pixels, "f32"), ops.constant(MID_GREY))
        rows = ops.reshape(centred, _ints(AS_IT_IS, num, patch, num, patch * 3), True)
        patches = ops.reshape(ops.transpose(rows, _ints(0, 1, 3, 2, 4)), _ints(AS_IT_IS, num * num, patch**2 * 3), True)
        weight, bias = self._patch_embedding()
        names = ("cls_token", "dist_token")[: self._num_leading]
        start_1TC = self._weight("pos_embed").copy()
        start_1TC[:, : self._num_leading] += np.concatenate([self._weight(name) for name in names], 1)
        # Padding, as the shape of a broadcast would be a value to wait for when the number of images is open.
        room = ops.pad(self._linear(patches, weight, bias), _ints(0, self._num_leading, 0), _ints(0, 0, 0), "constant")
        return ops.add(room, ops.constant(start_1TC))

    def _patch_embedding(self) -> tuple[Array, Array]:
        """As a map (C, P * P * 3) of pixels less mid-grey.

        The bias is that of the map as it will be rounded: an error is left in what deviates from the mean, not in all.
        """
        spec, weight = self._preprocessing, self._weight("patch_embed.proj.weight")
        mean, std = (255 * np.array(value, np.float32) for value in (spec.mean, spec.std))
        raw = self._rounded(weight.transpose(0, 2, 3, 1) / std)
        bias = self._weight("patch_embed.proj.bias") - (raw * (mean - MID_GREY)).sum((1, 2, 3))
        return raw.reshape(len(raw), -1), bias

    def _block(self, x_BTC: Node, i: int) -> Node:
        num_read = self._num_leading if i == self._config.depth - 1 and not self._pooled else self._config.num_tokens
        mixed_BTC = self._attention(self._standardised(x_BTC), f"blocks.{i}", num_read)
        x_BTC = _span(x_BTC, 0, num_read) if num_read < self._config.num_tokens else x_BTC
        proj = self._weight(f"blocks.{i}.attn.proj.weight"), self._weight(f"blocks.{i}.attn.proj.bias")
        x_BTC = ops.add(x_BTC, self._linear(mixed_BTC, *proj))
        fc1 = self._after_norm(f"blocks.{i}.mlp.fc1", f"blocks.{i}.norm2")
        fc2 = self._weight(f"blocks.{i}.mlp.fc2.weight"), self._weight(f"blocks.{i}.mlp.fc2.bias")
        hidden = ops.gelu(self._linear(self._standardised(x_BTC), *fc1), "erf")
        return ops.add(x_BTC, self._linear(hidden, *fc2))

    def _attention(self, x_BTC: Node, block: str, num_read: int) -> Node:
        """What the first ``num_read`` tokens take from all: (B, T, C) -> (B, num_read, C), before the projection."""
        config, channels = self._config, self._channels
        weight, bias = self._after_norm(f"{block}.attn.qkv", f"{block}.norm1")
        scale = np.float32((config.embed_dim // config.num_heads) ** -0.5)  # of the FULL head, at every width
        weight[:channels] *= scale
        bias[:channels] *= scale
        if num_read == config.num_tokens:
            q, k, v = ops.split(self._linear(x_BTC, weight, bias), ops.constant(2), 3).outputs()
        else:
            q = self._linear(_span(x_BTC, 0, num_read), weight[:channels], bias[:channels])
            k, v = ops.split(self._linear(x_BTC, weight[channels:], bias[channels:]), ops.constant(2), 2).outputs()
        k_BHKT = ops.transpose(self._heads(k, config.num_tokens), _ints(0, 2, 3, 1))
        q_BHTK = ops.transpose(self._heads(q, num_read), _ints(0, 2, 1, 3))
        v_BHTK = ops.transpose(self._heads(v, config.num_tokens), _ints(0, 2, 1, 3))
        mixed_BHTK = ops.matmul(ops.softmax(ops.matmul(q_BHTK, k_BHKT, False, False), -1), v_BHTK, False, False)
        return ops.reshape(ops.transpose(mixed_BHTK, _ints(0, 2, 1, 3)), _ints(AS_IT_IS, num_read, channels), True)

    def _heads(self, x_BTC: Node, tokens: int) -> Node:
        heads = self._config.num_heads
        return ops.reshape(x_BTC, _ints(AS_IT_IS, tokens, heads, self._channels // heads), True)


def _to_bfloat16(array: Array) -> Array:
    """Rounded to the nearest, ties to even, and held as float32 again."""
    bits = np.ascontiguousarray(array).view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)).view(np.float32)


def _span(x_BTC: Node, start: int, stop: int) -> Node:
    return ops.slice(x_BTC, _ints(start), _ints(stop), _ints(1), _ints(1))


def _ints(*values: int) -> Node:
    return ops.constant(np.array(values, np.int64))
