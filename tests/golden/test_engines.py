"""Every engine against the eager specification: random images on the published weights, real ones on the shipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open

from scala_model import ScalaViT, Width
from scala_model.card import complete_card
from scala_model.checkpoint import Checkpoint, build_model, default_checkpoint, read_checkpoint
from scala_model.config import variant
from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.layouts import open_split
from server.engine.contract import Engine
from server.engine.cuda_graphs import CudaGraphsEngine
from server.engine.openvino_engine import OpenVinoEngine
from server.engine.torch_engine import TorchEngine
from tests.golden.test_golden import VARIANTS, config_from

PRECISE: dict[str, Callable[[Checkpoint], Engine]] = {
    "torch": lambda checkpoint: TorchEngine(checkpoint, device="cpu", threads=1, max_batch=8),
    "openvino": lambda checkpoint: OpenVinoEngine(checkpoint, threads=1, max_batch=8, precision="f32"),
}
SERVING: dict[str, Callable[[Checkpoint], Engine]] = {
    "openvino": lambda checkpoint: OpenVinoEngine(checkpoint, threads=1, max_batch=16),
    "cuda_graphs": lambda checkpoint: CudaGraphsEngine(checkpoint, device="cpu", max_batch=16),
}
NUM_REAL = 500


def specified(model: ScalaViT, pixels: NDArray[np.uint8], width: Width) -> NDArray[np.float32]:
    with torch.inference_mode():
        images = normalise(torch.from_numpy(pixels), Preprocessing(model.config.image_size))
        probabilities: NDArray[np.float32] = model(images, width).softmax(-1).numpy()
    return probabilities


@pytest.mark.parametrize("name", PRECISE)
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_engines_compute_what_is_specified_at_every_width(golden_dir: Path, variant: str, name: str) -> None:
    with safe_open(golden_dir / f"{variant}.safetensors", "np") as file:
        config = config_from(file.metadata())
        weights = {
            key.removeprefix("weights."): file.get_tensor(key)
            for key in file.keys()  # noqa: SIM118
            if key.startswith("weights.")
        }
    checkpoint = Checkpoint(config, complete_card(config, variant, {}), weights)
    model, engine = build_model(checkpoint), PRECISE[name](checkpoint)
    size = config.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (7, size, size, 3), np.uint8)
    for width in config.widths:
        engine.load(width, engine.max_batch)
        expected = specified(model, pixels, width)
        for batch in (1, 2, 7):
            np.testing.assert_allclose(engine.run(pixels[:batch], width), expected[:batch], atol=1e-4, rtol=0)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_network_of_many_channels_is_computed_as_specified(distilled: bool) -> None:
    """Wide enough for large matrices and for a residual stream that may be bfloat16; random weights need no data."""
    config = variant("deit-ti-distilled" if distilled else "deit-ti", image_size=16, patch_size=4, num_classes=10)
    torch.manual_seed(0)
    model = ScalaViT(config).eval()
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    checkpoint = Checkpoint(config, complete_card(config, "random", {}), weights)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for precision, tolerance in (("f32", 1e-5), ("bf16", 2e-3)):
        engine = OpenVinoEngine(checkpoint, threads=1, max_batch=4, precision=precision)
        for width in (config.widths[0], config.widths[3]):
            engine.load(width, 4)
            for batch in (1, 3):
                expected = specified(model, pixels[:batch], width)
                np.testing.assert_allclose(engine.run(pixels[:batch], width), expected, atol=tolerance, rtol=0)
            different = specified(model, 255 - pixels[:1], width)
            assert np.abs(different - specified(model, pixels[:1], width)).max() > 5e-3, "or the bounds say nothing"


@pytest.mark.parametrize("name", SERVING)
def test_engines_answer_as_specified_in_the_precision_they_choose(shared_data: Path, name: str) -> None:
    """bfloat16, where the processor has it: that changes an answer only where the first two are all but equal.

    Over all 10,000 images every width keeps 99 % of its answers (``make bench-agreement``). Over these few the widths
    are counted together, for one image more or less is 0.2 points.
    """
    checkpoint = read_checkpoint(default_checkpoint())
    engine, model = SERVING[name](checkpoint), build_model(checkpoint)
    images = open_split(shared_data / "tiny-imagenet", "val").decode_all(checkpoint.preprocessing)
    pixels, labels = images.pixels[:NUM_REAL].numpy(), images.labels[:NUM_REAL].numpy()
    same, right, right_as_specified = [], [], []
    for width in checkpoint.config.widths:
        engine.load(width, engine.max_batch)
        answers = np.concatenate([engine.run(pixels[i : i + 16], width) for i in range(0, NUM_REAL, 16)]).argmax(1)
        expected = specified(model, pixels, width)
        of_first, of_ours = expected.max(1), expected[range(NUM_REAL), answers]
        assert (of_first - of_ours).max() < 0.02
        same.append(answers == expected.argmax(1))
        right.append(answers == labels)
        right_as_specified.append(expected.argmax(1) == labels)
        assert same[-1].mean() >= 0.98
    assert np.mean(same) >= 0.99
    assert abs(np.mean(right) - np.mean(right_as_specified)) <= 0.003
