"""What decides a training run, as values; no torch here. The recipes themselves are the files in ``recipes/``.

A method is what the four networks of a step learn from. Scala is the sum of four parts; every baseline of the paper is
the same recipe with another method: ``without`` one part, ``us_net``, ``separate`` networks.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import runpy
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scala_model.config import ScalaConfig
from scala_model.width import Width


@dataclass(frozen=True)
class Objective:
    """The parts of Scale Coordination that are in the loss (Scala, section 3.2); all off: US-Net.

    ``sampling``: the two widths beside the ends are ``stable``, one of each half of the range; or independent draws,
    from all ``between`` the ends or from ``all`` trained widths, as in US-Net.
    ``progressive_transfer``: each network is taught by the next larger one of the step, rather than by the largest.
    ``noise_calibration``: the three smaller networks learn from the labels too.
    The fourth part, Isolated Activation, is a matter of the network: ``ScalaConfig.isolated_activation``.
    """

    sampling: Literal["stable", "between", "all"] = "stable"
    progressive_transfer: bool = True
    noise_calibration: bool = True

    def __post_init__(self) -> None:
        if self.sampling not in ("stable", "between", "all"):
            raise ValueError(f"sampling must be 'stable', 'between' or 'all'; got {self.sampling!r}")


@dataclass(frozen=True)
class Recipe:
    """``config.num_classes`` is a default: the data decides. Rates are per step, of the whole batch of all processes.

    ``resident_size`` is the side, in pixels, of the stored images that crops are taken from. Switched off by default:
    ``mixup`` and ``cutmix`` (the Beta distribution's parameter), ``rand_augment`` (magnitude, 0 to 10), ``erasing`` and
    ``drop_path`` (chances), ``ema_decay``, ``clip_grad_norm``. A processor that could only emulate the bfloat16 of
    ``autocast`` trains in float32.
    """

    config: ScalaConfig
    epochs: float
    largest_only_epochs: float
    batch_size: int
    learning_rate: float
    warmup_epochs: float
    objective: Objective = Objective()
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    min_crop_area: float = 0.35
    rand_augment: float | None = None
    erasing: float = 0.0
    drop_path: float = 0.0
    ema_decay: float | None = None
    clip_grad_norm: float | None = None
    resident_size: int = 64
    autocast: Literal["bfloat16", "float32"] = "bfloat16"
    compile: bool = False

    def __post_init__(self) -> None:
        _check_range(self, "epochs", above=0)
        _check_range(self, "batch_size", above=0)
        _check_range(self, "learning_rate", above=0)
        _check_range(self, "weight_decay", "mixup", "cutmix", least=0)
        _check_range(self, "label_smoothing", "drop_path", least=0, below=1)
        _check_range(self, "erasing", least=0, most=1)
        _check_range(self, "min_crop_area", above=0, most=1)
        _check_range(self, "largest_only_epochs", "warmup_epochs", least=0, below=self.epochs)
        _check_range(self, "resident_size", least=self.config.image_size)
        if self.rand_augment is not None:
            _check_range(self, "rand_augment", least=0, most=10)
        if self.ema_decay is not None:
            _check_range(self, "ema_decay", above=0, below=1)
        if self.clip_grad_norm is not None:
            _check_range(self, "clip_grad_norm", above=0)
        if self.autocast not in ("bfloat16", "float32"):
            raise ValueError(f"autocast must be 'bfloat16' or 'float32'; got {self.autocast!r}")


def _check_range(
    recipe: Recipe,
    *names: str,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
) -> None:
    bounds = {"above": above, "at least": least, "at most": most, "below": below}
    wanted = ", ".join(f"{word} {bound:g}" for word, bound in bounds.items() if math.isfinite(bound))
    for name in names:
        value = getattr(recipe, name)
        if not (above < value < below and least <= value <= most):
            raise ValueError(f"a recipe's {name} must be a finite number, {wanted}; got {value!r}")


def with_epochs(recipe: Recipe, epochs: float) -> Recipe:
    """The recipe in another length, its phases in proportion. Raises ValueError unless ``epochs`` is positive."""
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be a positive number; got {epochs}")
    scale = epochs / recipe.epochs
    return replace(
        recipe,
        epochs=epochs,
        largest_only_epochs=recipe.largest_only_epochs * scale,
        warmup_epochs=recipe.warmup_epochs * scale,
    )


# ---- methods: ``NAME:METHOD`` on the command line


def us_net(recipe: Recipe) -> Recipe:
    """US-Net (Yu & Huang 2019): prefix slices; largest, smallest and two random trained widths, taught by the largest.

    It has no phase of the largest network alone.
    """
    return replace(
        recipe,
        config=replace(recipe.config, isolated_activation=False),
        objective=Objective(sampling="all", progressive_transfer=False, noise_calibration=False),
        largest_only_epochs=0,
    )


def separate(recipe: Recipe, ratio: Width | float | str) -> Recipe:
    """Separate Training: an ordinary network, as wide as the given trained width of the recipe's, on its own.

    Raises ValueError for a width that the recipe does not train.
    """
    full = recipe.config
    channels = full.width(ratio).channels(full.embed_dim)
    config = replace(full, embed_dim=channels, smallest=1.0, largest=1.0)
    return replace(recipe, config=config, largest_only_epochs=0)


def without(recipe: Recipe, part: str) -> Recipe:
    """An ablation: Scala with one of its four parts switched off. Raises ValueError for any other part."""
    if part not in PARTS:
        raise ValueError(f"Scala has no part {part!r}; its parts are {', '.join(PARTS)}")
    if part == "isolated-activation":
        return replace(recipe, config=replace(recipe.config, isolated_activation=False))
    if part == "progressive-transfer":
        return replace(recipe, objective=replace(recipe.objective, progressive_transfer=False))
    if part == "stable-sampling":
        return replace(recipe, objective=replace(recipe.objective, sampling="between"))
    return replace(recipe, objective=replace(recipe.objective, noise_calibration=False))


PARTS = ("isolated-activation", "progressive-transfer", "stable-sampling", "noise-calibration")
METHODS = "us-net, separate-WIDTH, " + ", ".join(f"no-{part}" for part in PARTS)


# ---- by name


def names() -> list[str]:
    """The recipes that come with the package."""
    from scala_model.train import recipes

    found = [module.name.replace("_", "-") for module in pkgutil.iter_modules(recipes.__path__)]
    return sorted(found)


def find(name: str, start: ScalaConfig | None = None) -> Recipe:
    """A recipe by ``NAME``, ``NAME:METHOD`` or ``FILE.py``.

    A recipe's file defines ``RECIPE``, or ``recipe(config)`` where it wants the shape of the network that training
    starts from, ``start``. Raises ValueError, listing what there is, for an unknown name or method, and for a recipe
    that wants a network to start from where there is none.
    """
    base, _, method = name.partition(":") if not name.endswith(".py") else (name, "", "")
    recipe = _read(base, start)
    if not method:
        return recipe
    if method == "us-net":
        return us_net(recipe)
    if method.startswith("separate-"):
        return separate(recipe, method.removeprefix("separate-"))
    if method.startswith("no-") and method.removeprefix("no-") in PARTS:
        return without(recipe, method.removeprefix("no-"))
    raise ValueError(f"there is no method {method!r}; there are {METHODS}")


def _read(name: str, start: ScalaConfig | None) -> Recipe:
    if name.endswith(".py"):
        if not Path(name).is_file():
            raise ValueError(f"there is no recipe file {name}")
        content = _call(name, runpy.run_path, name)
    elif name in names():
        content = vars(importlib.import_module(f"scala_model.train.recipes.{name.replace('-', '_')}"))
    else:
        raise ValueError(
            f"there is no recipe {name!r}; there are {', '.join(names())}, or give a file that ends in .py"
        )
    build: Callable[[ScalaConfig], Recipe] | None = content.get("recipe")
    if build is not None and start is None:
        raise ValueError(f"the recipe {name} goes on from trained weights: name their checkpoint with --init DIR")
    recipe = content.get("RECIPE") if build is None or start is None else _call(name, build, start)
    if not isinstance(recipe, Recipe):
        raise ValueError(f"{name} defines no RECIPE = Recipe(...)")
    return recipe


def _call(name: str, code: Callable[..., Any], *arguments: object) -> Any:
    """Run what a recipe's file says; its mistakes are the user's."""
    try:
        return code(*arguments)
    except Exception as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
        place = f"{name}, line {lines[-1]}" if lines else name
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from None
