"""Published weights become a checkpoint that computes what they were published for, or one sentence says why not."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pickle
import struct
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from scala_model import ScalaConfig, load_checkpoint
from scala_model.checkpoint import expected_shapes, read_checkpoint
from scala_model.importing import Imported, WeightsError, import_weights
from scala_model.preprocess import Preprocessing

Weights = dict[str, Tensor]
TOY = ScalaConfig(
    image_size=12,
    patch_size=4,
    embed_dim=24,
    depth=2,
    num_heads=3,
    mlp_ratio=2.0,
    num_classes=5,
    smallest=0.25,
    largest=1.0,
    granularity=0.25,
)
PLAIN = replace(TOY, smallest=1.0, granularity=1.0, layer_norm_eps=1e-6)


def weights_of(config: ScalaConfig = TOY, seed: int = 0) -> Weights:
    """Random weights of a network, large enough for every one of them to matter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in expected_shapes(config).items()}


def scala_arguments(**other: Any) -> argparse.Namespace:
    """Some of what the published Scala program is called with."""
    said = {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25, "input_size": 12, "opt_betas": None}
    return argparse.Namespace(**({"model": "deit_small_distilled_patch16_224_scala"} | said | other))


def published(weights: Weights, args: argparse.Namespace | None = None) -> dict[str, Any]:
    """What the training programs of DeiT and Scala save."""
    momentum = torch.zeros(3)
    return {
        "model": OrderedDict(weights),
        "optimizer": {"state": {0: {"step": torch.tensor(7.0), "exp_avg": momentum}}, "param_groups": [{"lr": 1e-3}]},
        "lr_scheduler": {"base_values": [0.1], "_last": None},
        "epoch": 99,
        "scaler": {"scale": 65536.0, "growth_factor": 2.0},
        "args": args or scala_arguments(),
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "published.pth"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "imported"


def imported_from(contents: object, file: Path, **options: Any) -> Imported:
    torch.save(contents, file)
    return import_weights(file, file.parent / "imported", **options)


def refusal(file: Path, **options: Any) -> str:
    """The sentence with which a file is refused, nothing having been written."""
    folder = file.parent / "imported"
    with pytest.raises(WeightsError) as refused:
        import_weights(file, folder, **options)
    sentence = str(refused.value)
    assert sentence.startswith(str(file))
    assert "\n" not in sentence
    assert not folder.exists() or not any(folder.iterdir())
    return sentence


def refused(contents: object, file: Path, **options: Any) -> str:
    torch.save(contents, file)
    return refusal(file, **options)


def assert_same(folder: Path, weights: Weights) -> None:
    loaded = load_checkpoint(folder).state_dict()
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name


# -- computing what was published


class PlainViT(nn.Module):
    """A ViT of torch's own transformer layers, which share no code and no parameter names with ours."""

    def __init__(self, config: ScalaConfig, weights: Weights) -> None:
        super().__init__()
        self.config, self.weights = config, weights
        self.blocks = nn.ModuleList(self._block(f"blocks.{i}.") for i in range(config.depth))

    def _block(self, prefix: str) -> nn.TransformerEncoderLayer:
        dim, hidden, eps = self.config.embed_dim, self.config.hidden_dim, self.config.layer_norm_eps
        block = nn.TransformerEncoderLayer(
            dim, self.config.num_heads, hidden, 0.0, F.gelu, eps, batch_first=True, norm_first=True
        )
        renamed = {
            "norm1": "norm1.",
            "norm2": "norm2.",
            "attn.qkv": "self_attn.in_proj_",
            "attn.proj": "self_attn.out_proj.",
            "mlp.fc1": "linear1.",
            "mlp.fc2": "linear2.",
        }
        block.load_state_dict(
            {
                theirs + kind: self.weights[f"{prefix}{ours}.{kind}"]
                for ours, theirs in renamed.items()
                for kind in ("weight", "bias")
            }
        )
        return block

    def forward(self, images: Tensor) -> Tensor:
        w, size = self.weights, self.config.patch_size
        patches_BTP = F.unfold(images, size, stride=size).transpose(1, 2)
        x_BTC = F.linear(patches_BTP, w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"])
        tokens = [w[name].expand(len(images), -1, -1) for name in ("cls_token", "dist_token") if name in w]
        x_BTC = torch.cat([*tokens, x_BTC], 1) + w["pos_embed"]
        for block in self.blocks:
            x_BTC = block(x_BTC)
        x_BTC = F.layer_norm(
            x_BTC, (self.config.embed_dim,), w["norm.weight"], w["norm.bias"], self.config.layer_norm_eps
        )
        heads = [F.linear(x_BTC[:, 0], w["head.weight"], w["head.bias"])]
        if "head_dist.weight" in w:
            heads.append(F.linear(x_BTC[:, 1], w["head_dist.weight"], w["head_dist.bias"]))
        return torch.stack(heads).mean(0)


@pytest.mark.parametrize("distilled", [False, True])
def test_a_deit_file_gives_the_logits_of_a_plain_vit(file: Path, folder: Path, distilled: bool) -> None:
    config = replace(PLAIN, distilled=distilled)
    weights = {
        name: 1e-2 * tensor if "embed" in name or "token" in name else tensor
        for name, tensor in weights_of(config).items()
    }  # small activations, so that the epsilon of the first norm matters
    got = imported_from({"model": weights}, file, num_heads=3)
    assert (got.kind, got.config, got.ignored) == ("vit", config, ())
    images = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = PlainViT(config, weights).eval()(images)
        other_eps = PlainViT(replace(config, layer_norm_eps=1e-5), weights).eval()(images)
        ours = load_checkpoint(folder)(images, 1.0)
    assert (other_eps - expected).abs().max() > 1e-3
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["scala-plain-x13", "scala-distilled-x4", "scala-avgpool-x7"])
def test_a_scala_file_gives_the_published_logits_at_every_width(
    golden_dir: Path, file: Path, folder: Path, name: str
) -> None:
    with safe_open(golden_dir / f"{name}.safetensors", "pt") as golden:
        said, tensors = golden.metadata(), {key: golden.get_tensor(key) for key in golden.keys()}  # noqa: SIM118
    widths = {key: float(said[key]) for key in ("smallest_ratio", "largest_ratio", "granularity")}
    weights = {key.removeprefix("weights."): value for key, value in tensors.items() if key.startswith("weights.")}
    got = imported_from(published(weights, scala_arguments(**widths)), file, num_heads=int(said["num_heads"]))
    assert (got.kind, got.widths_from, got.num_heads_from) == ("scala", "the file", "the options")
    model = load_checkpoint(folder)
    expected = {key.removeprefix("logits."): value for key, value in tensors.items() if key.startswith("logits.")}
    assert expected.keys() == {str(width) for width in model.config.widths}
    with torch.inference_mode():
        for width, logits in expected.items():
            torch.testing.assert_close(model(tensors["input"], float(width)), logits, atol=1e-4, rtol=0)


# -- what a file says


def test_what_a_scala_file_says(file: Path, folder: Path) -> None:
    weights = weights_of()
    got = imported_from(published(weights), file, num_heads=3)
    assert got == Imported(
        kind="scala",
        config=TOY,
        widths_from="the file",
        num_heads_from="the options",
        resized_from=None,
        ignored=("epoch", "lr_scheduler", "optimizer", "scaler"),
    )
    assert_same(folder, weights)
    checkpoint = read_checkpoint(folder)
    assert checkpoint.preprocessing == Preprocessing(12, crop_ratio=0.875)
    assert [entry["accuracy"] for entry in checkpoint.card["widths"]] == [None] * 4
    assert checkpoint.card["evaluation"] is None
    assert checkpoint.card["training"] == {
        "source": "published.pth",
        "source_sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "kind": "scala",
        "ema": False,
    }
    assert str(file.parent) not in (folder / "config.json").read_text()
    assert [entry["label"] for entry in checkpoint.card["classes"]] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bare", [False, True])
def test_old_and_bare_files(file: Path, folder: Path, legacy: bool, bare: bool) -> None:
    weights = weights_of()
    contents = weights if bare else published(weights)
    torch.save(contents, file, _use_new_zipfile_serialization=not legacy)
    options: dict[str, Any] = {"smallest": 0.25, "largest": 1.0, "granularity": 0.25} if bare else {}
    got = import_weights(file, folder, num_heads=3, **options)
    assert (got.kind, got.config, got.widths_from) == ("scala", TOY, "the options" if bare else "the file")
    assert_same(folder, weights)


def test_safetensors_in_bfloat16(tmp_path: Path, folder: Path) -> None:
    weights = {name: tensor.bfloat16() for name, tensor in weights_of().items()}
    safetensors.torch.save_file(weights, tmp_path / "timm.safetensors", {"format": "pt"})
    assert import_weights(tmp_path / "timm.safetensors", folder, num_heads=3).config == PLAIN
    assert_same(folder, {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_become_float32(file: Path, folder: Path, dtype: torch.dtype) -> None:
    weights = {name: tensor.to(dtype) for name, tensor in weights_of().items()}
    imported_from({"state_dict": weights}, file, num_heads=3)
    assert_same(folder, {name: tensor.float() for name, tensor in weights.items()})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module.", "module._orig_mod."])
def test_prefixes_of_wrappers(file: Path, folder: Path, prefix: str) -> None:
    weights = weights_of()
    imported_from(published({prefix + name: tensor for name, tensor in weights.items()}), file, num_heads=3)
    assert_same(folder, weights)


def test_one_parameter_with_and_without_a_prefix(file: Path) -> None:
    weights = weights_of()
    assert "differ only in a prefix" in refused(weights | {"module.cls_token": weights["cls_token"]}, file)


@pytest.mark.parametrize(("raw", "ema"), [("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_averaged_weights_on_request(file: Path, folder: Path, raw: str, ema: str) -> None:
    weights, averaged = weights_of(seed=0), weights_of(seed=1)
    contents = {raw: weights, ema: averaged, "args": scala_arguments()}
    assert imported_from(contents, file, num_heads=3, ema=True).ignored == (raw,)
    assert_same(folder, averaged)
    assert read_checkpoint(folder).card["training"]["ema"] is True
    assert import_weights(file, file.parent / "raw", num_heads=3).ignored == (ema,)
    assert_same(file.parent / "raw", weights)


@pytest.mark.parametrize("contents", [published(weights_of()), weights_of(), {"model": {}, "model_ema": None}])
def test_no_averaged_weights(file: Path, contents: object) -> None:
    assert "holds no averaged weights (an entry model_ema or state_dict_ema): leave out --ema" in refused(
        contents, file, ema=True
    )


@pytest.mark.parametrize(
    ("embed_dim", "num_heads"),
    [(64, 1), (192, 3), (384, 6)],  # Touvron et al. 2021, table 1: deit-ti and deit-s
)
def test_heads_of_64_channels(file: Path, embed_dim: int, num_heads: int) -> None:
    weights = weights_of(replace(PLAIN, embed_dim=embed_dim, depth=1, num_heads=1))
    got = imported_from(weights, file)
    assert (got.config.num_heads, got.num_heads_from) == (num_heads, "the rule of 64 channels a head")


@pytest.mark.parametrize("embed_dim", [24, 1280])
def test_heads_that_no_rule_tells(file: Path, embed_dim: int) -> None:
    weights = weights_of(replace(PLAIN, embed_dim=embed_dim, depth=1, num_heads=1, mlp_ratio=1 / embed_dim))
    assert f"nor do its {embed_dim} channels: give --num-heads" in refused(weights, file)


def test_heads_that_the_file_tells(file: Path) -> None:
    got = imported_from(published(weights_of(), scala_arguments(num_heads=6)), file)
    assert (got.config.num_heads, got.num_heads_from) == (6, "the file")


@pytest.mark.parametrize("hidden", [1, 23, 49, 71])
def test_hidden_channels_are_met_exactly(file: Path, hidden: int) -> None:
    config = replace(PLAIN, embed_dim=49, num_heads=7, mlp_ratio=(hidden + 0.5) / 49)
    assert config.hidden_dim == hidden
    assert imported_from(weights_of(config), file, num_heads=7).config.hidden_dim == hidden


# -- kinds and widths


@pytest.mark.parametrize(
    "args",
    [
        scala_arguments(),
        argparse.Namespace(smallest_ratio=0.25, largest_ratio=1, granularity=0.25),
        {"smallest_ratio": 0.25, "largest_ratio": 1.0, "granularity": 0.25},
    ],
)
def test_arguments_tell_a_scala_network_and_its_widths(file: Path, args: Any) -> None:
    got = imported_from(published(weights_of(), args), file, num_heads=3)
    assert (got.kind, got.config) == ("scala", TOY)


@pytest.mark.parametrize(
    ("args", "options", "asked"),
    [
        (argparse.Namespace(model="deit_tiny_patch16_224_scala"), {}, "--smallest, --largest, --granularity"),
        (argparse.Namespace(smallest_ratio=0.25, largest_ratio=1.0), {}, "--granularity"),
        (
            argparse.Namespace(smallest_ratio=torch.ones(1), largest_ratio="1"),
            {"granularity": 0.25},
            "--smallest, --la",
        ),
        (argparse.Namespace(), {"smallest": 0.5}, "--largest, --granularity"),
        (argparse.Namespace(), {"kind": "scala"}, "--smallest, --largest, --granularity"),
    ],
)
def test_widths_that_nobody_tells(file: Path, args: argparse.Namespace, options: dict[str, Any], asked: str) -> None:
    sentence = refused(published(weights_of(), args), file, num_heads=3, **options)
    assert f"does not tell for which widths it was trained: give {asked}" in sentence


def test_options_overrule_the_file(file: Path) -> None:
    got = imported_from(published(weights_of()), file, num_heads=3, granularity=0.125)
    assert (got.config.granularity, got.widths_from) == (0.125, "both")
    got = import_weights(file, file.parent / "vit", num_heads=3, kind="vit")
    assert (got.kind, got.config) == ("vit", PLAIN)


def test_a_plain_vit_has_one_width(file: Path) -> None:
    contents = published(weights_of(), argparse.Namespace(model="deit_small_patch16_224"))
    assert "has the one width 1.0: leave out --smallest" in refused(contents, file, kind="vit", smallest=0.5)
    assert [float(width) for width in import_weights(file, file.parent / "vit", num_heads=3).config.widths] == [1.0]


@pytest.mark.parametrize("bounds", [(0.5, 1.0), (0.125, 1.0), (0.25, 0.75)])
def test_the_published_program_slices_distilled_networks_by_its_own_bounds(
    file: Path, bounds: tuple[float, float]
) -> None:
    weights = weights_of(replace(TOY, distilled=True))
    args = scala_arguments(smallest_ratio=bounds[0], largest_ratio=bounds[1], granularity=0.125)
    assert "do not run from 0.25 to 1.0" in refused(published(weights, args), file, num_heads=3)
    got = import_weights(file, file.parent / "forced", num_heads=3, smallest=0.5, largest=1.0, granularity=0.25)
    assert got.config.distilled


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "6 channels, which 5 heads cannot share evenly"),
        ({"num_heads": 0}, "num_heads must be a whole number from 1"),
        ({"smallest": 0.3}, "do not lead from 0.3 to 1.0"),
        ({"granularity": float("nan")}, "granularity must be a number"),
        ({"crop_ratio": 0.0}, "crop_ratio is 0.0: give a share above 0"),
        ({"std": (0.5, 0.5, 0.0)}, "std is (0.5, 0.5, 0.0): give three finite numbers"),
    ],
)
def test_options_that_make_no_sense(file: Path, options: dict[str, Any], words: str) -> None:
    assert words in refused(published(weights_of()), file, **({"num_heads": 3} | options))


# -- networks that compute something else


def test_all_that_does_not_fit_is_said_at_once(file: Path) -> None:
    weights = weights_of()
    for name in ("norm.bias", "blocks.1.attn.qkv.bias", "blocks.0.attn.qkv.bias"):
        del weights[name]
    weights |= {"blocks.0.ls1.gamma": torch.ones(24), "fc.weight": torch.ones(3)}
    weights["head.bias"] = torch.ones(6)
    weights["blocks.1.mlp.fc2.weight"] = torch.ones(24, 47)
    sentence = refused(weights, file)
    assert "lacks blocks.0.attn.qkv.bias, blocks.1.attn.qkv.bias, norm.bias;" in sentence
    assert "has blocks.0.ls1.gamma, fc.weight, unknown to our networks" in sentence
    assert "something else (attention without biases, LayerScale)" in sentence
    assert "head.bias has shape (6,) instead of (5,)" in sentence
    assert "blocks.1.mlp.fc2.weight has shape (24, 47) instead of (24, 48)" in sentence


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("blocks.0.ls1.gamma", "LayerScale"),
        ("blocks.0.gamma_1", "LayerScale"),
        ("blocks.0.attn.q_norm.weight", "normalised queries and keys"),
        ("blocks.0.attn.q_bias", "separate biases"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("blocks.0.mlp.fc1_g.weight", "SwiGLU"),
        ("reg_token", "register tokens"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("pre_logits.fc.weight", "a tanh layer before the head"),
        ("attn_pool.latent", "attention pooling"),
    ],
)
def test_a_network_of_another_kind_is_named(file: Path, name: str, words: str) -> None:
    sentence = refused(weights_of() | {name: torch.ones(24)}, file)
    assert f"it has {name}, unknown" in sentence
    assert words in sentence


def test_no_class_token(file: Path) -> None:
    weights = weights_of()
    del weights["cls_token"]
    weights["pos_embed"] = weights["pos_embed"][:, 1:].clone()
    sentence = refused(weights, file)
    assert "it lacks cls_token; it computes something else (no class token)" in sentence
    assert "its 9 positions are not 1 for tokens and a square for patches" in sentence


@pytest.mark.parametrize("name", ["head.weight", "patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight"])
def test_a_tensor_that_tells_the_shape_is_missing_or_flat(file: Path, name: str) -> None:
    weights = weights_of()
    assert f"{name} has 1 axes instead of" in refused(weights | {name: torch.ones(3)}, file)
    del weights[name]
    assert f"lacks {name}" in refused(weights, file)


def test_a_second_head_needs_its_token(file: Path) -> None:
    weights = weights_of(replace(TOY, distilled=True))
    del weights["dist_token"]
    assert "lacks dist_token" in refused(weights, file)


def test_a_gap_between_blocks(file: Path) -> None:
    weights = {name.replace("blocks.1.", "blocks.999999999."): tensor for name, tensor in weights_of().items()}
    sentence = refused(weights, file)
    assert "lacks blocks.1.attn.proj.bias" in sentence
    assert "has blocks.999999999.attn.proj.bias" in sentence


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(5, dtype=torch.int8), "head.bias is no plain tensor of floating-point numbers (torch.int8)"),
        (torch.ones(5).to_sparse(), "published.pth: "),  # torch 2.11 does not even read it
        (torch.ones(5, device="meta"), "head.bias is no plain tensor of floating-point numbers"),
        (torch.tensor([0, 0, float("nan"), 0, 0]), "head.bias has values that are not finite"),
        (torch.full((5,), 1e300, dtype=torch.float64), "head.bias has values that are not finite"),
        (torch.ones(1).expand(10**12), "its tensors claim to be larger than the whole file"),
    ],
)
def test_tensors_without_numbers_of_use(file: Path, tensor: Tensor, words: str) -> None:
    assert words in refused(weights_of() | {"head.bias": tensor}, file, num_heads=3)


# -- position embeddings


def test_positions_of_the_same_size_are_not_touched(file: Path, folder: Path) -> None:
    weights = weights_of()
    assert imported_from(weights, file, num_heads=3, image_size=12).resized_from is None
    assert_same(folder, weights)


@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize(("old", "new"), [(12, 20), (12, 24), (24, 12)])
def test_a_resized_ramp_is_a_ramp(file: Path, folder: Path, distilled: bool, old: int, new: int) -> None:
    config = replace(PLAIN, image_size=4 * old, distilled=distilled)
    weights = weights_of(config)
    leading = 1 + distilled
    rows, columns = torch.meshgrid(torch.arange(float(old)), torch.arange(float(old)), indexing="ij")
    ramps_TD = torch.stack([rows, columns] * 12, -1).reshape(old * old, 24)
    weights["pos_embed"][0, leading:] = ramps_TD
    got = imported_from(weights, file, num_heads=3, image_size=4 * new)
    assert (got.resized_from, got.config.image_size) == (4 * old, 4 * new)
    resized = load_checkpoint(folder).state_dict()
    assert torch.equal(resized["pos_embed"][:, :leading], weights["pos_embed"][:, :leading])
    grid_SSD = resized["pos_embed"][0, leading:].reshape(new, new, 24)
    ramp = (torch.arange(new) + 0.5) * old / new - 0.5  # centres of the new patches, measured in old ones
    middle = slice(4, -4)  # the border, where the filter sees the edge, is another matter
    torch.testing.assert_close(grid_SSD[middle, 4, 0], ramp[middle], atol=1e-4, rtol=0)
    torch.testing.assert_close(grid_SSD[4, middle, 1], ramp[middle], atol=1e-4, rtol=0)
    assert all(torch.equal(resized[name], weights[name]) for name in weights if name != "pos_embed")
    card = json.loads((folder / "config.json").read_text())
    assert card["preprocessing"]["image_size"] == 4 * new
    assert card["training"]["position_embedding"] == f"resized from {4 * old} to {4 * new} px"


def test_positions_grow_cubically(file: Path, folder: Path) -> None:
    weights = weights_of(replace(PLAIN, image_size=48))
    weights["pos_embed"][0, 1:] = (torch.arange(12.0)[:, None].expand(12, 12) ** 2).reshape(-1, 1)
    imported_from(weights, file, num_heads=3, image_size=96)
    grid_SSD = load_checkpoint(folder).state_dict()["pos_embed"][0, 1:].reshape(24, 24, 24)
    parabola = ((torch.arange(24) + 0.5) / 2 - 0.5) ** 2  # which straight lines between its points miss by 0.19
    torch.testing.assert_close(grid_SSD[4:-4, 4, 0], parabola[4:-4], atol=1e-3, rtol=0)


def test_positions_shrink_without_aliasing(file: Path, folder: Path) -> None:
    weights = weights_of(replace(PLAIN, image_size=96))
    chequered_SS = (-1.0) ** (torch.arange(24)[:, None] + torch.arange(24))
    weights["pos_embed"][0, 1:] = chequered_SS.reshape(-1, 1)
    imported_from(weights, file, num_heads=3, image_size=32)
    assert load_checkpoint(folder).state_dict()["pos_embed"][0, 1:].abs().max() < 0.1  # every third point is 1 or -1


@pytest.mark.parametrize(
    ("image_size", "words"),
    [
        (18, "give --image-size 16 or 20"),
        (3, "give --image-size 4"),
        (0, "image_size must be"),
        (-4, "image_size must"),
    ],
)
def test_sizes_that_patches_do_not_fill(file: Path, image_size: int, words: str) -> None:
    assert words in refused(weights_of(), file, num_heads=3, image_size=image_size)


def test_positions_that_are_no_square(file: Path) -> None:
    sentence = refused(weights_of() | {"pos_embed": torch.ones(1, 9, 24)}, file)
    assert "its 9 positions are not 1 for tokens and a square for patches" in sentence


# -- the card


def test_labels_and_preprocessing(file: Path, folder: Path) -> None:
    labels = file.with_name("labels.txt")
    labels.write_text("n01\tżaba, frog\nfish\nn03\t猫\nsnow leopard\n n05 \t owl \n", encoding="utf-8")
    half = (0.5, 0.5, 0.5)
    imported_from(weights_of(), file, num_heads=3, labels=labels, crop_ratio=0.9, mean=half, std=half)
    checkpoint = read_checkpoint(folder)
    assert [(entry["id"], entry["label"]) for entry in checkpoint.card["classes"]] == [
        ("n01", "żaba, frog"),
        ("1", "fish"),
        ("n03", "猫"),
        ("3", "snow leopard"),
        ("n05", "owl"),
    ]
    assert checkpoint.preprocessing == Preprocessing(12, crop_ratio=0.9, mean=half, std=half)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a\nb\nc\nd\n", "has 5 classes, but"),
        (b"a\nb\nc\nd\ne\nf", "labels.txt has 6 lines: give one label a line"),
        (b"", "labels.txt has 1 lines"),
        (b"a\nb\n\nd\ne\n", "line 3 of"),
        (b"a\nb\nc\nd\nn5\t", "line 5 of"),
        (b"\xff\xfea", "are not text in UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_labels_that_do_not_fit(file: Path, content: bytes | None, words: str) -> None:
    labels = file.with_name("labels.txt")
    if content is not None:
        labels.write_bytes(content)
    assert words in refused(weights_of(), file, num_heads=3, labels=labels)


def test_nothing_is_overwritten(file: Path, folder: Path) -> None:
    folder.mkdir()
    imported_from(weights_of(), file, num_heads=3)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(WeightsError, match="exists already: name a folder that is new or empty"):
        imported_from(weights_of(seed=1), file, num_heads=3)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.raises(WeightsError, match="exists already"):
        import_weights(file, file, num_heads=3)


# -- files that hold something else, or harm


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch exploded",)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("entry", ["model", "args", "optimizer"])
def test_a_pickle_is_never_run(file: Path, monkeypatch: pytest.MonkeyPatch, entry: str, legacy: bool) -> None:
    monkeypatch.chdir(file.parent)
    torch.save(published(weights_of()) | {entry: Bomb()}, file, _use_new_zipfile_serialization=not legacy)
    assert "needs posix.system to be unpickled, which could run any code" in refusal(file, num_heads=3)
    file.write_bytes(pickle.dumps(Bomb()))
    refusal(file)
    assert not (file.parent / "exploded").exists()


def test_no_other_class_is_unpickled_and_the_permission_ends(file: Path) -> None:
    sentence = refused(published(weights_of()) | {"output_dir": Path("runs")}, file, num_heads=3)
    assert "needs pathlib" in sentence
    imported_from(published(weights_of()), file, num_heads=3)
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(file, weights_only=True)


@pytest.mark.parametrize(
    "contents",
    [
        {},
        [],
        3,
        torch.ones(3),
        {1: torch.ones(3)},
        {"epoch": 3, "optimizer": {}},
        {"model": {}},
        {"model": {"cls_token": 3}},
        {"model": {1: torch.ones(3)}},
        {"model": torch.ones(3)},
        {"model_ema": weights_of()},
    ],
)
def test_a_file_without_a_state_dict(file: Path, contents: object) -> None:
    sentence = refused(contents, file)
    assert "holds no state dict" in sentence or "is not a network of ours" in sentence


@pytest.mark.parametrize("keep", [0, 1, 8, 100, 0.3, 0.9, -1])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_a_truncated_file(tmp_path: Path, kind: str, keep: float) -> None:
    file = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pth")
    if kind == "safetensors":
        safetensors.torch.save_file(weights_of(), file)
    else:
        torch.save(published(weights_of()), file, _use_new_zipfile_serialization=kind == "zip")
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    assert "or it is damaged: download it again" in refusal(file, num_heads=3)


@pytest.mark.parametrize(
    "data",
    [
        b"<html>Not found</html>",
        b"PK\x03\x04" + bytes(100),
        b"\x80\x02" + bytes(100),
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2) + b"{}" + bytes(8),
        struct.pack("<Q", 90_000_000) + b"{" * 1000,
        json.dumps({"model": 3}).encode(),
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
def test_a_file_of_another_kind(tmp_path: Path, suffix: str, data: bytes) -> None:
    file = tmp_path / f"other{suffix}"
    file.write_bytes(data)
    kind = "a safetensors file" if suffix == ".safetensors" else "a file of torch.save"
    assert f"is not {kind}, or it is damaged" in refusal(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "cannot be read: No such file or directory" in refusal(tmp_path / "nowhere.pth")
    (tmp_path / "folder.pth").mkdir()
    assert "cannot be read: Is a directory" in refusal(tmp_path / "folder.pth")
