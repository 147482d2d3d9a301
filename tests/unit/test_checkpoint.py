"""A checkpoint comes back as it was saved, and every damage ends in one sentence that names the file."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from scala_model import ScalaConfig, ScalaViT, load_checkpoint, save_checkpoint
from scala_model.card import render_readme
from scala_model.checkpoint import CheckpointError, expected_shapes, read_checkpoint, write_card
from scala_model.correctness import Correctness, read_correctness, write_correctness
from scala_model.preprocess import Preprocessing

KINDS: dict[str, dict[str, Any]] = {"plain": {}, "distilled": {"distilled": True}, "avgpool": {"global_pool": "avg"}}
Weights = dict[str, np.ndarray[Any, Any]]


def toy(kind: str = "plain") -> ScalaViT:
    torch.manual_seed(3)
    config = ScalaConfig(
        image_size=8,
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=3,
        smallest=0.5,
        largest=1.0,
        granularity=0.25,
        **KINDS[kind],
    )
    return ScalaViT(config)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    save_checkpoint(folder, toy())
    return folder


def refusal(folder: Path) -> str:
    """The sentence with which the checkpoint is refused, by both ways to read it."""
    with pytest.raises(CheckpointError) as refused:
        read_checkpoint(folder)
    with pytest.raises(CheckpointError):
        load_checkpoint(folder)
    sentence = str(refused.value)
    assert sentence.startswith(str(folder))
    assert "\n" not in sentence
    return sentence


def tamper(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    card = json.loads((folder / "config.json").read_text())
    change(card)
    (folder / "config.json").write_text(json.dumps(card))


def replace_weights(folder: Path, data: bytes) -> None:
    """Other bytes, with the card telling their checksum: not noticed until they are parsed."""
    (folder / "model.safetensors").write_bytes(data)
    tamper(folder, lambda card: card.update(weights_sha256=hashlib.sha256(data).hexdigest()))


def weights_of(folder: Path) -> Weights:
    return safetensors.numpy.load_file(folder / "model.safetensors")


# -- round trips


@pytest.mark.parametrize("kind", KINDS)
def test_float32_comes_back_exactly(tmp_path: Path, kind: str) -> None:
    model = toy(kind)
    save_checkpoint(tmp_path / "toy", model)
    loaded = load_checkpoint(tmp_path / "toy")
    assert loaded.config == model.config
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_half_is_half_the_file_and_comes_back_as_float32(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "full", toy())
    save_checkpoint(tmp_path / "half", toy().half())
    assert {array.dtype for array in read_checkpoint(tmp_path / "half").weights.values()} == {np.dtype(np.float16)}
    tensor_bytes = [sum(array.nbytes for array in weights_of(tmp_path / name).values()) for name in ("full", "half")]
    assert tensor_bytes[0] == 2 * tensor_bytes[1]
    loaded = load_checkpoint(tmp_path / "half").state_dict()
    for name, tensor in toy().half().state_dict().items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], tensor.float()), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_expected_shapes_are_those_of_the_network(kind: str) -> None:
    model = toy(kind)
    assert expected_shapes(model.config) == {name: tuple(t.shape) for name, t in model.state_dict().items()}


def test_what_the_card_leaves_out_is_filled_in(saved: Path) -> None:
    card = read_checkpoint(saved).card
    assert card["name"] == "toy"
    assert [entry["width"] for entry in card["widths"]] == [0.5, 0.75, 1.0]
    for key in ("accuracy", "accuracy_ci95", "accuracy_top5", "accuracy_top5_ci95", "calibration_error"):
        assert [entry[key] for entry in card["widths"]] == [None, None, None]
    assert card["classes"][2] == {"class_id": 2, "id": "2", "label": "2"}
    assert card["evaluation"] is None
    assert read_checkpoint(saved).preprocessing == Preprocessing(8)
    assert card["weights_sha256"] == hashlib.sha256((saved / "model.safetensors").read_bytes()).hexdigest()


def test_what_the_card_tells_is_kept_through_saving_again(tmp_path: Path) -> None:
    told = {
        "classes": [{"class_id": i, "id": f"n{i}", "label": name} for i, name in enumerate(("fish", "Żaba", "猫"))],
        "preprocessing": {"image_size": 8, "crop_ratio": 0.875},
        "widths": [{"width": 0.75, "accuracy": 0.5, "accuracy_ci95": [0.4, 0.6]}],
        "evaluation": {"dataset": "toys", "images": 10},
        "training": {"recipe": "by hand"},
    }
    save_checkpoint(tmp_path / "first", toy(), told)
    loaded = load_checkpoint(tmp_path / "first")
    save_checkpoint(tmp_path / "second", loaded)
    card = read_checkpoint(tmp_path / "second").card
    assert card | {"name": "first"} == loaded.card
    assert card["name"] == "second"
    for key in ("classes", "preprocessing", "evaluation", "training"):
        assert card[key] == told[key]
    assert [entry["accuracy"] for entry in card["widths"]] == [None, 0.5, None]
    assert read_checkpoint(tmp_path / "second").preprocessing == Preprocessing(8, crop_ratio=0.875)


def test_the_readme_tells_people_the_accuracies(tmp_path: Path, saved: Path) -> None:
    assert "Accuracy has not been measured" in (saved / "README.md").read_text(encoding="utf-8")
    card = copy.deepcopy(read_checkpoint(saved).card)
    card["widths"][0] |= {"accuracy": 0.4567, "accuracy_ci95": [0.4469, 0.4665]}
    card["widths"][0] |= {"accuracy_top5": 0.7113, "accuracy_top5_ci95": [0.7023, 0.7201], "calibration_error": 0.0349}
    card["evaluation"] = {"dataset": "toys val", "images": 10000}
    card["training"] = {"epochs": 7}
    write_card(saved, card)
    readme = (saved / "README.md").read_text(encoding="utf-8")
    assert readme == render_readme(card)
    for words in ("# toy", "45.67 % (44.69 to 46.65)", "10,000 images (toys val)", "not measured", "* epochs: 7"):
        assert words in readme
    titles, _, narrowest, *_ = (line for line in readme.splitlines() if line.startswith("|"))
    assert titles.split(" | ") == ["| width", "top-1", "top-5", "ECE", "parameters", "multiply-adds |"]
    assert narrowest.split(" | ")[:4] == ["| 0.5", "45.67 % (44.69 to 46.65)", "71.13 % (70.23 to 72.01)", "3.49 %"]
    assert read_checkpoint(saved).card == card


def test_a_card_from_before_top_5_was_measured(saved: Path) -> None:
    def forget(card: dict[str, Any]) -> None:
        for entry in card["widths"]:
            for key in ("accuracy_top5", "accuracy_top5_ci95", "calibration_error"):
                del entry[key]
        card["widths"][0] |= {"accuracy": 0.4567, "accuracy_ci95": [0.4469, 0.4665]}

    tamper(saved, forget)
    card = read_checkpoint(saved).card
    assert "accuracy_top5" not in card["widths"][0]
    assert "| 0.5 | 45.67 % (44.69 to 46.65) | not measured | not measured |" in render_readme(card)
    save_checkpoint(saved, load_checkpoint(saved))
    assert [entry["calibration_error"] for entry in read_checkpoint(saved).card["widths"]] == [None, None, None]


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ({"widths": [{"width": 0.6, "accuracy": 0.5, "accuracy_ci95": None}]}, "does not have"),
        ({"classes": []}, "3 classes"),
        ({"preprocessing": {"image_size": 16}}, "preprocesses to 16 px for a network of 8 px"),
        ({"colour": "red"}, "unknown entries colour"),
    ],
)
def test_a_card_that_contradicts_the_model_is_refused_and_nothing_written(
    tmp_path: Path, card: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        save_checkpoint(tmp_path / "toy", toy(), card)
    assert not list(tmp_path.glob("toy/*"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_precision_that_could_not_be_read_is_not_written(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"float32 or float16, not torch\.\w+: call model\.float\(\) first"):
        save_checkpoint(tmp_path / "toy", toy().to(dtype))
    assert not list(tmp_path.iterdir())


# -- damaged weights


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_missing_file(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert f"{name} does not exist" in refusal(saved)


def test_no_folder(tmp_path: Path) -> None:
    assert "config.json does not exist: a checkpoint is a folder with" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_folder_in_the_files_place(saved: Path, name: str) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    assert f"{name} cannot be read" in refusal(saved)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 9, 0.25, 0.5, 0.99, -1])
def test_truncated_weights(saved: Path, keep: float) -> None:
    data = (saved / "model.safetensors").read_bytes()
    cut = data[: int(keep * len(data)) if isinstance(keep, float) else keep]
    (saved / "model.safetensors").write_bytes(cut)
    assert "model.safetensors is damaged" in refusal(saved)
    replace_weights(saved, cut)
    assert "model.safetensors is not a safetensors file" in refusal(saved)


@pytest.mark.parametrize("place", [0, 5, 8, 100, 0.5, -1])
def test_a_flipped_bit(saved: Path, place: float) -> None:
    data = bytearray((saved / "model.safetensors").read_bytes())
    data[int(place * len(data)) if isinstance(place, float) else place] ^= 0x10
    (saved / "model.safetensors").write_bytes(data)
    assert "model.safetensors is damaged or not the file that config.json describes" in refusal(saved)


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("exploded",)


def test_a_pickle_under_our_name_is_never_unpickled(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for data in (pickle.dumps(Bomb()), pickle.dumps({"cls_token": Bomb()}, protocol=0)):
        replace_weights(saved, data)
        assert "is not a safetensors file" in refusal(saved)
    torch.save({"cls_token": Bomb()}, saved / "model.safetensors")
    replace_weights(saved, (saved / "model.safetensors").read_bytes())
    assert "is not a safetensors file" in refusal(saved)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("norm.bias"), "model.safetensors lacks norm.bias"),
        (lambda w: w.update(extra=np.zeros(1, np.float32)), "model.safetensors holds extra, which the architecture"),
        (
            lambda w: w.update({"head.bias": np.zeros(4, np.float32)}),
            "head.bias has shape (4,); the architecture needs",
        ),
        (
            lambda w: w.update(cls_token=w["cls_token"][0]),
            "cls_token has shape (1, 8); the architecture needs (1, 1, 8)",
        ),
        (lambda w: w.update(cls_token=w["cls_token"].astype(np.float64)), "cls_token is float64; weights are float16"),
        (lambda w: w.update(cls_token=w["cls_token"].astype(np.int32)), "cls_token is int32; weights are float16"),
    ],
)
def test_weights_that_are_not_the_architectures(saved: Path, change: Callable[[Weights], object], words: str) -> None:
    weights = weights_of(saved)
    change(weights)
    replace_weights(saved, safetensors.numpy.save(weights))
    assert words in refusal(saved)


def test_weights_in_a_precision_that_numpy_lacks(saved: Path) -> None:
    import safetensors.torch

    half = {name: tensor.to(torch.bfloat16) for name, tensor in toy().state_dict().items()}
    replace_weights(saved, safetensors.torch.save(half))
    assert "model.safetensors is not a safetensors file that we can read" in refusal(saved)


# -- damaged cards


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"\x80abc", "is not JSON"),
        (b"[" * 100_000, "is not JSON of ours: it is nested too deeply"),
        (b'{"format": ' + b"9" * 10_000 + b"}", "is not JSON"),
        (b"[]", "must hold a JSON object"),
        (b"null", "must hold a JSON object"),
        (b'"text"', "must hold a JSON object"),
        (b"{}", "lacks format, name, architecture"),
    ],
)
def test_a_card_that_is_no_object(saved: Path, content: bytes, words: str) -> None:
    (saved / "config.json").write_bytes(content)
    assert f"config.json {words}" in refusal(saved) or f"config.json: {words}" in refusal(saved)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_card(saved: Path, keep: float) -> None:
    data = (saved / "config.json").read_bytes()
    (saved / "config.json").write_bytes(data[: int(keep * len(data))].rstrip(b"\n}"))
    assert "config.json is not JSON" in refusal(saved)


KEYS = "format name architecture widths classes preprocessing evaluation training weights_sha256"


@pytest.mark.parametrize("key", KEYS.split())
def test_a_card_that_lacks_an_entry(saved: Path, key: str) -> None:
    tamper(saved, lambda card: card.pop(key))
    assert f"config.json: lacks {key}" in refusal(saved)


@pytest.mark.parametrize("key", ["image_size", "embed_dim", "num_heads", "mlp_ratio", "num_classes", "granularity"])
def test_an_architecture_that_lacks_an_entry(saved: Path, key: str) -> None:
    tamper(saved, lambda card: card["architecture"].pop(key))
    assert f"architecture lacks {key}" in refusal(saved)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("", "format", 2),
        ("", "format", None),
        ("", "name", 5),
        ("", "architecture", []),
        ("", "widths", None),
        ("", "widths", []),
        ("", "widths", [1, 2, 3]),
        ("", "classes", {}),
        ("", "classes", []),
        ("", "classes", ["a", "b", "c"]),
        ("", "preprocessing", None),
        ("", "preprocessing", {}),
        ("", "evaluation", "good"),
        ("", "evaluation", {"dataset": 5, "images": 10}),
        ("", "evaluation", {"dataset": "toys", "images": "many"}),
        ("", "training", "hard"),
        ("", "weights_sha256", "0" * 64),
        ("", "weights_sha256", None),
        ("", "surprise", 1),
        ("architecture", "surprise", 1),
        ("architecture", "image_size", 16),
        ("architecture", "image_size", float("nan")),
        ("architecture", "patch_size", 2),
        ("architecture", "patch_size", 3),
        ("architecture", "embed_dim", 16),
        ("architecture", "embed_dim", 8.0),
        ("architecture", "embed_dim", -8),
        ("architecture", "embed_dim", 10**400),
        ("architecture", "depth", 2),
        ("architecture", "depth", "1"),
        ("architecture", "depth", 10**12),
        ("architecture", "num_heads", 3),
        ("architecture", "num_heads", 0),
        ("architecture", "mlp_ratio", 4.0),
        ("architecture", "mlp_ratio", float("nan")),
        ("architecture", "mlp_ratio", float("inf")),
        ("architecture", "mlp_ratio", "2"),
        ("architecture", "mlp_ratio", None),
        ("architecture", "num_classes", 4),
        ("architecture", "smallest", 0.25),
        ("architecture", "smallest", None),
        ("architecture", "smallest", float("nan")),
        ("architecture", "largest", 2),
        ("architecture", "largest", []),
        ("architecture", "granularity", 0.5),
        ("architecture", "granularity", 0),
        ("architecture", "granularity", 1e-9),
        ("architecture", "granularity", float("inf")),
        ("architecture", "granularity", "0.25"),
        ("architecture", "distilled", True),
        ("architecture", "distilled", "no"),
        ("architecture", "global_pool", "avg"),
        ("architecture", "global_pool", ["token"]),
        ("architecture", "layer_norm_eps", -1),
        ("architecture", "layer_norm_eps", float("nan")),
        ("preprocessing", "surprise", 1),
        ("preprocessing", "image_size", 16),
        ("preprocessing", "image_size", 8.0),
        ("preprocessing", "image_size", "8"),
        ("preprocessing", "crop_ratio", 0),
        ("preprocessing", "crop_ratio", float("nan")),
        ("preprocessing", "crop_ratio", "1"),
        ("preprocessing", "mean", [0.5, 0.5]),
        ("preprocessing", "mean", "abc"),
        ("preprocessing", "mean", None),
        ("preprocessing", "std", [1, 1, 0]),
        ("preprocessing", "std", [1, 1, float("nan")]),
        ("widths.0", "width", 0.6),
        ("widths.0", "width", None),
        ("widths.0", "accuracy", 1.5),
        ("widths.0", "accuracy", -0.1),
        ("widths.0", "accuracy", float("nan")),
        ("widths.0", "accuracy", "0.5"),
        ("widths.0", "accuracy", True),
        ("widths.0", "accuracy_ci95", 0.5),
        ("widths.0", "accuracy_ci95", [0.5]),
        ("widths.0", "accuracy_ci95", [0.6, 0.5]),
        ("widths.0", "accuracy_ci95", [0.5, float("nan")]),
        ("widths.0", "accuracy_top5", 1.5),
        ("widths.0", "accuracy_top5", "high"),
        ("widths.0", "accuracy_top5_ci95", 0.5),
        ("widths.0", "accuracy_top5_ci95", [0.6, 0.5]),
        ("widths.0", "calibration_error", -0.1),
        ("widths.0", "calibration_error", float("nan")),
        ("widths.0", "calibration_error", [0.1, 0.2]),
        ("widths.0", "parameters", 1),
        ("widths.0", "macs", None),
        ("widths.0", "surprise", 1),
        ("classes.1", "label", None),
        ("classes.1", "label", 7),
        ("classes.1", "class_id", 2),
        ("classes.1", "id", 1),
    ],
)
def test_a_tampered_card(saved: Path, section: str, key: str, value: object) -> None:
    def change(card: dict[str, Any]) -> None:
        target: Any = card
        for step in filter(None, section.split(".")):
            target = target[int(step) if step.isdigit() else step]
        target[key] = value

    tamper(saved, change)
    sentence = refusal(saved)
    assert "config.json" in sentence or "model.safetensors lacks fc_norm.bias" in sentence
    assert len(sentence) < 600


@pytest.mark.parametrize(("section", "key"), [("widths", "accuracy"), ("widths", "macs"), ("classes", "label")])
def test_an_item_of_the_card_that_lacks_an_entry(saved: Path, section: str, key: str) -> None:
    tamper(saved, lambda card: card[section][1].pop(key))
    assert "config.json" in refusal(saved)


# -- saving over


def test_saving_over_a_checkpoint_replaces_whole_files_the_card_last(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced: list[tuple[str, bool]] = []
    replace = os.replace

    def spy(source: Path, target: Path) -> None:
        replaced.append((target.name, source.parent == target.parent))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    save_checkpoint(saved, toy("distilled"))
    assert replaced == [("model.safetensors", True), ("README.md", True), ("config.json", True)]
    assert read_checkpoint(saved).config.distilled
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_new_weights_take_the_old_ones_correctness_away(saved: Path) -> None:
    widths = read_checkpoint(saved).config.widths
    write_correctness(saved, Correctness(widths, np.ones((9, 3), np.bool_), "toys val", "0" * 64))
    assert read_correctness(saved) is not None
    save_checkpoint(saved, toy("distilled"))
    assert read_correctness(saved) is None
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_full_disk_leaves_the_old_checkpoint_and_no_rubbish(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(saved, toy("distilled"))
    assert not read_checkpoint(saved).config.distilled
    assert sorted(path.name for path in saved.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_a_save_that_dies_between_its_files_is_noticed(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def die_after_weights(source: Path, target: Path) -> None:
        if target.name != "model.safetensors":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", die_after_weights)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(saved, toy("distilled"))
    assert "is damaged or not the file that config.json describes" in refusal(saved)


# -- without torch


def test_reading_loads_no_torch(saved: Path) -> None:
    program = f"""
import sys
import scala_model
import scala_model.width, scala_model.slicing, scala_model.config, scala_model.cost, scala_model.preprocess
import scala_model.correctness
from scala_model.checkpoint import read_checkpoint
assert len(read_checkpoint({str(saved)!r}).weights) > 10
assert "torch" not in sys.modules
scala_model.ScalaViT
assert "torch" in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_the_package_has_no_other_names() -> None:
    import scala_model

    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        scala_model.nonsense  # noqa: B018
