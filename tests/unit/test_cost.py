"""Parameters and multiply-adds, against real networks and published numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scala_model import ScalaConfig, ScalaViT, Width
from scala_model.config import variant
from scala_model.cost import Cost, cost_of

KINDS: dict[str, dict[str, Any]] = {"plain": {}, "distilled": {"distilled": True}, "avgpool": {"global_pool": "avg"}}


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_counts_what_the_dense_network_of_each_width_has_and_does(kind: str) -> None:
    config = ScalaConfig(
        image_size=12,
        patch_size=4,
        embed_dim=24,
        depth=3,
        num_heads=3,
        mlp_ratio=3.0,
        num_classes=7,
        smallest=0.25,
        largest=1.0,
        granularity=0.125,
        **KINDS[kind],
    )
    model = ScalaViT(config).eval()
    for width in config.widths:
        dense = model.subnet(width)
        with FlopCounterMode(display=False) as counter:
            dense(torch.zeros(1, 3, 12, 12))
        counted = Cost(sum(p.numel() for p in dense.parameters()), counter.get_total_flops() // 2)
        assert cost_of(config, width) == counted, width


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("deit-ti", 5_717_416),
        ("deit-s", 22_050_664),
        ("deit-b", 86_567_656),
        ("deit-ti-distilled", 5_910_800),
        ("deit-s-distilled", 22_436_432),
        ("deit-b-distilled", 87_338_192),
    ],
)
def test_parameters_of_the_published_networks(name: str, parameters: int) -> None:
    assert cost_of(variant(name, image_size=224, patch_size=16, num_classes=1000), Width(1)).parameters == parameters


@pytest.mark.parametrize(("ratio", "giga_macs"), [(0.25, 0.4), (0.5, 1.3), (0.75, 2.7), (1.0, 4.6)])
def test_macs_are_those_of_the_paper(ratio: float, giga_macs: float) -> None:
    config = variant("deit-s", image_size=224, patch_size=16, num_classes=1000)
    assert round(cost_of(config, Width(ratio)).macs / 1e9, 1) == giga_macs


def test_bytes_follow_the_precision() -> None:
    assert Cost(parameters=10, macs=0).num_bytes() == 40
    assert Cost(parameters=10, macs=0).num_bytes(2) == 20
