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
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import server.lifecycle
from scala_model import ScalaConfig, ScalaViT, save_checkpoint
from scala_model.checkpoint import CheckpointError, read_checkpoint
from scala_model.train.loop import Trainer
from scala_model.train.recipes import RECIPES, Recipe
from server.cli import main
from server.settings import Settings

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
    monkeypatch.setitem(RECIPES, "toy", TOY)
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


# -- help


def test_help_names_the_commands(run: Any) -> None:
    help_text = run("--help").out
    for words in ("latency budget", "serve", "train", "evaluate"):
        assert words in help_text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train", ["scala-xs-tiny-imagenet", "--data", "--out", "--device", "--seed", "--threads", "state.pt"]),
        ("evaluate", ["CHECKPOINT", "--data", "--device", "--no-write", "JSON"]),
    ],
)
def test_every_command_explains_itself(run: Any, command: str, words: list[str]) -> None:
    outcome = run(command, "--help")
    assert outcome.code == 0
    for word in words:
        assert word in outcome.out


def test_serve_has_a_flag_for_every_setting_and_tells_its_default(run: Any) -> None:
    text = run("serve", "--help").out
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        assert flag in text, name
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
    assert done.stderr.startswith("scala-serve: there is no recipe 'nonsense'; there are scala-xs-tiny-imagenet, ")
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
    assert training["data set"] == "colours, 40 images"
    assert (training["steps"], training["seed"], training["device"]) == (12, 3, "cpu")
    assert "Noise Calibration" in training["objective"]
    assert training["torch"] == torch.__version__
    last = json.loads(outcome.out.splitlines()[-1])
    assert last["checkpoint"] == str(tmp_path / "out" / "checkpoint" / "toy")
    assert [entry["width"] for entry in last["widths"]] == [0.5, 1.0]


def test_the_folder_is_runs_slash_recipe_and_validation_images_may_lack(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (data / "val-00000-of-00001.parquet").unlink()
    assert run("train", "toy", "--data", "colours", "--device", "cpu").code == 0
    assert read_checkpoint(Path("runs/toy/checkpoint/toy")).card["evaluation"] is None


def test_ctrl_c_saves_and_the_same_command_goes_on(
    run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("train", "toy", "--data", data, "--out", tmp_path / "out", "--device", "cpu")
    step = Trainer.train_step

    def interrupted(self: Trainer) -> Any:
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", interrupted)
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
    monkeypatch.setitem(RECIPES, "toy", replace(TOY, learning_rate=0.5))
    outcome = run(*command)
    assert outcome.code == 2
    assert "state.pt belongs to another recipe, seed or data set" in outcome.err


def test_training_data_that_does_not_fit_is_refused_before_any_training(run: Any, data: Path, tmp_path: Path) -> None:
    (data / "classes.tsv").write_text("n1\tred\nn2\tgreen\n")
    outcome = run("train", "toy", "--data", data, "--out", tmp_path / "out")
    assert outcome.code == 2
    assert outcome.err == f"scala-serve: {data / 'classes.tsv'} lists 2 classes; the recipe toy has 3\n"
    assert not (tmp_path / "out").exists()
    outcome = run("train", "toy", "--data", tmp_path / "nowhere")
    assert outcome.code == 2
    assert "no classes.tsv in" in outcome.err


def test_an_unknown_recipe_lists_the_known_ones(run: Any, data: Path) -> None:
    outcome = run("train", "tyo", "--data", data)
    assert outcome.code == 2
    assert outcome.err.startswith("scala-serve: there is no recipe 'tyo'; there are scala-xs-tiny-imagenet")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_one_sentence(run: Any, data: Path, checkpoint: Path) -> None:
    for command in (("train", "toy"), ("evaluate", checkpoint)):
        outcome = run(*command, "--data", data, "--device", "cuda")
        assert outcome == Outcome(2, "", "scala-serve: torch finds no CUDA device: use --device cpu\n")


@pytest.mark.parametrize("missing", ["torch", "pyarrow"])
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
        "widths": [{key: entry[key] for key in ("width", "accuracy", "accuracy_ci95")} for entry in card["widths"]],
    }
    table = outcome.out[: outcome.out.rindex("{", 0, outcome.out.index('"checkpoint"'))]
    for words in (
        "width",
        "top-1 %",
        "95 % interval",
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
    assert "no val-*.parquet in" in outcome.err
    (data / "val-00000-of-00001.parquet").write_bytes(b"nothing")
    outcome = run("evaluate", checkpoint, "--data", data)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
