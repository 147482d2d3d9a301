"""A checkpoint of random weights, written without torch, and images for it."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import safetensors.numpy
from PIL import Image

from scala_model.card import complete_card
from scala_model.checkpoint import WEIGHTS, expected_shapes, write_card
from scala_model.config import ScalaConfig

SIZE, NUM_CLASSES = 8, 200
ACCURACIES = {0.25: 0.4, 0.5: 0.5, 0.75: 0.6, 1.0: 0.7}
CONFIG = ScalaConfig(
    image_size=SIZE,
    patch_size=4,
    embed_dim=8,
    depth=1,
    num_heads=2,
    mlp_ratio=2.0,
    num_classes=NUM_CLASSES,
    smallest=0.25,
    largest=1.0,
    granularity=0.25,
)


def write_toy(folder: Path) -> Path:
    """Four widths of known accuracy, 200 classes called ``class 0`` ... ``class 199``."""
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal(shape, np.float32) for name, shape in expected_shapes(CONFIG).items()}
    data = safetensors.numpy.save(weights)
    given = {
        "widths": [
            {"width": width, "accuracy": accuracy, "accuracy_ci95": [accuracy - 0.01, accuracy + 0.01]}
            for width, accuracy in ACCURACIES.items()
        ],
        "classes": [{"class_id": i, "id": f"n{i}", "label": f"class {i}"} for i in range(NUM_CLASSES)],
        "weights_sha256": hashlib.sha256(data).hexdigest(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_bytes(data)
    write_card(folder, complete_card(CONFIG, folder.name, given))
    return folder


def png(value: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    """A grey image; the fake engine sees class ``value`` in it."""
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()
