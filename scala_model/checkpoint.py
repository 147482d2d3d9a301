"""A checkpoint is a folder: ``model.safetensors``, ``config.json`` (the card) and a README for people.

Once evaluated it also holds which images each width got right: see ``correctness``.

Reading needs no torch; nothing is ever unpickled. The card carries the SHA-256 of the weights, and reading is strict:
whatever does not fit ends in one ``CheckpointError`` that says what and where.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from scala_model.card import CardError, complete_card, config_from_card, preprocessing_from_card, render_readme
from scala_model.config import ScalaConfig
from scala_model.preprocess import Preprocessing

if TYPE_CHECKING:
    from scala_model.vit import ScalaViT

WEIGHTS, CARD, README, CORRECTNESS = "model.safetensors", "config.json", "README.md", "correctness.safetensors"
DEFAULT = "scala-xs-tiny-imagenet"


class CheckpointError(ValueError):
    """The folder is not a checkpoint of ours, or it is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds: the shape, the card as read, and the weights as they lie on disk (float32 or float16)."""

    config: ScalaConfig
    card: dict[str, Any]
    weights: Mapping[str, np.ndarray[Any, Any]]

    @property
    def preprocessing(self) -> Preprocessing:
        return preprocessing_from_card(self.card)


def default_checkpoint() -> Path:
    """The folder of the checkpoint that comes with the package."""
    package = Path(__file__).parent
    inside, beside = package / "checkpoints" / DEFAULT, package.parent / "checkpoints" / DEFAULT
    return inside if inside.is_dir() else beside


def read_checkpoint(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint without torch.

    Raises CheckpointError: a missing, unreadable or truncated file, a checksum that differs, a card that lacks or adds
    something, weights whose names or shapes are not those of the architecture.
    """
    folder = Path(folder)
    config, card = read_card(folder)
    data = _read_bytes(folder / WEIGHTS)
    digest = hashlib.sha256(data).hexdigest()
    if digest != card["weights_sha256"]:
        raise CheckpointError(
            f"{folder / WEIGHTS} is damaged or not the file that {CARD} describes: its SHA-256 is {digest[:12]}…, "
            f"the card says {str(card['weights_sha256'])[:12]}…; copy the checkpoint again"
        )
    try:
        weights = safetensors.numpy.load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, struct.error) as error:
        raise CheckpointError(f"{folder / WEIGHTS} is not a safetensors file that we can read: {error}") from None
    _check_weights(folder / WEIGHTS, weights, config)
    return Checkpoint(config, card, weights)


def read_card(folder: Path) -> tuple[ScalaConfig, dict[str, Any]]:
    """The shape and the card of a checkpoint, whose weights are not looked at.

    Raises CheckpointError: a missing or unreadable card, or one that lacks or adds something.
    """
    card = _read_json(folder / CARD)
    try:
        return config_from_card(card), card
    except CardError as error:
        raise CheckpointError(f"{folder / CARD}: {error}") from None


def load_checkpoint(folder: str | os.PathLike[str]) -> ScalaViT:
    """The network of a checkpoint: float32, evaluation mode, ``.card`` its config.json.

    Raises CheckpointError as ``read_checkpoint`` does.
    """
    return build_model(read_checkpoint(folder))


def build_model(checkpoint: Checkpoint) -> ScalaViT:
    """The network in float32 and evaluation mode from a checkpoint already read."""
    import torch

    from scala_model.vit import ScalaViT

    with torch.device("meta"):
        model = ScalaViT(checkpoint.config)
    weights = {name: torch.from_numpy(array.astype(np.float32)) for name, array in checkpoint.weights.items()}
    model.load_state_dict(weights, strict=True, assign=True)
    model.card = checkpoint.card
    return model.eval()


def save_checkpoint(folder: str | os.PathLike[str], model: ScalaViT, card: Mapping[str, Any] | None = None) -> None:
    """Write a model as a checkpoint, its weights in their own precision (``model.half()`` halves the file).

    What ``card`` (default: ``model.card``) leaves out is filled in: shape, cost of each width, numbered classes,
    default preprocessing, accuracy null. Each file is replaced as a whole, the card last; a correctness matrix, which
    told of the weights before, is removed. Raises ValueError when the card contradicts the model, or the weights are
    neither float32 nor float16.
    """
    folder = Path(folder)
    if unfit := {str(tensor.dtype) for tensor in model.state_dict().values()} - {"torch.float32", "torch.float16"}:
        raise ValueError(f"weights are saved as float32 or float16, not {', '.join(unfit)}: call model.float() first")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in model.state_dict().items()}
    data = safetensors.numpy.save(arrays)
    full = complete_card(model.config, folder.resolve().name, model.card if card is None else card)
    full["weights_sha256"] = hashlib.sha256(data).hexdigest()
    replace_file(folder / WEIGHTS, data)
    (folder / CORRECTNESS).unlink(missing_ok=True)
    write_card(folder, full)


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write ``config.json`` and the README made from it."""
    replace_file(folder / README, render_readme(card).encode())
    replace_file(folder / CARD, (json.dumps(card, indent=2, ensure_ascii=False) + "\n").encode())


def expected_shapes(config: ScalaConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the state dict, as DeiT and timm publish them."""
    dim, hidden, patch = config.embed_dim, config.hidden_dim, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, config.num_tokens, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    for i in range(config.depth):
        attention = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
        mlp = {"mlp.fc1": (hidden, dim), "mlp.fc2": (dim, hidden)}
        for name, shape in (attention | mlp).items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.weight": (dim,), f"blocks.{i}.{name}.bias": (dim,)}
    norm = "fc_norm" if config.global_pool == "avg" else "norm"
    shapes |= {f"{norm}.weight": (dim,), f"{norm}.bias": (dim,)}
    for head in ("head", "head_dist") if config.distilled else ("head",):
        shapes |= {f"{head}.weight": (config.num_classes, dim), f"{head}.bias": (config.num_classes,)}
    return shapes | ({"dist_token": (1, 1, dim)} if config.distilled else {})


def _check_weights(path: Path, weights: Mapping[str, np.ndarray[Any, Any]], config: ScalaConfig) -> None:
    shapes = expected_shapes(config)
    if missing := sorted(shapes.keys() - weights.keys()):
        raise CheckpointError(f"{path} lacks {', '.join(missing)}")
    if unexpected := sorted(weights.keys() - shapes.keys()):
        raise CheckpointError(f"{path} holds {', '.join(unexpected)}, which the architecture in {CARD} does not have")
    for name, array in weights.items():
        if array.shape != shapes[name]:
            raise CheckpointError(f"{path}: {name} has shape {array.shape}; the architecture needs {shapes[name]}")
        if array.dtype not in (np.float16, np.float32):
            raise CheckpointError(f"{path}: {name} is {array.dtype}; weights are float16 or float32")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        card = json.loads(_read_bytes(path))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise CheckpointError(f"{path} is not JSON of ours: it is nested too deeply") from None
    if not isinstance(card, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return card


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist: a checkpoint is a folder with {WEIGHTS} and {CARD}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that is at every moment either the old one or the new one, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
