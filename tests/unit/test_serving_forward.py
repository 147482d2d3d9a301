"""The GPU engine's forward pass on a CPU: what the specification computes, from views of one set of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from scala_model import ScalaConfig, Width
from scala_model.card import complete_card
from scala_model.checkpoint import Checkpoint, build_model, expected_shapes
from scala_model.normalise import normalise
from server.engine.serving_forward import BlockShape, BlockWeights, ServingForward, block, resident_weights

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"distilled": True},
    "average-pool": {"global_pool": "avg"},
    "prefixes": {"isolated_activation": False},
}
CPU = torch.device("cpu")


def toy(kind: str) -> Checkpoint:
    """Random in every parameter and of uneven colours, so that nothing is one or zero by chance."""
    config = ScalaConfig(
        image_size=12,
        patch_size=4,
        embed_dim=16,
        depth=3,
        num_heads=2,
        mlp_ratio=4.0,
        num_classes=5,
        smallest=0.25,
        largest=1.0,
        granularity=0.25,
        layer_norm_eps=0.01,  # not small enough to be forgotten
        **KINDS[kind],
    )
    random = np.random.default_rng(5)
    weights = {name: random.normal(0, 0.5, shape).astype(np.float32) for name, shape in expected_shapes(config).items()}
    colours = {"image_size": 12, "crop_ratio": 1.0, "mean": [0.2, 0.5, 0.7], "std": [0.1, 0.3, 0.2]}
    return Checkpoint(config, complete_card(config, kind, {"preprocessing": colours}), weights)


def images(count: int = 4) -> Tensor:
    """Noise on a colour of their own: of noise alone all images look the same."""
    random = np.random.default_rng(0)
    colours, noise = random.integers(0, 192, (count, 1, 1, 3)), random.integers(0, 64, (count, 12, 12, 3))
    return torch.from_numpy((colours + noise).astype(np.uint8))


@torch.inference_mode()
def specified(checkpoint: Checkpoint, pixels: Tensor, width: Width) -> Tensor:
    logits: Tensor = build_model(checkpoint)(normalise(pixels, checkpoint.preprocessing), width)
    return logits.softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_computes_what_is_specified_at_every_width(kind: str) -> None:
    checkpoint = toy(kind)
    weights = resident_weights(checkpoint, CPU, torch.float32)
    for width in checkpoint.config.widths:
        answers = ServingForward(checkpoint.config, weights, width)(images(), block)
        expected = specified(checkpoint, images(), width)
        assert expected.std(0).max() > 0.01  # an image's answer is its own
        torch.testing.assert_close(answers, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_half_precision_is_near_and_its_probabilities_are_float32(kind: str) -> None:
    checkpoint = toy(kind)
    weights = resident_weights(checkpoint, CPU, torch.bfloat16)
    for width in checkpoint.config.widths:
        answers = ServingForward(checkpoint.config, weights, width)(images(), block)
        assert answers.dtype == torch.float32
        assert (answers.sum(1) - 1).abs().max() < 1e-6
        torch.testing.assert_close(answers, specified(checkpoint, images(), width), atol=0.05, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_residual_stream_is_float32_and_only_matrices_are_halved(kind: str) -> None:
    weights = resident_weights(toy(kind), CPU, torch.bfloat16)
    halved = {name.removeprefix("blocks.0.") for name, tensor in weights.items() if tensor.dtype == torch.bfloat16}
    linear = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    expected = {"patch_embed.proj.weight"} | {f"{name}.{part}" for name in linear for part in ("weight", "bias")}
    assert {name for name in halved if not name.startswith("blocks.")} == expected
    streams: list[torch.dtype] = []

    def watched(x_BTC: Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> Tensor:
        streams.append(x_BTC.dtype)
        return block(x_BTC, w, shape, num_read)

    with torch.inference_mode():
        ServingForward(toy(kind).config, weights, Width(0.5))(images(), watched)
    assert streams == [torch.float32] * 3


@pytest.mark.parametrize(
    ("kind", "num_read"), [("plain", [10, 10, 1]), ("distilled", [11, 11, 2]), ("average-pool", [10, 10, 10])]
)
def test_the_last_block_goes_on_with_the_tokens_that_are_read(kind: str, num_read: list[int]) -> None:
    checkpoint, seen = toy(kind), []

    def watched(x_BTC: Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> Tensor:
        y_BRC = block(x_BTC, w, shape, num_read)
        seen.append(y_BRC.shape[1])
        return y_BRC

    with torch.inference_mode():
        ServingForward(checkpoint.config, resident_weights(checkpoint, CPU, torch.float32), Width(1.0))(
            images(), watched
        )
    assert seen == num_read


@pytest.mark.parametrize("kind", KINDS)
def test_every_width_lies_in_the_one_set_of_weights(kind: str) -> None:
    checkpoint = toy(kind)
    weights = resident_weights(checkpoint, CPU, torch.bfloat16)
    homes = [(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in weights.values()]
    for width in checkpoint.config.widths:
        for name, view in ServingForward(checkpoint.config, weights, width).views.items():
            steps = sum((size - 1) * stride for size, stride in zip(view.shape, view.stride(), strict=True))
            first, end = view.data_ptr(), view.data_ptr() + (steps + 1) * view.itemsize
            assert any(low <= first and end <= high for low, high in homes), name
    named = {name: tensor.nbytes for name, tensor in weights.items()}
    assert sum(named.values()) < 0.7 * sum(array.nbytes for array in checkpoint.weights.values())


def test_pixels_less_grey_are_exact_in_half_precision() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal((pixels.to(torch.bfloat16) - 128).double(), torch.arange(-128.0, 128.0, dtype=torch.float64))


def test_the_mean_colour_becomes_nothing_however_the_patch_embedding_is_rounded() -> None:
    checkpoint = toy("plain")
    weights = resident_weights(checkpoint, CPU, torch.bfloat16)
    mean = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64).repeat(16) * 255
    tokens = weights["patch_embed.proj.weight"].double() @ (mean - 128) + weights["pos_embed"][0, 1:].double()
    alone = checkpoint.weights["patch_embed.proj.bias"] + checkpoint.weights["pos_embed"][0, 1:]
    np.testing.assert_allclose(tokens.numpy(), alone, atol=1e-4)
