"""The sliced network: its names, its arithmetic, which channels it reads, and the dense networks cut out of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scala_model import ScalaConfig, ScalaViT

TOY: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 4,
    "embed_dim": 16,
    "depth": 2,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "num_classes": 5,
    "smallest": 0.25,
    "largest": 1.0,
    "granularity": 0.25,
}
KINDS: dict[str, dict[str, Any]] = {"plain": {}, "distilled": {"distilled": True}, "avgpool": {"global_pool": "avg"}}
RATIOS = (0.25, 0.5, 0.75, 1.0)
# The active channels of TOY's widths, by hand: 16 channels, 48 rows of qkv, 64 hidden.
ACTIVE = {
    0.25: (slice(0, 4), slice(0, 12), slice(0, 16)),
    0.5: (slice(8, 16), slice(24, 48), slice(32, 64)),
    0.75: (slice(4, 16), slice(12, 48), slice(16, 64)),
    1.0: (slice(0, 16), slice(0, 48), slice(0, 64)),
}


def toy(kind: str = "plain", **changes: Any) -> ScalaViT:
    """Random in every parameter: fresh biases are zero and fresh norms one, which would hide mistakes."""
    torch.manual_seed(5)
    model = ScalaViT(ScalaConfig(**TOY | KINDS[kind] | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


# -- names and shapes

BODY = """
patch_embed.proj.weight patch_embed.proj.bias
blocks.0.norm1.weight blocks.0.norm1.bias blocks.0.attn.qkv.weight blocks.0.attn.qkv.bias
blocks.0.attn.proj.weight blocks.0.attn.proj.bias blocks.0.norm2.weight blocks.0.norm2.bias
blocks.0.mlp.fc1.weight blocks.0.mlp.fc1.bias blocks.0.mlp.fc2.weight blocks.0.mlp.fc2.bias
"""


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        ("plain", "cls_token pos_embed norm.weight norm.bias head.weight head.bias"),
        ("avgpool", "cls_token pos_embed fc_norm.weight fc_norm.bias head.weight head.bias"),
        (
            "distilled",
            "cls_token dist_token pos_embed norm.weight norm.bias head.weight head.bias "
            "head_dist.weight head_dist.bias",
        ),
    ],
)
def test_state_dict_names_are_those_of_deit_and_timm(kind: str, others: str) -> None:
    model = toy(kind, depth=1)
    assert sorted(model.state_dict()) == sorted((BODY + others).split())
    assert sorted(model.subnet(0.5).state_dict()) == sorted((BODY + others).split())


def test_shapes_are_those_of_the_full_network() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in toy("distilled").state_dict().items()}
    assert shapes["cls_token"] == shapes["dist_token"] == (1, 1, 16)
    assert shapes["pos_embed"] == (1, 6, 16)  # class, distillation and 4 patches
    assert shapes["patch_embed.proj.weight"] == (16, 3, 4, 4)
    assert shapes["blocks.1.attn.qkv.weight"] == (48, 16)
    assert shapes["blocks.1.attn.proj.weight"] == (16, 16)
    assert shapes["blocks.1.mlp.fc1.weight"] == (64, 16)
    assert shapes["blocks.1.mlp.fc2.weight"] == (16, 64)
    assert shapes["head.weight"] == shapes["head_dist.weight"] == (5, 16)


# -- arithmetic


def written_out(weights: dict[str, Tensor], x: Tensor, ratio: float) -> Tensor:
    """The plain network of TOY once more, from the method's text alone."""
    c, q, h = ACTIVE[ratio]
    channels, w = c.stop - c.start, weights
    x = F.conv2d(x, w["patch_embed.proj.weight"][c], w["patch_embed.proj.bias"][c], stride=4).flatten(2).mT
    x = torch.cat([w["cls_token"][..., c].expand(len(x), -1, -1), x], 1) + w["pos_embed"][..., c]

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"][c] + w[f"{name}.bias"][c]

    for i in range(2):
        y = norm(x, f"blocks.{i}.norm1") @ w[f"blocks.{i}.attn.qkv.weight"][q, c].T + w[f"blocks.{i}.attn.qkv.bias"][q]
        heads = []
        for head in range(2):
            size = channels // 2
            wanted, key, value = (
                y[..., part * channels + head * size : part * channels + (head + 1) * size] for part in range(3)
            )
            share = (wanted @ key.mT / math.sqrt(8)).softmax(-1)  # 8 channels has the FULL head, at every width
            heads.append(share @ value)
        mixed = torch.cat(heads, -1)
        x = x + mixed @ w[f"blocks.{i}.attn.proj.weight"][c, c].T + w[f"blocks.{i}.attn.proj.bias"][c]
        y = norm(x, f"blocks.{i}.norm2") @ w[f"blocks.{i}.mlp.fc1.weight"][h, c].T + w[f"blocks.{i}.mlp.fc1.bias"][h]
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        x = x + y @ w[f"blocks.{i}.mlp.fc2.weight"][c, h].T + w[f"blocks.{i}.mlp.fc2.bias"][c]
    return norm(x, "norm")[:, 0] @ w["head.weight"][:, c].T + w["head.bias"]


@pytest.mark.parametrize("ratio", RATIOS)
@torch.inference_mode()
def test_agrees_with_the_method_written_out(ratio: float) -> None:
    model = toy()
    torch.testing.assert_close(model(images(), ratio), written_out(model.state_dict(), images(), ratio))


@torch.inference_mode()
def test_a_distilled_network_answers_with_the_mean_of_its_heads() -> None:
    model = toy("distilled")
    first, second = model.heads(images(), 0.5)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(model(images(), 0.5), (first + second) / 2)


@torch.inference_mode()
def test_average_pooling_leaves_the_class_token_out_of_the_mean_but_lets_it_attend() -> None:
    model = toy("avgpool", depth=1)
    before = model(images(), 0.5)
    model.cls_token.normal_()
    assert not torch.allclose(model(images(), 0.5), before)  # the patches attended to it
    nn.init.zeros_(model.blocks[0].attn.proj.weight)  # type: ignore[union-attr,arg-type]
    deaf = model(images(), 0.5)
    model.cls_token.normal_()
    torch.testing.assert_close(model(images(), 0.5), deaf)  # without attention it has no say


def test_the_softmax_scale_is_that_of_the_full_head() -> None:
    model = toy()
    assert [block.attn.scale for block in model.blocks] == [8**-0.5] * 2  # type: ignore[union-attr]
    for ratio in RATIOS:
        assert [block.scale for block in model.subnet(ratio).blocks] == [8**-0.5] * 2


def test_norms_use_the_configured_epsilon() -> None:
    assert {m.eps for m in toy().modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.eps for m in toy(layer_norm_eps=1e-6).subnet(0.5).modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


# -- widths


@pytest.mark.parametrize("ratio", [0.3, 0.6, 0.125])
def test_a_width_that_was_not_trained_is_refused_with_the_list(ratio: float) -> None:
    model = toy()
    for use in (lambda: model(images(), ratio), lambda: model.heads(images(), ratio), lambda: model.subnet(ratio)):
        with pytest.raises(ValueError, match=r"was not trained; trained widths: 0\.25, 0\.5, 0\.75, 1"):
            use()


def active_part(name: str, tensor: Tensor, ratio: float) -> Tensor:
    """A view of what a width may read of a parameter."""
    c, q, h = ACTIVE[ratio]
    if name in ("cls_token", "dist_token", "pos_embed"):
        return tensor[..., c]
    if name.startswith("head"):
        return tensor if name.endswith("bias") else tensor[:, c]
    rows = q if "qkv" in name else h if "fc1" in name else c
    if tensor.ndim != 2:
        return tensor[rows]
    return tensor[rows, h if "fc2" in name else c]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", RATIOS)
@torch.inference_mode()
def test_a_width_reads_all_of_its_channels_and_no_others(kind: str, ratio: float) -> None:
    model = toy(kind)
    before = model(images(), ratio)
    for name, tensor in model.state_dict().items():
        active = active_part(name, tensor, ratio)
        kept = active.clone()
        tensor.fill_(math.nan)
        active.copy_(kept)
        assert torch.equal(model(images(), ratio), before), f"{name} is read outside of its active channels"
    for name, tensor in model.state_dict().items():
        active = active_part(name, tensor, ratio)
        kept = active.clone()
        active.add_(torch.randn(active.shape))
        assert not torch.allclose(model(images(), ratio), before, atol=1e-6), f"{name} has no effect"
        active.copy_(kept)


# -- dense sub-networks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ratio", RATIOS)
@torch.inference_mode()
def test_the_dense_network_of_a_width_agrees_with_the_sliced_one(kind: str, ratio: float) -> None:
    model = toy(kind)
    dense = model.subnet(ratio)
    torch.testing.assert_close(dense(images()), model(images(), ratio), atol=1e-5, rtol=0)
    assert not dense.training
    for name, tensor in dense.state_dict().items():
        assert tensor.is_contiguous(), name
        assert tensor.dtype == torch.float32
    full = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert not full & {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}


def test_the_dense_network_has_the_models_precision_and_no_gradients() -> None:
    dense = toy().half().subnet(0.5)
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in dense.parameters())


# -- training


def test_dropped_paths_come_only_in_training_and_grow_with_depth() -> None:
    model = ScalaViT(ScalaConfig(**TOY | {"depth": 3}), drop_path=0.5)
    assert [float(block.drop.rate) for block in model.blocks] == [0.0, 0.25, 0.5]  # type: ignore[union-attr,arg-type]
    with torch.inference_mode():
        assert not torch.equal(model(images(), 1.0), model(images(), 1.0))
        assert torch.equal(model.eval()(images(), 1.0), model(images(), 1.0))


def test_the_ablation_makes_every_width_a_prefix() -> None:
    model = ScalaViT(ScalaConfig(**TOY, isolated_activation=False)).eval()
    dense = model.subnet(0.5)
    assert torch.equal(dense.cls_token, model.cls_token[..., :8])
    assert torch.equal(dense.state_dict()["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight[:24, :8])  # type: ignore[union-attr,index]
