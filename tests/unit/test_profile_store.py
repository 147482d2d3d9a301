"""Tables on disk: what comes back is what was measured, and nothing that is wrong with the disk stops a server."""

from __future__ import annotations

import json
import logging
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scala_model.width import Width
from server.latency_profile import SAMPLES, LatencyProfile
from server.profile_store import Key, ProfileStore, Table, default_folder, quantiles, scale_of
from tests.unit.fake_engine import FakeEngine
from tests.unit.virtual_time import Clock

NARROW, THIRD, WIDE = Width(0.25), Width("1/3"), Width(1.0)
KEY = Key("Some CPU", "torch 2.13.0", 3, "ab" * 32, 4)
TABLE = Table(KEY, {(NARROW, 1): (1.0, 2.0, 4.0), (THIRD, 1): (3.5,), (WIDE, 1): (9.0, 10.0), (WIDE, 4): (20.0,)})


@pytest.fixture
def store(tmp_path: Path) -> ProfileStore:
    return ProfileStore(tmp_path / "some" / "cache")


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# -- what a table says


def test_the_key_is_what_the_engine_and_the_checkpoint_say() -> None:
    engine = FakeEngine(Clock(), max_batch=7)
    assert Key.of(engine, "5ha") == Key("none", "fake", 1, "5ha", 7)


def test_few_samples_are_their_own_quantiles() -> None:
    chance = random.Random(0)
    for count in range(1, 21):
        samples = [chance.random() for _ in range(count)]
        assert quantiles(samples) == sorted(samples)


@pytest.mark.parametrize("count", [21, 30, 137, SAMPLES])
def test_a_profile_made_of_quantiles_has_the_p50_and_the_p99_of_all_samples(count: int) -> None:
    chance = random.Random(count)
    samples = [chance.lognormvariate(-5, 0.5) for _ in range(count)]
    profile = LatencyProfile({WIDE: 0.7}, 1)
    few = quantiles(samples)
    profile.record(WIDE, 1, few)
    assert len(few) == 20
    assert few == sorted(few)
    assert set(few) <= set(samples)
    low, high = np.quantile(samples, [0.45, 0.55])
    assert low <= profile.p50(WIDE, 1) <= high
    assert profile.p99(WIDE, 1) == np.quantile(samples, 0.99, method="lower")


def test_a_table_of_a_profile_in_milliseconds() -> None:
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.7}, 2)
    profile.record(NARROW, 1, [0.003, 0.001, 0.002])
    profile.record(WIDE, 2, [0.5])
    assert Table.of(KEY, profile.samples()).quantiles_ms == {
        (NARROW, 1): pytest.approx((1, 2, 3)),
        (WIDE, 2): pytest.approx((500,)),
    }


def test_samples_on_a_slower_machine() -> None:
    assert TABLE.scaled_samples_s(NARROW, 1, 1.5) == pytest.approx([0.0015, 0.003, 0.006])
    assert TABLE.scaled_samples_s(NARROW, 2, 1.5) == [], "never measured"


def test_the_scale_is_the_median_over_the_cells_of_both() -> None:
    profile = LatencyProfile({NARROW: 0.5, WIDE: 0.7}, 4)
    assert scale_of(TABLE, profile) == 1.0
    profile.record(NARROW, 1, [0.003])  # p50 2 ms in the table
    assert scale_of(TABLE, profile) == pytest.approx(1.5)
    profile.record(WIDE, 1, [0.019])  # 9.5 ms
    assert scale_of(TABLE, profile) == pytest.approx(1.75)
    profile.record(WIDE, 4, [0.200])  # 20 ms: out of the ordinary
    assert scale_of(TABLE, profile) == pytest.approx(2.0)
    profile.record(NARROW, 4, [9.0])  # not in the table
    assert scale_of(TABLE, profile) == pytest.approx(2.0)


# -- on disk


def test_what_was_written_is_read(store: ProfileStore) -> None:
    assert store.read(KEY) is None
    store.write(TABLE)
    assert store.read(KEY) == TABLE
    newer = replace(TABLE, quantiles_ms={(WIDE, 1): (7.0,)})
    store.write(newer)
    assert store.read(KEY) == newer
    assert [path.suffix for path in store.folder.iterdir()] == [".json"], "nothing is left beside it"


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, device="Other CPU"),
        replace(KEY, engine="torch 2.14.0"),
        replace(KEY, threads=1),
        replace(KEY, checkpoint="cd" * 32),
        replace(KEY, max_batch=8),
    ],
)
def test_every_key_has_a_table_of_its_own(store: ProfileStore, other: Key, caplog: pytest.LogCaptureFixture) -> None:
    store.write(TABLE)
    assert store.read(other) is None
    store.write(Table(other, {(WIDE, 1): (1.0,)}))
    assert store.read(KEY) == TABLE
    os.replace(store.path(other), store.path(KEY))  # a copy under another's name is not believed
    assert store.read(KEY) is None
    assert warnings(caplog) == []


def edited(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return edit


def first_cell(**fields: object) -> Callable[[Path], object]:
    return edited(lambda file: file["cells"][0].update(fields))


def test_a_table_of_another_format_is_none(store: ProfileStore, caplog: pytest.LogCaptureFixture) -> None:
    store.write(TABLE)
    edited(lambda file: file.update(format=2, more=True))(store.path(KEY))
    assert store.read(KEY) is None
    assert warnings(caplog) == []


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-20]),
        lambda path: path.write_bytes(b"\xff\xfe{}"),
        lambda path: path.write_bytes(b"[" * 100_000),
        lambda path: path.write_text("[]"),
        lambda path: (path.unlink(), path.mkdir()),
        edited(lambda file: file.pop("cells")),
        edited(lambda file: file.pop("key")),
        edited(lambda file: file["cells"].append(None)),
        *(first_cell(width=width) for width in ("2", "0", "x", 0.5)),
        *(first_cell(batch=batch) for batch in (0, -1, 1.5, "1", True)),
        *(first_cell(ms=ms) for ms in ([], 1.0, ["1"], [True], [None], [1.0, 0.0], [-1.0])),
        *(first_cell(ms=[ms]) for ms in (math.nan, math.inf, 10**400)),
    ],
)
def test_a_damaged_table_is_none_and_one_line(
    store: ProfileStore, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    store.write(TABLE)
    damage(store.path(KEY))
    assert store.read(KEY) is None
    (line,) = warnings(caplog)
    assert str(store.path(KEY)) in line
    assert "damaged" in line
    assert "\n" not in line


def test_quantiles_are_ascending_whatever_the_file_says(store: ProfileStore) -> None:
    store.write(TABLE)
    first_cell(ms=[4, 1.0, 2.0])(store.path(KEY))
    assert store.read(KEY) == TABLE


def test_a_folder_that_cannot_be_written_to_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    store = ProfileStore(tmp_path / "file" / "cache")
    store.write(TABLE)
    (line,) = warnings(caplog)
    assert "not kept" in line
    assert str(store.folder) in line


def test_a_write_that_fails_leaves_the_table_before(
    store: ProfileStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    store.write(TABLE)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        store.write(replace(TABLE, quantiles_ms={(WIDE, 1): (7.0,)}))
    assert len(warnings(caplog)) == 1
    assert store.read(KEY) == TABLE
    assert len(list(store.folder.iterdir())) == 1


def test_the_default_folder_is_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "scala-serve"
    monkeypatch.setenv("HOME", "/home/somebody")
    for ignored in ("", "relative/cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_folder() == Path("/home/somebody/.cache/scala-serve")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody knows the user's home
    assert default_folder().is_absolute()
