"""Recipes by name and file, and the baselines that are made of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scala_model.config import variant
from scala_model.preprocess import Preprocessing
from scala_model.train.recipe import PARTS, Objective, find, names, separate, us_net, with_epochs, without

S = "scala-s-tiny-imagenet"


@pytest.mark.parametrize("name", names())
def test_every_recipe_can_be_run(name: str) -> None:
    recipe = find(name, find("scala-xs-tiny-imagenet").config)
    assert Preprocessing(recipe.resident_size).image_size >= recipe.config.image_size
    assert recipe.largest_only_epochs < recipe.epochs
    assert recipe.warmup_epochs < recipe.epochs
    assert recipe.objective == Objective("stable", True, True)
    assert recipe.config.isolated_activation


def test_every_recipe_file_is_found_and_tells_its_command() -> None:
    assert names() == sorted(names())
    assert {"fine-tune", "scala-s-imagenet", S, "scala-xs-tiny-imagenet", "toy"} <= set(names())
    folder = Path(__file__).parents[2] / "scala_model" / "train" / "recipes"
    for name in names():
        assert f"train {name}" in (folder / f"{name.replace('-', '_')}.py").read_text()


def test_the_papers_recipe_has_the_papers_values() -> None:
    """DeiT-S, 100 epochs of batch 1024: lr 2e-3 x 1024 / 512; the table of the method's training section."""
    recipe = find("scala-s-imagenet")
    assert recipe.config == variant("deit-s", image_size=224, patch_size=16, num_classes=1000, granularity=0.125)
    assert (recipe.epochs, recipe.largest_only_epochs, recipe.warmup_epochs) == (100, 10, 3)
    assert (recipe.batch_size, recipe.learning_rate, recipe.weight_decay) == (1024, 4e-3, 0.05)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    assert (recipe.rand_augment, recipe.erasing, recipe.drop_path) == (1, 0.25, 0.1)
    assert (recipe.clip_grad_norm, recipe.ema_decay) == (None, 0.99996)
    distilled = find("scala-s-distilled-imagenet")
    assert distilled == replace(recipe, config=replace(recipe.config, distilled=True))


# -- baselines


def test_us_net_has_none_of_the_four_parts() -> None:
    recipe = us_net(find(S))
    assert not recipe.config.isolated_activation
    assert recipe.objective == Objective("all", False, False)
    assert recipe.largest_only_epochs == 0
    assert replace(recipe, config=find(S).config, objective=Objective(), largest_only_epochs=10) == find(S)


@pytest.mark.parametrize("part", PARTS)
def test_an_ablation_lacks_one_part_alone(part: str) -> None:
    recipe, whole = without(find(S), part), find(S)
    parts = {
        "isolated-activation": recipe.config.isolated_activation,
        "progressive-transfer": recipe.objective.progressive_transfer,
        "stable-sampling": recipe.objective.sampling == "stable",
        "noise-calibration": recipe.objective.noise_calibration,
    }
    assert parts == {name: name != part for name in PARTS}
    assert recipe.objective.sampling in ("stable", "between")  # of all widths between the ends
    assert replace(recipe, config=whole.config, objective=whole.objective) == whole


def test_a_separate_network_is_an_ordinary_one_as_wide_as_the_sub_network() -> None:
    recipe = separate(find(S), 0.25)
    assert recipe.config.embed_dim == 96
    assert recipe.config.hidden_dim == 384
    assert [float(width) for width in recipe.config.widths] == [1.0]
    assert (recipe.config.num_heads, recipe.config.depth) == (6, 12)
    assert recipe.largest_only_epochs == 0
    assert separate(find(S), 1.0).config.embed_dim == 384
    with pytest.raises(ValueError, match=r"width 0.3 was not trained; trained widths: 0.25, 0.375"):
        separate(find(S), 0.3)


def test_methods_by_name() -> None:
    recipe = find(S)
    assert find(f"{S}:us-net") == us_net(recipe)
    assert find(f"{S}:separate-0.5") == separate(recipe, 0.5)
    for part in PARTS:
        assert find(f"{S}:no-{part}") == without(recipe, part)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scala-m", r"there is no recipe 'scala-m'; there are fine-tune, .*toy, or give a file that ends in \.py"),
        (f"{S}:usnet", r"there is no method 'usnet'; there are us-net, separate-WIDTH, no-isolated-activation"),
        (f"{S}:no-isolation", r"there is no method 'no-isolation'"),
        (f"{S}:separate-wide", r"a width is a number in \(0, 1\], such as 0.5; got 'wide'"),
        ("nowhere/mine.py", r"there is no recipe file nowhere/mine\.py"),
        ("fine-tune", r"fine-tune goes on from trained weights: name their checkpoint with --init DIR"),
    ],
)
def test_what_there_is_not(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find(name)
    with pytest.raises(ValueError, match="Scala has no part 'isolation'; its parts are isolated-activation"):
        without(find(S), "isolation")


# -- files, lengths, networks to start from


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from scala_model.train.recipe import find\n"
        "RECIPE = replace(find('toy'), learning_rate=0.5)\n"
    )
    assert find(str(path)) == replace(find("toy"), learning_rate=0.5)
    path.write_text("RECIPE = 1\n")
    with pytest.raises(ValueError, match=r"mine\.py defines no RECIPE = Recipe"):
        find(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("RECIPE = (\n", r"mine\.py: SyntaxError: .*never closed"),
        ("\nimport nonsense\n", r"mine\.py, line 2: ModuleNotFoundError: No module named 'nonsense'"),
        (
            "from dataclasses import replace\nfrom scala_model.train.recipe import find\n"
            "RECIPE = replace(find('toy'),\n  learning_rat=1)\n",
            r"mine\.py, line 3: TypeError: .*learning_rat",
        ),
        ("def recipe(config):\n    return config.wdths\n", r"mine\.py, line 2: AttributeError: .*wdths"),
    ],
)
def test_a_mistake_in_a_file_of_ones_own(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        find(str(path), find("toy").config)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("epochs", 0, "above 0"),
        ("batch_size", 0, "above 0"),
        ("learning_rate", -1e-3, "above 0"),
        ("learning_rate", float("nan"), "above 0"),
        ("label_smoothing", 3, "at least 0, below 1"),
        ("drop_path", 1.0, "at least 0, below 1"),
        ("mixup", -0.1, "at least 0"),
        ("erasing", 1.5, "at least 0, at most 1"),
        ("min_crop_area", 0, "above 0, at most 1"),
        ("largest_only_epochs", 20, "at least 0, below 20"),
        ("warmup_epochs", 50, "at least 0, below 20"),
        ("resident_size", 31, "at least 32"),
        ("rand_augment", 20, "at least 0, at most 10"),
        ("ema_decay", 2.0, "above 0, below 1"),
        ("clip_grad_norm", 0, "above 0"),
    ],
)
def test_values_that_make_no_sense(field: str, value: float, wanted: str) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=f"a recipe's {field} must be a finite number, {wanted}.*; got {value!r}"):
        replace(find("toy"), **changes)
    with pytest.raises(ValueError, match="autocast must be 'bfloat16' or 'float32'; got 'float16'"):
        replace(find("toy"), autocast="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="sampling must be 'stable', 'between' or 'all'; got 'uniform'"):
        Objective(sampling="uniform")  # type: ignore[arg-type]


def test_fine_tuning_takes_the_shape_of_the_network_it_starts_from() -> None:
    config = variant("deit-ti", image_size=224, patch_size=16, num_classes=7)
    recipe = find("fine-tune", config)
    assert recipe.config == config
    assert recipe.largest_only_epochs == 0
    assert recipe.resident_size == 256


def test_another_length_keeps_the_phases_proportions() -> None:
    recipe = with_epochs(find(S), 30)
    assert (recipe.epochs, recipe.largest_only_epochs, recipe.warmup_epochs) == pytest.approx((30, 3, 0.9))
    assert replace(recipe, epochs=100, largest_only_epochs=10, warmup_epochs=3) == find(S)
    for epochs in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="epochs must be a positive number; got"):
            with_epochs(find(S), epochs)
