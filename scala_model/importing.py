"""Published weights as a checkpoint of ours: the state dict of a Scala network, or of a plain ViT of DeiT or timm.

Parameter names are the same everywhere, so nothing is renamed. What tensors do not tell (heads, widths, the epsilon of
LayerNorm) comes from an option, from the arguments that training programs save along, or from a rule named here.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from scala_model.checkpoint import expected_shapes, save_checkpoint
from scala_model.config import ScalaConfig
from scala_model.preprocess import Preprocessing
from scala_model.vit import ScalaViT

Kind = Literal["scala", "vit"]
# The published Scala code declares 1e-6 but never passes it on to its norms; DeiT and timm do use 1e-6.
LAYER_NORM_EPS: dict[Kind, float] = {"scala": 1e-5, "vit": 1e-6}
WEIGHTS, AVERAGED = ("model", "state_dict"), ("model_ema", "state_dict_ema")  # as DeiT and as timm call them
WIDTH_ARGUMENTS = {"smallest": "smallest_ratio", "largest": "largest_ratio", "granularity": "granularity"}
# Ti, S, B and L of ViT and DeiT have heads of 64 channels; from H (1280 channels, heads of 80) on there is no rule.
HEAD_CHANNELS, MOST_CHANNELS = 64, 1024
# The tensors that tell the architecture, and how many axes each has.
TELLING_AXES = {"patch_embed.proj.weight": 4, "pos_embed": 3, "blocks.0.mlp.fc1.weight": 2, "head.weight": 2}
# What a network computes that has, or lacks, parameters of these names.
EXTRAS = {
    r"\bls[12]\.|gamma_[12]": "LayerScale",
    r"[qk]_norm\.": "normalised queries and keys",
    r"[qv]_bias": "queries and values with separate biases",
    r"rel_pos|relative_position": "relative positions",
    r"mlp\.(fc1_[gx]|w12|w3)\.": "a gated MLP (SwiGLU)",
    r"norm_pre\.": "a norm before the blocks",
    r"pre_logits\.": "a tanh layer before the head",
    r"reg_token": "register tokens",
    r"attn_pool\.": "attention pooling",
}
LACKS = {r"qkv\.bias": "attention without biases", r"cls_token": "no class token", r"^head\.weight": "no classifier"}


class WeightsError(ValueError):
    """The file, or what is asked of it, does not make a checkpoint of ours."""


@dataclass(frozen=True)
class Imported:
    """What was found. ``widths_from`` and ``num_heads_from`` say who told.

    ``resized_from`` is the file's own image size in pixels where another was asked for; ``ignored`` names what else it
    holds, such as the optimizer's state.
    """

    kind: Kind
    config: ScalaConfig
    widths_from: str
    num_heads_from: str
    resized_from: int | None
    ignored: tuple[str, ...]


def import_weights(
    source: Path,
    folder: Path,
    *,
    kind: Kind | None = None,
    smallest: float | None = None,
    largest: float | None = None,
    granularity: float | None = None,
    num_heads: int | None = None,
    image_size: int | None = None,
    ema: bool = False,
    labels: Path | None = None,
    crop_ratio: float = 0.875,
    mean: tuple[float, float, float] = Preprocessing.mean,
    std: tuple[float, float, float] = Preprocessing.std,
) -> Imported:
    """Turn ``source`` (``.safetensors``, or any file of ``torch.save``) into a checkpoint in a new or empty ``folder``.

    Options overrule what the file says. ``kind`` is ``scala`` if not given and the file or an option speaks of widths,
    else ``vit``, which has the one width 1.0. ``image_size`` (pixels) resizes the position embedding, ``ema`` takes the
    averaged weights, ``labels`` is a text file with a line ``label`` or ``id<TAB>label`` for each class; the rest goes
    into the card's preprocessing. Weights become float32, which holds float16 and bfloat16 exactly.

    Raises WeightsError, one sentence that starts with the file, for all that does not fit.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise WeightsError(f"{folder} exists already: name a folder that is new or empty")
    given = {"smallest": smallest, "largest": largest, "granularity": granularity}
    given_widths = {name: value for name, value in given.items() if value is not None}
    try:
        sha256 = _sha256(source)
        weights, args, ignored = _unwrap(_load(source), ema)
        shape = _shape(weights, source.stat().st_size)
        kind = kind or _kind(args, given_widths)
        widths, widths_from = _widths(kind, args, given_widths, shape.distilled)
        heads, num_heads_from = _num_heads(num_heads, args, shape.embed_dim)
        own = replace(shape, num_heads=heads, layer_norm_eps=LAYER_NORM_EPS[kind], **widths)
        config = own if image_size is None else _at_size(own, image_size)
        card: dict[str, Any] = {
            "preprocessing": asdict(Preprocessing(config.image_size, crop_ratio, mean, std)),
            "training": {"source": source.name, "source_sha256": sha256, "kind": kind, "ema": ema},
        }
        if labels is not None:
            card["classes"] = _classes(labels, config.num_classes)
        resized_from = None if config.image_size == own.image_size else own.image_size
        if resized_from is not None:
            card["training"]["position_embedding"] = f"resized from {resized_from} to {config.image_size} px"
        save_checkpoint(folder, _network(weights, config), card)
    except ValueError as error:
        raise WeightsError(f"{source}: {error}") from None
    return Imported(kind, config, widths_from, num_heads_from, resized_from, ignored)


# -- reading


def _sha256(source: Path) -> str:
    try:
        with source.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _load(source: Path) -> Mapping[str, Any]:
    """What the file holds: tensors, plain containers, and ``argparse.Namespace``, in which programs save arguments."""
    try:
        if source.suffix == ".safetensors":
            return safetensors.torch.load_file(source)
        with torch.serialization.safe_globals([argparse.Namespace]):
            contents = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a parser stumbles over
        found = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if found:
            raise ValueError(
                f"needs {found[1]} to be unpickled, which could run any code: ask its author for the state dict alone"
            ) from None
        expected = "a safetensors file" if source.suffix == ".safetensors" else "a file of torch.save"
        raise ValueError(f"is not {expected}, or it is damaged: download it again") from None
    if not isinstance(contents, dict) or not all(isinstance(key, str) for key in contents):
        raise ValueError("holds no state dict: save one with torch.save(model.state_dict(), ...)")
    return contents


def _unwrap(contents: Mapping[str, Any], ema: bool) -> tuple[dict[str, Tensor], Mapping[str, Any], tuple[str, ...]]:
    """Weights by name, the arguments of the program that trained them, and the names of all other entries."""
    entry = next((key for key in (AVERAGED if ema else WEIGHTS) if isinstance(contents.get(key), dict)), None)
    if ema and entry is None:
        raise ValueError(f"holds no averaged weights (an entry {' or '.join(AVERAGED)}): leave out --ema")
    state = contents if entry is None else contents[entry]
    if strays := [str(name) for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"holds no state dict, bare or as {' or '.join(WEIGHTS)}: {', '.join(strays)} is no tensor")
    weights = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): tensor.detach() for name, tensor in state.items()}
    if len(weights) < len(state):
        raise ValueError("holds parameters that differ only in a prefix (module., _orig_mod.): keep one of each")
    if entry is None:
        return weights, {}, ()
    args = contents.get("args")
    known = vars(args) if isinstance(args, argparse.Namespace) else args if isinstance(args, dict) else {}
    return weights, known, tuple(sorted(contents.keys() - {entry, "args"}))


# -- what the tensors tell


def _shape(weights: Mapping[str, Tensor], file_bytes: int) -> ScalaConfig:
    """The architecture, as of one head and one width, for tensors do not tell of more.

    Raises ValueError with all names that are missing or unexpected, and all tensors that are not what they should be.
    """
    if sum(tensor.numel() * tensor.element_size() for tensor in weights.values()) > file_bytes:
        raise ValueError("is damaged: its tensors claim to be larger than the whole file")  # one number, expanded
    shape = _outline(weights)
    names = expected_shapes(shape).keys()
    complaints = _strange_names(weights.keys(), names)
    complaints += [
        f"{name} {fault}" for name in sorted(names & weights.keys()) if (fault := _fault(name, weights[name]))
    ]
    if all(name in weights and weights[name].ndim == axes for name, axes in TELLING_AXES.items()):
        shape = _sized(shape, weights)
        for name, expected in expected_shapes(shape).items():
            if name in weights and weights[name].shape != expected:
                complaints.append(f"{name} has shape {tuple(weights[name].shape)} instead of {expected}")
        if (found := weights["pos_embed"].shape[1]) != shape.num_tokens:
            leading = shape.num_tokens - shape.num_patches
            complaints.append(f"its {found} positions are not {leading} for tokens and a square for patches")
    if complaints:
        raise ValueError(f"is not a network of ours: {'; '.join(complaints)}")
    return shape


def _strange_names(names: Set[str], expected: Set[str]) -> list[str]:
    missing, unexpected = sorted(expected - names), sorted(names - expected)
    complaints = [f"it lacks {', '.join(missing)}"] if missing else []
    complaints += [f"it has {', '.join(unexpected)}, unknown to our networks"] if unexpected else []
    reasons = [
        reason
        for strange, told_by in ((missing, LACKS), (unexpected, EXTRAS))
        for pattern, reason in told_by.items()
        if any(re.search(pattern, name) for name in strange)
    ]
    return complaints + ([f"it computes something else ({', '.join(reasons)})"] if reasons else [])


def _fault(name: str, tensor: Tensor) -> str | None:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        return f"is no plain tensor of floating-point numbers ({tensor.dtype})"
    if not tensor.float().isfinite().all():
        return "has values that are not finite"
    axes = TELLING_AXES.get(name, tensor.ndim)
    return None if tensor.ndim == axes else f"has {tensor.ndim} axes instead of {axes}"


def _outline(weights: Mapping[str, Tensor]) -> ScalaConfig:
    """What names alone tell: depth, pooling and the second head. Blocks are counted, for a number may be any."""
    distilled = any(name.startswith(("dist_token", "head_dist.")) for name in weights)
    pooled = not distilled and any(name.startswith("fc_norm.") for name in weights)
    blocks = {name.split(".")[1] for name in weights if name.startswith("blocks.")}
    return ScalaConfig(
        image_size=1,
        patch_size=1,
        embed_dim=1,
        depth=max(1, len(blocks)),
        num_heads=1,
        mlp_ratio=1.0,
        num_classes=1,
        smallest=1.0,
        largest=1.0,
        granularity=1.0,
        distilled=distilled,
        global_pool="avg" if pooled else "token",
    )


def _sized(outline: ScalaConfig, weights: Mapping[str, Tensor]) -> ScalaConfig:
    embed_dim, _, _, patch_size = weights["patch_embed.proj.weight"].shape
    hidden_dim, num_positions = weights["blocks.0.mlp.fc1.weight"].shape[0], weights["pos_embed"].shape[1]
    side = math.isqrt(max(1, num_positions - 1 - outline.distilled))
    mlp_ratio = hidden_dim / max(1, embed_dim)
    if int(embed_dim * mlp_ratio) < hidden_dim:  # 49 * (1 / 49) is less than 1
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    return replace(
        outline,
        image_size=side * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        mlp_ratio=mlp_ratio,
        num_classes=weights["head.weight"].shape[0],
    )


# -- what they do not tell


def _kind(args: Mapping[str, Any], given_widths: Mapping[str, float]) -> Kind:
    scala = given_widths or args.keys() & set(WIDTH_ARGUMENTS.values()) or str(args.get("model")).endswith("_scala")
    return "scala" if scala else "vit"


def _widths(
    kind: Kind, args: Mapping[str, Any], given: dict[str, float], distilled: bool
) -> tuple[dict[str, Any], str]:
    """The three numbers of ``ScalaConfig`` that list its widths, and who told."""
    if kind == "vit":
        if given:
            raise ValueError(
                "a plain ViT (--kind vit) has the one width 1.0: leave out --smallest, --largest, --granularity"
            )
        return {"smallest": 1.0, "largest": 1.0, "granularity": 1.0}, "its kind: a plain ViT has one width"
    said = {ours: args[name] for ours, name in WIDTH_ARGUMENTS.items() if type(args.get(name)) in (int, float)}
    if missing := [f"--{name}" for name in WIDTH_ARGUMENTS if name not in said | given]:
        raise ValueError(f"does not tell for which widths it was trained: give {', '.join(missing)}")
    if distilled and not given and (said["smallest"], said["largest"]) != (0.25, 1.0):
        # Its tokens, last norm and heads take their first channels at 0.25 and 1.0, whatever the bounds.
        raise ValueError(
            "was trained by the published program, which slices distilled networks in another way when their widths do "
            "not run from 0.25 to 1.0: give --smallest, --largest and --granularity if that program was corrected"
        )
    widths_from = "the file" if not given else "the options" if given.keys() == WIDTH_ARGUMENTS.keys() else "both"
    return {name: float(value) for name, value in (said | given).items()}, widths_from


def _num_heads(given: int | None, args: Mapping[str, Any], embed_dim: int) -> tuple[int, str]:
    if given is not None:
        return given, "the options"
    if type(said := args.get("num_heads")) is int:
        return said, "the file"
    if embed_dim % HEAD_CHANNELS or embed_dim > MOST_CHANNELS:
        raise ValueError(f"does not tell its number of heads, nor do its {embed_dim} channels: give --num-heads")
    return embed_dim // HEAD_CHANNELS, f"the rule of {HEAD_CHANNELS} channels a head"


def _classes(labels: Path, num_classes: int) -> list[dict[str, Any]]:
    try:
        lines = labels.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except OSError as error:
        raise ValueError(f"its labels {labels} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"its labels {labels} are not text in UTF-8") from None
    if len(lines) != num_classes:
        raise ValueError(f"has {num_classes} classes, but {labels} has {len(lines)} lines: give one label a line")
    classes = []
    for i, line in enumerate(lines):
        class_id, _, label = line.rpartition("\t")
        if not label.strip():
            raise ValueError(f"line {i + 1} of {labels} holds no label")
        classes.append({"class_id": i, "id": class_id.strip() or str(i), "label": label.strip()})
    return classes


# -- the network


def _at_size(config: ScalaConfig, image_size: int) -> ScalaConfig:
    if over := image_size % config.patch_size:
        below = image_size - over
        raise ValueError(
            f"has patches of {config.patch_size} px, of which {image_size} px is no multiple: give --image-size "
            f"{f'{below} or ' if below else ''}{below + config.patch_size}"
        )
    return replace(config, image_size=image_size)


def _network(weights: Mapping[str, Tensor], config: ScalaConfig) -> ScalaViT:
    with torch.device("meta"):
        model = ScalaViT(config)
    full = {name: tensor.float() for name, tensor in weights.items()}
    full["pos_embed"] = positions_at(full["pos_embed"], config)
    model.load_state_dict(full, strict=True, assign=True)
    return model


def positions_at(pos_embed_1TD: Tensor, config: ScalaConfig) -> Tensor:
    """Positions for the patches of another image size; those of the tokens in front stay as they are.

    Bicubic and antialiased, as in timm: when enlarging, torch's antialiased cubic keeps a linear ramp and its other one
    does not (by 0.05 of a step).
    """
    if pos_embed_1TD.shape[1] == config.num_tokens:
        return pos_embed_1TD
    leading, dim = config.num_tokens - config.num_patches, config.embed_dim
    old, new = math.isqrt(pos_embed_1TD.shape[1] - leading), math.isqrt(config.num_patches)
    grid_1DSS = pos_embed_1TD[:, leading:].reshape(1, old, old, dim).permute(0, 3, 1, 2)
    grid_1DSS = F.interpolate(grid_1DSS, (new, new), mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([pos_embed_1TD[:, :leading], grid_1DSS.flatten(2).transpose(1, 2)], dim=1)
