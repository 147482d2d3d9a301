"""Our network against the authors' published implementation: same weights, same input, same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors import safe_open

from scala_model import ScalaConfig, ScalaViT

VARIANTS = ["scala-plain-x13", "scala-distilled-x4", "scala-avgpool-x7"]


def config_from(metadata: dict[str, str]) -> ScalaConfig:
    pool: Literal["token", "avg"] = "avg" if metadata["global_pool"] == "avg" else "token"
    return ScalaConfig(
        image_size=int(metadata["img_size"]),
        patch_size=int(metadata["patch_size"]),
        embed_dim=int(metadata["embed_dim"]),
        depth=int(metadata["depth"]),
        num_heads=int(metadata["num_heads"]),
        mlp_ratio=float(metadata["mlp_ratio"]),
        num_classes=int(metadata["num_classes"]),
        smallest=float(metadata["smallest_ratio"]),
        largest=float(metadata["largest_ratio"]),
        granularity=float(metadata["granularity"]),
        distilled=metadata["kind"] == "distilled",
        global_pool=pool,
        layer_norm_eps=float(metadata["layer_norm_eps"]),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_reproduces_the_published_logits_at_every_width(golden_dir: Path, name: str) -> None:
    with safe_open(golden_dir / f"{name}.safetensors", "pt") as file:
        model = ScalaViT(config_from(file.metadata())).eval()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    model.load_state_dict(weights, strict=True)

    published = {key for key in tensors if key.startswith("logits.")}
    assert published == {f"logits.{width}" for width in model.config.widths}
    with torch.inference_mode():
        for width in model.config.widths:
            ours, dense = model(tensors["input"], width), model.subnet(width)(tensors["input"])
            torch.testing.assert_close(ours, tensors[f"logits.{width}"], atol=1e-4, rtol=0)
            torch.testing.assert_close(dense, ours, atol=1e-5, rtol=0)
