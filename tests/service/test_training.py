"""Training as a user does it: folders of pictures in, a measured checkpoint out; killed half-way, on two processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

NUM_CLASSES, PER_CLASS = 10, {"train": 300, "val": 50}
SCALA_SERVE = [sys.executable, "-m", "server"]


@pytest.fixture(scope="module")
def pictures(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first ten classes of Tiny ImageNet, a folder a class."""
    folder = tmp_path_factory.mktemp("pictures")
    for split, most in PER_CLASS.items():
        left = dict.fromkeys(range(NUM_CLASSES), most)
        for shard in sorted((shared_data / "tiny-imagenet").glob(f"{split}-*.parquet")):
            table = pq.read_table(shard, columns=["image", "label"], filters=[("label", "<", NUM_CLASSES)])
            for row in table.to_pylist():
                if left[row["label"]]:
                    left[row["label"]] -= 1
                    place = folder / split / f"class {row['label']}"
                    place.mkdir(parents=True, exist_ok=True)
                    (place / f"{left[row['label']]}.jpg").write_bytes(row["image"])
    return folder


def train(pictures: Path, out: Path, *options: str) -> list[str]:
    return [*SCALA_SERVE, "train", "toy", "--data", str(pictures), "--out", str(out), "--threads", "1", *options]


def finish(command: list[str]) -> tuple[dict[float, float], str]:
    """Run to the end; the accuracy of each width, and what was said."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    return {entry["width"]: entry["accuracy"] for entry in report["widths"]}, done.stderr


def last_step(out: Path) -> int:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


@pytest.mark.slow
def test_every_width_beats_chance_by_far_and_a_killed_run_ends_with_the_same_weights(
    pictures: Path, tmp_path: Path
) -> None:
    command = train(pictures, tmp_path / "killed", "--epochs", "4")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 240
        while last_step(tmp_path / "killed") < 120:  # of 240
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
    _, said = finish(command)
    resumed = re.search(r"Going on from step (\d+) of 240", said)
    assert resumed
    assert 40 < int(resumed[1]) <= 140

    accuracy, said = finish(train(pictures, tmp_path / "whole", "--epochs", "4"))
    assert "Going on" not in said
    assert list(accuracy) == [0.25, 0.5, 0.75, 1.0]
    assert min(accuracy.values()) > 0.17, accuracy  # chance is 0.1
    weights = [tmp_path / name / "checkpoint" / "toy" / "model.safetensors" for name in ("killed", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_two_processes_leave_one_checkpoint(pictures: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, *train(pictures, tmp_path, "--epochs", "1")[1:]]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert len([line for line in done.stdout.splitlines() if line.startswith("{")]) == 1
    card = json.loads((tmp_path / "checkpoint" / "toy" / "config.json").read_text())
    assert (card["training"]["processes"], card["training"]["steps"]) == (2, 60)
    assert card["evaluation"]["images"] == NUM_CLASSES * PER_CLASS["val"]
