"""Machines to simulate: the figures they are made of come out again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from scala_model.checkpoint import CARD, default_checkpoint
from scala_model.correctness import read_correctness
from scala_model.width import Width
from server.profile_store import Key, ProfileStore, Table
from server.simulation.machines import built_in, drawn_correctness, read_machine, with_checkpoint

CHECKPOINT = default_checkpoint()  # widths 0.25, 0.5, 0.75, 1


def written(path: Path, cells: list[dict[str, object]]) -> Path:
    path.write_text(json.dumps({"cells": cells}))
    return path


def cell(width: float, batch: int, p50_ms: float, p99_ms: float) -> dict[str, object]:
    return {"width": width, "batch": batch, "p50_ms": p50_ms, "p99_ms": p99_ms}


# -- which images are right


def test_drawn_columns_have_the_accuracies_asked_for() -> None:
    correct = drawn_correctness((0.3, 0.5, 0.752), num_images=1000)
    assert correct.sum(axis=0).tolist() == [300, 500, 752]
    assert (correct == drawn_correctness((0.3, 0.5, 0.752), num_images=1000)).all()
    assert (correct != drawn_correctness((0.3, 0.5, 0.752), num_images=1000, seed=1)).any()


def test_widths_mostly_get_the_same_images_right_but_not_only() -> None:
    matrix = read_correctness(CHECKPOINT)
    assert matrix is not None
    real, drawn = matrix.correct, drawn_correctness(matrix.correct.mean(axis=0).tolist())
    # were they independent, 16 % of the images would be right at the narrowest width alone
    assert np.mean(real[:, 0] & ~real[:, -1]) == pytest.approx(0.048, abs=0.001)
    assert np.mean(drawn[:, 0] & ~drawn[:, -1]) == pytest.approx(0.050, abs=0.004)


# -- built in


def test_the_cpu_is_the_one_that_was_measured() -> None:
    machine = built_in("cpu")
    profile = machine.profile()
    assert profile.p50(Width(1), 1) == pytest.approx(0.01106, rel=1e-3)
    assert profile.p50(Width(0.25), 16) == pytest.approx(0.01898, rel=1e-3)
    assert profile.p50(Width(0.25), 2) == pytest.approx((2 * 1.66 + 5.23) / 3000, rel=1e-3)
    assert profile.p99(Width(1), 1) / profile.p50(Width(1), 1) == pytest.approx(1.15, abs=0.01)
    assert machine.capacity == pytest.approx(16 / 0.11912, rel=1e-3)
    # 0.375 lies half-way between what is published of 0.25 and 0.5
    assert machine.accuracy.tolist() == pytest.approx([0.598, 0.6505, 0.703, 0.7225, 0.742, 0.7535, 0.765])


def test_batches_are_nearly_free_on_the_gpu() -> None:
    machine = built_in("gpu")
    profile = machine.profile()
    assert profile.p50(Width(1), 64) == pytest.approx(0.0316, rel=1e-3)
    assert profile.p50(Width(0.25), 16) < 1.1 * profile.p50(Width(0.25), 1)
    assert "not measured" in machine.about


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="profile 'tpu' does not exist; there are 'cpu', 'gpu' and files"):
        built_in("tpu")


# -- a checkpoint's images


def test_a_checkpoint_brings_its_widths_and_images() -> None:
    machine = with_checkpoint(built_in("cpu"), CHECKPOINT)
    matrix = read_correctness(CHECKPOINT)
    assert matrix is not None
    assert machine.widths == matrix.widths
    assert (machine.correct == matrix.correct).all()
    assert {width for width, _ in machine.cells} == set(matrix.widths)
    assert "scala-xs-tiny-imagenet" in machine.about


def test_a_checkpoint_of_other_widths_or_without_images_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "half.json", [cell(0.5, 1, 2.0, 3.0)])
    with pytest.raises(ValueError, match=r"has the width 0\.25, of which half has no latency; it has 0\.5: take"):
        read_machine(path, CHECKPOINT)
    shutil.copy(CHECKPOINT / CARD, tmp_path)
    with pytest.raises(ValueError, match="has no record of which images were right: run"):
        with_checkpoint(built_in("cpu"), tmp_path)


# -- measured profiles


def test_a_told_p50_and_p99_come_out_again(tmp_path: Path) -> None:
    cells = [cell(w, b, 2.0 * w * b, 3.0 * w * b) for w in (0.25, 0.5, 0.75, 1) for b in (1, 2)]
    profile = read_machine(written(tmp_path / "mine.json", cells), CHECKPOINT).profile()
    assert profile.p50(Width(0.5), 2) == pytest.approx(0.002, rel=0.01)
    assert profile.p99(Width(0.5), 2) == pytest.approx(0.003, rel=0.02)


def test_a_profile_that_a_server_keeps_is_read_too(tmp_path: Path) -> None:
    runs_s = [0.001 + 0.001 * (k / 999) ** 20 for k in range(1000)]  # a thousand from 1 to 2 ms, few of them long
    key = Key("cpu", "test", 1, "0" * 64, 1, server="1")
    store = ProfileStore(tmp_path)
    store.write(Table.of(key, {(Width(w), 1): runs_s for w in (0.25, 0.5, 0.75, 1)}))
    machine = read_machine(store.path(key), CHECKPOINT)
    samples = machine.cells[Width(1), 1]
    assert np.median(samples) == pytest.approx(0.001, rel=0.001)
    assert np.quantile(samples, 0.99) == pytest.approx(0.00182, rel=0.02)
    # What is kept are 87.5 %, 1.069 ms, and 99 %, 1.818 ms: 95 % lies on the line. Not two of twenty at the end.
    assert np.quantile(samples, 0.95) == pytest.approx(0.00156, rel=0.02)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("nonsense", "JSONDecodeError"),
        ("[]", "TypeError"),
        ('{"cells": [{"width": 1, "batch": 1}]}', "p50_ms"),
        ('{"cells": [{"width": 7, "batch": 1, "p50_ms": 1, "p99_ms": 2}]}', "a width is a number"),
        ('{"cells": [{"width": 1, "batch": 1, "p50_ms": 2, "p99_ms": 1}]}', "a p50 of 2.0 ms and a p99 of 1.0 ms"),
        ('{"cells": [{"width": 1, "batch": 1, "ms": []}]}', "latencies"),
        ('{"cells": []}', "has no cell"),
    ],
)
def test_what_is_no_profile_is_refused_with_the_remedy(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"bad\.json .*{why}.*scala-serve profile"):
        read_machine(path, CHECKPOINT)
