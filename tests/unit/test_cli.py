"""The command line: what it teaches, what it refuses and with which words, and what the commands leave behind."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import server.lifecycle
from scala_model import ScalaConfig, ScalaViT, save_checkpoint
from scala_model.checkpoint import CheckpointError, read_checkpoint
from scala_model.correctness import read_correctness
from scala_model.train.loop import Trainer
from scala_model.train.recipe import Recipe
from server.cli import main
from server.settings import SECRET, Settings

TOY = Recipe(
    config=ScalaConfig(
        image_size=8,
        patch_size=4,
        embed_dim=8,
        depth=1,
        num_heads=2,
        mlp_ratio=2.0,
        num_classes=3,
        smallest=0.5,
        largest=1.0,
        granularity=0.5,
    ),
    epochs=3,
    largest_only_epochs=1,
    batch_size=10,
    learning_rate=1e-2,
    warmup_epochs=1,
    resident_size=10,
    autocast="float32",
)


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call the console script in this process."""
    for name in [name for name in os.environ if name.startswith("SCALA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main([str(argument) for argument in arguments])
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """40 training and 12 validation images of three plain colours."""
    folder = tmp_path / "colours"
    folder.mkdir()
    (folder / "classes.tsv").write_text("n1\tred, crimson\nn2\tgreen\nn3\tblue\n", encoding="utf-8")
    for split, count in (("train", 40), ("val", 12)):
        labels = [i % 3 for i in range(count)]
        images = []
        for i, label in enumerate(labels):
            pixels = np.random.default_rng(i).integers(0, 60, (12, 12, 3), np.uint8)
            pixels[..., label] += 180
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            images.append(file.getvalue())
        pq.write_table(pa.table({"image": images, "label": labels}), folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "toy", ScalaViT(TOY.config))
    return tmp_path / "toy"


@pytest.fixture(autouse=True)
def _toy_recipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("scala_model.train.recipes.toy.RECIPE", TOY)
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    assert [signal.getsignal(number) for number in numbers] == before


# -- help


def test_help_names_the_commands(run: Any) -> None:
    help_text = run("--help").out
    for words in ("latency budget", "serve", "profile", "train", "evaluate"):
        assert words in help_text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["scala-xs-tiny-imagenet", "--data", "--out", "--device", "--seed", "--threads", "state.pt"]),
        ("evaluate", ["CHECKPOINT", "--data", "--device", "--no-write", "JSON"]),
        ("profile", ["--checkpoint", "--max-batch", "--profile-dir", "--seconds", "--plot", "--json", "30 runs"]),
    ],
)
def test_every_command_explains_itself(run: Any, command: str, words: list[str]) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    for word in words:
        assert word in outcome.out


def test_serve_has_a_flag_for_every_setting_and_tells_its_default(run: Any) -> None:
    """But for secrets: others on the machine can read a process's command line."""
    text = run("serve", "--help").out.partition("─ Options")[2]
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert (f"{flag} " in text) is (name not in SECRET), name
        if field.default is not None:
            lines = text[text.index(flag + " ") :].split(" --")[:2]
            default = f"{field.default:g}" if isinstance(field.default, float) else str(field.default)
            assert f"Default: {default}." in "".join(lines), name


def test_help_loads_nothing_heavy() -> None:
    program = """
import sys
from server.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
assert not {"torch", "pyarrow", "fastapi", "pydantic", "uvicorn"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "server", "train", "nonsense", "--data", "."], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("scala-serve: there is no recipe 'nonsense'; there are fine-tune, ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["dance"],
        ["train"],
        ["train", "toy"],
        ["serve", "--volume", "11"],
        ["train", "toy", "--data", ".", "--seed", "x"],
    ],
)
def test_wrong_usage_ends_with_2(run: Any, arguments: list[str]) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.err


# -- serve


def test_serve_hands_its_flags_to_the_settings_and_leaves_with_the_servers_code(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Settings] = []

    def fake(settings: Settings) -> NoReturn:
        served.append(settings)
        raise SystemExit(70)

    monkeypatch.setattr(server.lifecycle, "run", fake)
    monkeypatch.setenv("SCALA_MAX_QUEUE", "32")
    monkeypatch.setenv("SCALA_PORT", "1")
    outcome = run("serve", "--port", "9000", "--policy", "fixed:0.5", "--default-budget-ms", "250", "--checkpoint", "x")
    assert outcome == Outcome(70, "", "")
    (settings,) = served
    assert (settings.port, settings.max_queue, settings.policy) == (9000, 32, "fixed:0.5")
    assert (settings.default_budget_ms, settings.checkpoint) == (250.0, Path("x"))
    assert settings.host == "127.0.0.1"


def test_a_wrong_setting_is_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = run("serve", "--port", "lots")
    assert outcome.code == 2
    assert outcome.err == "scala-serve: flag --port is 'lots'; it must be a whole number from 0 to 65535\n"


def test_a_checkpoint_that_cannot_be_read_is_one_sentence(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(settings: Settings) -> int:
        raise CheckpointError("x/config.json does not exist")

    monkeypatch.setattr(server.lifecycle, "run", refuse)
    assert run("serve", "--checkpoint", "x") == Outcome(2, "", "scala-serve: x/config.json does not exist\n")


# -- train


def test_training_leaves_a_measured_checkpoint(run: Any, data: Path, tmp_path: Path) -> None:
    outcome = run("train", "toy", "--data", data, "--out", tmp_path / "out", "--device", "cpu", "--seed", 3)
    assert outcome.code == 0, outcome.err
    read = read_checkpoint(tmp_path / "out" / "checkpoint" / "toy")
    assert read.config == TOY.config
    assert {array.dtype for array in read.weights.values()} == {np.dtype(np.float16)}
    card = read.card
    assert card["name"] == "toy"
    assert card["classes"][0] == {"class_id": 0, "id": "n1", "label": "red"}
    assert card["evaluation"] == {"dataset": "colours val", "images": 12}
    assert all(0 <= entry["accuracy"] <= 1 for entry in card["widths"])
    training = card["training"]
    assert training["recipe"] == "toy"
    assert (training["learning rate"], training["min crop area"]) == (0.01, 0.35)
    assert "mixup" not in training  # which is off
    assert training["data set"] == "colours, 40 images"
    assert (training["steps"], training["seed"], training["device"]) == (12, 3, "cpu")
    assert "Noise Calibration" in training["objective"]
    assert training["torch"] == torch.__version__
    last = json.loads(outcome.out.splitlines()[-1])
    assert last["checkpoint"] == str(tmp_path / "out" / "checkpoint" / "toy")
    assert [entry["width"] for entry in last["widths"]] == [0.5, 1.0]
    matrix = read_correctness(tmp_path / "out" / "checkpoint" / "toy")
    assert matrix is not None
    assert [matrix.accuracy(width) for width in TOY.config.widths] == [
        pytest.approx(entry["accuracy"], abs=1e-4) for entry in last["widths"]
    ]
    assert (tmp_path / "out" / "checkpoint" / "toy" / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_baseline_another_length_and_the_moving_average(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("scala_model.train.recipes.toy.RECIPE", replace(TOY, ema_decay=0.9))
    outcome = run("train", "toy:separate-0.5", "--data", data, "--epochs", 1, "--device", "cpu")
    assert outcome.code == 0, outcome.err
    for name in ("toy-separate-0.5", "toy-separate-0.5-ema"):
        read = read_checkpoint(Path("runs/toy-separate-0.5/checkpoint") / name)
        assert read.config.embed_dim == 4
        training = read.card["training"]
        assert (training["recipe"], training["steps"], training["width"]) == ("toy-separate-0.5", 4, 0.5)
        assert training["objective"] == "one width, labels alone"
        average = "moving average, decay 0.9" if name.endswith("ema") else "as trained"
        assert training["weights"] == f"{average}, stored as float16"
    assert len([line for line in outcome.out.splitlines() if line.startswith('{"checkpoint"')]) == 2

    outcome = run("train", "toy:us-net", "--data", data, "--epochs", 1, "--device", "cpu")
    read = read_checkpoint(Path("runs/toy-us-net/checkpoint/toy-us-net"))
    assert read.card["training"]["objective"] == "US-Net"
    assert not read.config.isolated_activation


def test_fine_tuning_keeps_the_head_only_for_the_same_classes(
    run: Any, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """The toy checkpoint's classes have no names, so three classes are taken for its own; two never are."""
    recipe = tmp_path / "short.py"
    recipe.write_text(
        "from dataclasses import replace\nfrom scala_model.train.recipes import fine_tune\n"
        "def recipe(config):\n    return replace(fine_tune.recipe(config), batch_size=10, learning_rate=1e-9)\n"
    )
    command = ("train", recipe, "--init", checkpoint, "--data", data, "--epochs", 1, "--device", "cpu")
    outcome = run(*command, "--out", tmp_path / "same")
    assert outcome.code == 0, outcome.err
    assert "head is replaced" not in outcome.err
    before, same = read_checkpoint(checkpoint), read_checkpoint(tmp_path / "same" / "checkpoint" / "short")
    for name, weights in before.weights.items():
        np.testing.assert_allclose(same.weights[name], weights, atol=1e-3)
    assert same.card["training"]["started from"] == "toy"

    for shard in data.glob("*.parquet"):
        table = pq.read_table(shard)
        pq.write_table(table.filter(pc.less(table["label"], 2)), shard)
    (data / "classes.tsv").write_text("n1\tred\nn2\tgreen\n")
    outcome = run(*command, "--out", tmp_path / "fewer")
    assert outcome.code == 0, outcome.err
    assert "The data's 2 classes are not those of the checkpoint: its head is replaced by a new one" in outcome.err
    fewer = read_checkpoint(tmp_path / "fewer" / "checkpoint" / "short")
    assert fewer.weights["head.weight"].shape == (2, 8)
    np.testing.assert_allclose(fewer.weights["norm.weight"], before.weights["norm.weight"], atol=1e-3)

    outcome = run("train", "scala-s-tiny-imagenet", "--init", checkpoint, "--data", data, "--out", tmp_path / "other")
    assert outcome.code == 2
    assert "the checkpoint to start from has patch_size 4, the recipe 8; embed_dim 8, the recipe 384" in outcome.err
    outcome = run("train", "fine-tune", "--data", data)
    assert outcome.err == (
        "scala-serve: the recipe fine-tune goes on from trained weights: name their checkpoint with --init DIR\n"
    )


def test_what_does_not_fit_into_memory_is_streamed_to_the_same_weights(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "toy", "--data", data, "--device", "cpu", "--out")
    assert "Decoding 40 images into memory" in run(*command, tmp_path / "resident").err
    monkeypatch.setattr("scala_model.train.run.fits", lambda *_: False)
    assert "Streaming 40 images" in run(*command, tmp_path / "streamed").err
    weights = [tmp_path / kind / "checkpoint" / "toy" / "model.safetensors" for kind in ("resident", "streamed")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_distilled_network_has_a_teacher(
    run: Any, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "distilled.py"
    recipe.write_text(
        "from dataclasses import replace\nfrom scala_model.train.recipe import find\nTOY = find('toy')\n"
        "RECIPE = replace(TOY, config=replace(TOY.config, distilled=True))\n"
    )
    command = ("train", recipe, "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    outcome = run(*command)
    assert outcome.code == 2
    assert "--teacher DIR" in outcome.err
    outcome = run(*command, "--teacher", checkpoint)
    assert outcome.code == 0, outcome.err
    read = read_checkpoint(tmp_path / "out" / "checkpoint" / "distilled")
    assert read.config.distilled
    assert read.card["training"]["external teacher"] == "toy"

    animals = [{"class_id": i, "id": name, "label": name} for i, name in enumerate(("cat", "dog", "cow"))]
    save_checkpoint(tmp_path / "animals", ScalaViT(TOY.config), {"classes": animals})
    outcome = run(*command, "--teacher", tmp_path / "animals")
    assert outcome.code == 2
    assert "animals has other classes than the data: take one that was trained on them" in outcome.err

    # On other classes there is no teacher: both heads go on with the labels.
    again = ("train", "fine-tune", "--init", tmp_path / "out" / "checkpoint" / "distilled", "--data", data)
    monkeypatch.setattr("scala_model.train.recipes.fine_tune.recipe", lambda config: replace(TOY, config=config))
    outcome = run(*again, "--out", tmp_path / "tuned", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    before, after = (read_checkpoint(folder) for folder in (again[3], tmp_path / "tuned" / "checkpoint" / "fine-tune"))
    for head in ("head.weight", "head_dist.weight"):
        assert not np.array_equal(before.weights[head], after.weights[head])


def test_a_recipe_file_with_a_method_stays_in_its_folder(run: Any, data: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.py"
    recipe.write_text("from scala_model.train.recipe import find\nRECIPE = find('toy')\n")
    outcome = run("train", f"{recipe}:us-net", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    assert outcome.code == 0, outcome.err
    assert read_checkpoint(tmp_path / "out" / "checkpoint" / "mine-us-net").card["training"]["recipe"] == "mine-us-net"
    outcome = run("train", "toy", "--data", data, "--out", recipe)
    assert outcome.err == f"scala-serve: {recipe} is a file: name a folder with --out\n"
    outcome = run("train", "toy", "--data", data, "--out", tmp_path / "short", "--epochs", 0.01)
    assert "0.01 epochs of 4 steps are no step: give more epochs" in outcome.err


def test_the_folder_is_runs_slash_recipe_and_validation_images_may_lack(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (data / "val-00000-of-00001.parquet").unlink()
    assert run("train", "toy", "--data", "colours", "--device", "cpu").code == 0
    assert read_checkpoint(Path("runs/toy/checkpoint/toy")).card["evaluation"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_same_command_goes_on(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    command = ("train", "toy", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    step = Trainer._update

    def interrupted(self: Trainer, *arguments: Any) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_update", interrupted)
        outcome = run(*command)
    assert outcome.code == 130
    assert "Stopped at step 5 of 12, all saved. To go on, run the same command again." in outcome.err
    assert not (tmp_path / "out" / "checkpoint").exists()

    outcome = run(*command)
    assert outcome.code == 0
    assert "Going on from step 5 of 12" in outcome.err
    assert read_checkpoint(tmp_path / "out" / "checkpoint" / "toy").card["training"]["steps"] == 12


def test_another_recipes_folder_is_refused(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "toy", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    assert run(*command).code == 0
    monkeypatch.setattr("scala_model.train.recipes.toy.RECIPE", replace(TOY, learning_rate=0.5))
    outcome = run(*command)
    assert outcome.code == 2
    assert "state.pt belongs to a run with another recipe: use another folder or delete it" in outcome.err


def test_the_folder_of_other_data_is_refused(run: Any, data: Path, tmp_path: Path) -> None:
    """As many images with the same labels, but other classes, or other pictures."""
    command = ("train", "toy", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    assert run(*command).code == 0
    names = (data / "classes.tsv").read_bytes()
    (data / "classes.tsv").write_text("n1\tapple\nn2\tpear\nn3\tplum\n")
    assert "belongs to a run with another data set" in run(*command).err
    (data / "classes.tsv").write_bytes(names)
    assert "Going on from step 12 of 12" in run(*command).err
    shard = data / "train-00000-of-00001.parquet"
    table = pq.read_table(shard)
    images = table["image"].to_pylist()
    pq.write_table(table.set_column(0, "image", [[images[3], *images[1:3], images[0], *images[4:]]]), shard)
    assert "belongs to a run with another data set" in run(*command).err


def test_training_data_that_does_not_fit_is_refused_before_any_training(run: Any, data: Path, tmp_path: Path) -> None:
    (data / "classes.tsv").write_text("n1\tred\nn2\tgreen\n")
    outcome = run("train", "toy", "--data", data, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "label 2" in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
    outcome = run("train", "toy", "--data", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "no train images in" in outcome.err


def test_an_unknown_recipe_lists_the_known_ones(run: Any, data: Path) -> None:
    outcome = run("train", "tyo", "--data", data)
    assert outcome.code == 2
    assert outcome.err.startswith("scala-serve: there is no recipe 'tyo'; there are fine-tune, scala-s-")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_sentence(run: Any, data: Path, checkpoint: Path) -> None:
    for command in (("train", "toy"), ("evaluate", checkpoint)):
        outcome = run(*command, "--data", data, "--device", "cuda")
        assert outcome == Outcome(2, "", "scala-serve: torch finds no CUDA device: use --device cpu\n")


@pytest.mark.parametrize("missing", ["torch", "pyarrow", "matplotlib"])
def test_a_missing_extra_is_one_sentence(
    run: Any, data: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    for command in (("train", "toy"), ("evaluate", checkpoint)):
        outcome = run(*command, "--data", data)
        assert outcome.code == 2
        assert "pip install 'scala-serve[train]'" in outcome.err
        assert outcome.err.count("\n") == 1


# -- evaluate


def test_evaluate_records_the_accuracies_and_ends_with_json(run: Any, data: Path, checkpoint: Path) -> None:
    before = read_checkpoint(checkpoint).card
    outcome = run("evaluate", checkpoint, "--data", data, "--device", "cpu")
    assert outcome.code == 0
    card = read_checkpoint(checkpoint).card
    assert card["evaluation"] == {"dataset": "colours val", "images": 12}
    assert card["weights_sha256"] == before["weights_sha256"]
    last = json.loads(outcome.out.splitlines()[-1])
    assert last == {
        "checkpoint": str(checkpoint),
        "images": 12,
        "widths": card["widths"],
        "dominated": [1.0] if card["widths"][1]["accuracy"] <= card["widths"][0]["accuracy"] else [],
    }
    assert all(0 <= entry["calibration_error"] <= 1 and entry["accuracy_top5"] == 1 for entry in card["widths"])
    table = outcome.out[: outcome.out.rindex("{", 0, outcome.out.index('"checkpoint"'))]
    for words in (
        "width",
        "top-1 %",
        "95 % interval",
        "top-5 %",
        "ECE",
        "parameters",
        "MACs",
        "0.5",
        f"{100 * last['widths'][0]['accuracy']:.2f}",
    ):
        assert words in table
    assert "12 images (colours val)" in (checkpoint / "README.md").read_text(encoding="utf-8")


def test_evaluate_may_leave_the_checkpoint_alone(run: Any, data: Path, checkpoint: Path) -> None:
    before = (checkpoint / "config.json").read_bytes()
    outcome = run("evaluate", checkpoint, "--data", data, "--device", "cpu", "--no-write")
    assert json.loads(outcome.out.splitlines()[-1])["images"] == 12
    assert (checkpoint / "config.json").read_bytes() == before


def test_evaluate_refuses_in_one_sentence(run: Any, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    outcome = run("evaluate", tmp_path / "nowhere", "--data", data)
    assert outcome.code == 2
    assert "config.json does not exist: a checkpoint is a folder" in outcome.err
    outcome = run("evaluate", checkpoint, "--data", tmp_path)
    assert outcome.code == 2
    assert "no val images in" in outcome.err
    (data / "val-00000-of-00001.parquet").write_bytes(b"nothing")
    outcome = run("evaluate", checkpoint, "--data", data)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


def test_evaluate_refuses_other_classes(run: Any, data: Path, tmp_path: Path) -> None:
    """Named otherwise, or another number of them: an accuracy would mean nothing."""

    def named(ids: str, labels: str) -> dict[str, Any]:
        pairs = zip(ids.split(), labels.split(), strict=True)
        return {"classes": [{"class_id": i, "id": id_, "label": label} for i, (id_, label) in enumerate(pairs)]}

    save_checkpoint(tmp_path / "ids", ScalaViT(TOY.config), named("n1 n2 n3", "rot grün blau"))
    save_checkpoint(tmp_path / "labels", ScalaViT(TOY.config), named("0 1 2", "red green blue"))
    save_checkpoint(tmp_path / "animals", ScalaViT(TOY.config), named("cat dog cow", "cat dog cow"))
    save_checkpoint(tmp_path / "four", ScalaViT(replace(TOY.config, num_classes=4)))
    for name in ("ids", "labels"):
        assert run("evaluate", tmp_path / name, "--data", data).code == 0
    for name in ("animals", "four"):
        outcome = run("evaluate", tmp_path / name, "--data", data)
        assert outcome.code == 2
        assert "has other classes than" in outcome.err


# -- import-weights


def test_published_weights_become_a_checkpoint(run: Any, data: Path, tmp_path: Path) -> None:
    model = ScalaViT(replace(TOY.config, smallest=1.0, layer_norm_eps=1e-6))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "deit.pth")
    outcome = run("import-weights", tmp_path / "deit.pth", tmp_path / "deit", "--num-heads", 2)
    assert outcome.code == 0, outcome.err
    assert "vit: 8 px, patch 4, 8 channels, depth 1, 2 heads" in outcome.out
    assert "widths 1 (" in outcome.out
    read = read_checkpoint(tmp_path / "deit")
    assert (read.config.layer_norm_eps, read.card["evaluation"]) == (1e-6, None)

    assert run("evaluate", tmp_path / "deit", "--data", data).code == 0
    assert read_checkpoint(tmp_path / "deit").card["evaluation"]["images"] == 12
    outcome = run("import-weights", tmp_path / "deit.pth", tmp_path / "deit", "--num-heads", 2)
    assert outcome.code == 2
    assert "exists already: name a folder that is new or empty" in outcome.err
