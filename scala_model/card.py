"""The card of a checkpoint (``config.json``): what the network is, what it was measured to do, how it was made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from scala_model.config import ScalaConfig
from scala_model.cost import cost_of
from scala_model.preprocess import Preprocessing

FORMAT = 1
REQUIRED = (
    "format",
    "name",
    "architecture",
    "widths",
    "classes",
    "preprocessing",
    "evaluation",
    "training",
    "weights_sha256",
)


class CardError(ValueError):
    """The card lacks something, adds something, or contradicts itself."""


def config_from_card(card: Mapping[str, Any]) -> ScalaConfig:
    """The shape that a card describes. Raises CardError in one sentence for anything that does not fit."""
    if missing := [key for key in REQUIRED if key not in card]:
        raise CardError(f"lacks {', '.join(missing)}")
    if unknown := sorted(card.keys() - set(REQUIRED)):
        raise CardError(f"has unknown entries {', '.join(unknown)}")
    if card["format"] != FORMAT:
        raise CardError(f"is of format {card['format']!r}; this version reads format {FORMAT}")
    architecture = _known("architecture", card["architecture"], ScalaConfig)
    try:
        config = ScalaConfig(**architecture)
        preprocessing = preprocessing_from_card(card)
    except (TypeError, ValueError, OverflowError) as error:
        raise CardError(f"describes no possible network: {error}") from None
    if preprocessing.image_size != config.image_size:
        raise CardError(f"preprocesses to {preprocessing.image_size} px for a network of {config.image_size} px")
    _check_widths(card["widths"], config)
    _check_classes(card["classes"], config)
    _check_history(card)
    return config


def preprocessing_from_card(card: Mapping[str, Any]) -> Preprocessing:
    """How the network of a card wants its images. Raises ValueError for values that make no sense."""
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in _known("preprocessing", card["preprocessing"], Preprocessing).items()
    }
    return Preprocessing(**values)


def complete_card(config: ScalaConfig, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` with all that it leaves out. Raises CardError when it contradicts ``config``."""
    measured = {entry["width"]: entry for entry in given.get("widths", [])}
    if unknown := measured.keys() - {float(width) for width in config.widths}:
        raise CardError(f"card speaks of widths {sorted(unknown)}, which the network does not have")
    card: dict[str, Any] = {
        "format": FORMAT,
        "name": name,
        "architecture": asdict(config),
        "widths": [
            {
                "width": float(width),
                "accuracy": measured.get(float(width), {}).get("accuracy"),
                "accuracy_ci95": measured.get(float(width), {}).get("accuracy_ci95"),
                **asdict(cost_of(config, width)),
            }
            for width in config.widths
        ],
        "classes": [{"class_id": i, "id": str(i), "label": str(i)} for i in range(config.num_classes)],
        "preprocessing": asdict(Preprocessing(config.image_size)),
        "evaluation": None,
        "training": None,
        "weights_sha256": "",
    }
    computed = ("format", "name", "architecture", "widths")
    card |= {key: value for key, value in given.items() if key not in computed}
    config_from_card(card)
    return card


def render_readme(card: Mapping[str, Any]) -> str:
    """The card for people, in Markdown."""
    shape, evaluation = card["architecture"], card["evaluation"]
    rows = [
        f"| {entry['width']:g} | {_percent(entry)} | {entry['parameters'] / 1e6:.2f} M | {entry['macs'] / 1e6:.1f} M |"
        for entry in card["widths"]
    ]
    kind = "distilled" if shape["distilled"] else "plain"
    measured = (
        f"Top-1 accuracy on {evaluation['images']:,} images ({evaluation['dataset']}), with 95 % Wilson intervals."
        if evaluation
        else "**Accuracy has not been measured**; until it is, a wider network is assumed to be the better one."
    )
    lines = [
        f"# {card['name']}",
        "",
        f"A Scala slimmable Vision Transformer ({kind}): one set of weights, {len(card['widths'])} trained widths. "
        f"{shape['image_size']} px images, patch {shape['patch_size']}, {shape['embed_dim']} channels, depth "
        f"{shape['depth']}, {shape['num_heads']} heads, {shape['num_classes']} classes.",
        "",
        measured,
        "",
        "| width | top-1 | parameters | multiply-adds |",
        "|---|---|---|---|",
        *rows,
    ]
    if card["training"]:
        lines += ["", "## How it was trained", "", *(f"* {key}: {value}" for key, value in card["training"].items())]
    return "\n".join(lines) + "\n"


def _percent(entry: Mapping[str, Any]) -> str:
    if entry["accuracy"] is None:
        return "not measured"
    if entry["accuracy_ci95"] is None:
        return f"{100 * entry['accuracy']:.2f} %"
    low, high = entry["accuracy_ci95"]
    return f"{100 * entry['accuracy']:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


def _known(section: str, values: Any, of: type) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise CardError(f"{section} must be an object")
    spec = fields(of)
    if unknown := sorted(values.keys() - {field.name for field in spec}):
        raise CardError(f"{section} has unknown entries {', '.join(unknown)}")
    if missing := [f.name for f in spec if f.default is MISSING and f.name not in values]:
        raise CardError(f"{section} lacks {', '.join(missing)}")
    return values


def _check_widths(entries: Any, config: ScalaConfig) -> None:
    measured = {"accuracy", "accuracy_ci95"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and measured <= e.keys() for e in entries):
        raise CardError("widths must be a list of objects with width, accuracy and accuracy_ci95")
    listed, expected = [entry.get("width") for entry in entries], [float(width) for width in config.widths]
    if listed != expected:
        raise CardError(f"lists widths {listed}, its architecture has {expected}")
    for entry, width in zip(entries, config.widths, strict=True):
        given = {key: value for key, value in entry.items() if key not in measured | {"width"}}
        if given != (cost := asdict(cost_of(config, width))):
            raise CardError(f"says of width {width} {given}, its architecture gives {cost}")
        _check_measured(entry["accuracy"], entry["accuracy_ci95"])


def _check_measured(accuracy: Any, interval: Any) -> None:
    if accuracy is not None and not _is_fraction(accuracy):
        raise CardError(f"accuracy must be null or a fraction from 0 to 1; got {accuracy!r}")
    if interval is None:
        return
    pair = isinstance(interval, list | tuple) and len(interval) == 2 and all(map(_is_fraction, interval))
    if not pair or interval[0] > interval[1]:
        raise CardError(f"accuracy_ci95 must be null or two ascending fractions from 0 to 1; got {interval!r}")


def _is_fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1


def _check_classes(classes: Any, config: ScalaConfig) -> None:
    if not isinstance(classes, list) or len(classes) != config.num_classes:
        raise CardError(f"must list the {config.num_classes} classes of its architecture")
    for i, entry in enumerate(classes):
        if not isinstance(entry, dict) or not isinstance(entry.get("label"), str):
            raise CardError(f"class {i} must be an object with a label")
        if entry.get("class_id") != i or not isinstance(entry.get("id"), str):
            raise CardError(f"class {i} must have the class_id {i} and an id that is text")


def _check_history(card: Mapping[str, Any]) -> None:
    """What only people read, but what the README is made of."""
    if not isinstance(card["name"], str):
        raise CardError(f"name must be text; got {card['name']!r}")
    if card["training"] is not None and not isinstance(card["training"], dict):
        raise CardError("training must be null or an object")
    evaluation = card["evaluation"]
    if evaluation is not None and not (
        isinstance(evaluation, dict)
        and isinstance(evaluation.get("dataset"), str)
        and type(evaluation.get("images")) is int
    ):
        raise CardError("evaluation must be null or an object with a dataset and its number of images")
