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
# What an evaluation tells of each width, null before it; a card may lack all but the first two.
MEASURED = ("accuracy", "accuracy_ci95", "accuracy_top5", "accuracy_top5_ci95", "calibration_error")


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
                **{key: measured.get(float(width), {}).get(key) for key in MEASURED},
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
        f"| {entry['width']:g} | {_percent(entry, 'accuracy')} | {_percent(entry, 'accuracy_top5')} "
        f"| {_percent(entry, 'calibration_error')} "
        f"| {entry['parameters'] / 1e6:.2f} M | {entry['macs'] / 1e6:.1f} M |"
        for entry in card["widths"]
    ]
    kind, count = "distilled" if shape["distilled"] else "plain", len(card["widths"])
    slimmable = f"A Scala slimmable Vision Transformer ({kind}): one set of weights, {count} trained widths"
    what = slimmable if count > 1 else f"A Vision Transformer ({kind}) of one width"
    measured = (
        f"Top-1 and top-5 accuracy on {evaluation['images']:,} images ({evaluation['dataset']}), with 95 % Wilson "
        "intervals. ECE is the expected calibration error: how far the confidence is from the accuracy, on average."
        if evaluation
        else "**Accuracy has not been measured**; until it is, a wider network is assumed to be the better one."
    )
    lines = [
        f"# {card['name']}",
        "",
        f"{what}. "
        f"{shape['image_size']} px images, patch {shape['patch_size']}, {shape['embed_dim']} channels, depth "
        f"{shape['depth']}, {shape['num_heads']} heads, {shape['num_classes']} classes.",
        "",
        measured,
        "",
        "| width | top-1 | top-5 | ECE | parameters | multiply-adds |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    if card["training"]:
        lines += ["", "## How it was trained", "", *(f"* {key}: {value}" for key, value in card["training"].items())]
    return "\n".join(lines) + "\n"


def _percent(entry: Mapping[str, Any], key: str) -> str:
    """A measured fraction in percent and, where the card has one, its interval."""
    value, interval = entry.get(key), entry.get(f"{key}_ci95")
    if value is None:
        return "not measured"
    if interval is None:
        return f"{100 * value:.2f} %"
    low, high = interval
    return f"{100 * value:.2f} % ({100 * low:.2f} to {100 * high:.2f})"


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
    required = {"accuracy", "accuracy_ci95"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and required <= e.keys() for e in entries):
        raise CardError("widths must be a list of objects with width, accuracy and accuracy_ci95")
    listed, expected = [entry.get("width") for entry in entries], [float(width) for width in config.widths]
    if listed != expected:
        raise CardError(f"lists widths {listed}, its architecture has {expected}")
    for entry, width in zip(entries, config.widths, strict=True):
        given = {key: value for key, value in entry.items() if key not in ("width", *MEASURED)}
        if given != (cost := asdict(cost_of(config, width))):
            raise CardError(f"says of width {width} {given}, its architecture gives {cost}")
        _check_measured(entry)


def _check_measured(entry: Mapping[str, Any]) -> None:
    for key in MEASURED:
        value, is_interval = entry.get(key), key.endswith("_ci95")
        if value is not None and not (_is_interval(value) if is_interval else _is_fraction(value)):
            wanted = "two ascending fractions" if is_interval else "a fraction"
            raise CardError(f"{key} must be null or {wanted} from 0 to 1; got {value!r}")


def _is_interval(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_fraction, value))
    return pair and bool(value[0] <= value[1])


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
