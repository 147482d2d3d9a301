"""``scala-serve profile`` around a fake engine, whose batches take exactly as long as the tests say."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from PIL import Image

from scala_model.checkpoint import Checkpoint, read_checkpoint
from scala_model.width import Width
from server.cli import main
from server.engine.contract import DeviceLost, DeviceOutOfMemory
from server.profile_store import Key, ProfileStore
from server.profiling import ROUNDS, latency_figure, measure, sample
from server.settings import Settings
from tests.unit.fake_engine import FakeEngine, usual_seconds
from tests.unit.toy import SIZE, write_toy
from tests.unit.virtual_time import Clock

WIDTHS = tuple(map(Width, (0.25, 0.5, 0.75, 1.0)))
NARROW, WIDE = WIDTHS[0], WIDTHS[-1]


class Engine(FakeEngine):
    """With a device of its own, and any byte for a class."""

    closed = False

    def __init__(self, clock: Clock, max_batch: int = 4) -> None:
        super().__init__(clock, max_batch=max_batch, num_classes=256)
        self.device, self.threads = "Fake GPU", 2
        self.device_bytes = 3 * 2**20

    def memory_bytes(self) -> int:
        assert not self.closed
        return self.device_bytes

    def close(self) -> None:
        self.closed = True

    @property
    def cells(self) -> list[tuple[Width, int]]:
        return [(width, len(images)) for width, images in self.batches]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    """The engine that ``measure`` finds, and time that passes only in it."""
    clock = Clock()
    made = Engine(clock)

    def engine_of(settings: Settings, checkpoint: Checkpoint, cpus: float) -> Engine:
        made.max_batch = settings.max_batch or made.max_batch
        return made

    monkeypatch.setattr("time.monotonic", clock)
    monkeypatch.setattr("server.profiling.engine_of", engine_of)
    return made


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(checkpoint=write_toy(tmp_path / "toy"))


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, settings: Settings) -> Any:
    """Call the command in this process, on the toy and with a cache of its own."""
    for name in [name for name in os.environ if name.startswith("SCALA_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main(["profile", "--checkpoint", str(settings.checkpoint), *map(str, arguments)])
        code = left.value.code
        return Outcome(code if isinstance(code, int) else 0, *capsys.readouterr())

    return call


def no_progress(done: int, total: int) -> None: ...


# -- measuring


def test_every_cell_is_run_30_times_in_turns() -> None:
    engine = Engine(Clock())
    sample(engine, WIDTHS, SIZE, 0.0, no_progress)
    turn = [(width, batch) for batch in (1, 2, 4) for width in WIDTHS]
    assert engine.loaded == [(width, engine.max_batch) for width in WIDTHS]
    assert engine.cells == turn * 31, "once to warm, and 30 times"


def test_the_first_run_does_not_count(engine: Engine) -> None:
    seen: set[tuple[Width, int]] = set()

    def seconds(width: Width, images: list[int]) -> float:
        first = (width, len(images)) not in seen
        seen.add((width, len(images)))
        return 5.0 if first else usual_seconds(width, images)

    engine.seconds = seconds
    samples = sample(engine, WIDTHS, SIZE, 0.0, no_progress)
    assert all(
        runs == pytest.approx([usual_seconds(width, [0] * batch)] * 30) for (width, batch), runs in samples.items()
    )


def test_a_fast_cell_is_run_for_as_long_as_asked_spread_over_all_turns(engine: Engine) -> None:
    samples = sample(engine, WIDTHS, SIZE, 3.0, no_progress)
    for (width, batch), runs in samples.items():
        assert len(runs) >= 30
        assert sum(runs) >= 2.9999, (width, batch)
        assert sum(runs) <= 3.0 + ROUNDS * max(runs)
    first, last = engine.cells.index((NARROW, 1)), len(engine.cells) - engine.cells[::-1].index((NARROW, 1))
    assert last - first > 0.9 * len(engine.cells)


def test_drift_of_the_machine_hits_all_alike(engine: Engine) -> None:
    """It gets three times as slow from the first run to the last."""
    engine.seconds = lambda width, images: usual_seconds(width, images) * (1 + len(engine.batches) / (31 * 12) * 2)
    samples = sample(engine, WIDTHS, SIZE, 0.0, no_progress)
    slowness = [median(runs) / usual_seconds(width, [0] * batch) for (width, batch), runs in samples.items()]
    assert max(slowness) < 1.05 * min(slowness)
    assert min(slowness) > 1.8


def test_progress_goes_from_one_to_all(engine: Engine) -> None:
    told: list[tuple[int, int]] = []
    sample(engine, WIDTHS, SIZE, 0.0, lambda done, total: told.append((done, total)))
    assert told == [(done, 12 * 31) for done in range(1, 12 * 31 + 1)]


@pytest.mark.parametrize("from_run", [0, 200])
def test_what_the_device_has_no_memory_for_is_left_out(engine: Engine, from_run: int) -> None:
    def seconds(width: Width, images: list[int]) -> float:
        if width == WIDE and len(images) >= 2 and len(engine.batches) >= from_run:
            raise DeviceOutOfMemory("no memory")
        return 0.01

    engine.seconds = seconds
    samples = sample(engine, WIDTHS, SIZE, 0.0, no_progress)
    assert samples.keys() == {(w, b) for b in (1, 2, 4) for w in WIDTHS if w != WIDE or b == 1}
    assert {len(runs) for runs in samples.values()} == {30}


def test_no_batch_is_larger_than_one_that_failed(engine: Engine) -> None:
    """The device ran out of memory once, for two images: four would have been measured after that."""

    def seconds(width: Width, images: list[int]) -> float:
        if engine.cells.count((WIDE, 2)) == 10 and len(images) == 2 and width == WIDE:
            raise DeviceOutOfMemory("no memory")
        return 0.01

    engine.seconds = seconds
    assert {batch for width, batch in sample(engine, WIDTHS, SIZE, 0.0, no_progress) if width == WIDE} == {1}


def test_a_width_that_cannot_be_loaded_is_left_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(width: Width, batch: int) -> None:
        if width == WIDE:
            raise DeviceOutOfMemory("no memory")

    monkeypatch.setattr(engine, "load", load)
    assert {width for width, _ in sample(engine, WIDTHS, SIZE, 0.0, no_progress)} == {*WIDTHS} - {WIDE}


def test_a_device_without_memory_for_one_image_is_one_sentence(engine: Engine, settings: Settings) -> None:
    def refuse(width: Width, images: list[int]) -> float:
        raise DeviceOutOfMemory("no memory")

    engine.seconds = refuse
    with pytest.raises(ValueError, match=r"no memory for one image at any width: free some, or use --device cpu$"):
        measure(settings, 0.0, no_progress)
    assert engine.closed


def test_a_lost_device_is_no_result(engine: Engine, settings: Settings) -> None:
    def refuse(width: Width, images: list[int]) -> float:
        raise DeviceLost("gone")

    engine.seconds = refuse
    with pytest.raises(DeviceLost):
        measure(settings, 0.0, no_progress)
    assert engine.closed


# -- the command


def test_the_last_line_is_json_of_every_cell(run: Any, engine: Engine, settings: Settings) -> None:
    engine.seconds = lambda width, images: (  # the slowest 3 of 30 runs take 50 ms more
        usual_seconds(width, images) + (0.05 if len(engine.batches) > 31 * 12 - 3 * 12 else 0)
    )
    outcome = run("--seconds", 0)
    assert outcome.code == 0, outcome.err
    last = json.loads(outcome.out.splitlines()[-1])
    cells = last.pop("cells")
    assert last == {
        "device": "Fake GPU",
        "engine": "fake",
        "checkpoint": str(settings.checkpoint),
        "threads": 2,
        "memory_bytes": 3 * 2**20,
    }
    assert [(cell["width"], cell["batch"]) for cell in cells] == [(float(w), b) for w in WIDTHS for b in (1, 2, 4)]
    for cell in cells:
        p50_ms = cell["width"] * 20 * (1 + cell["batch"])
        assert cell["p50_ms"] == pytest.approx(p50_ms)
        assert cell["p99_ms"] == pytest.approx(p50_ms + 50)
        assert (cell["runs"], cell["dominated"]) == (30, False)


def test_the_table_is_for_people(run: Any, engine: Engine) -> None:
    """The middle widths take as long as the full one."""
    engine.seconds = lambda width, images: usual_seconds(width if width == NARROW else WIDE, images)
    out = run("--seconds", 0).out
    for words in (
        "width",
        "batch 1",
        "batch 4",
        "40.00 / 40.00",
        "40.00 / 40.00 *",  # at 0.5
        "* dominated",
        "160 (4)",  # images/s: four in 25 ms
        "40 (4)",
        "device memory: 3 MiB",
    ):
        assert words in out, words
    engine.device_bytes, engine.closed = 0, False
    engine.seconds = usual_seconds
    out = run("--seconds", 0).out
    assert "dominated:" not in out
    assert "device memory" not in out


def test_a_cell_without_memory_is_blank(run: Any, engine: Engine) -> None:
    def seconds(width: Width, images: list[int]) -> float:
        if width == WIDE and len(images) == 4:
            raise DeviceOutOfMemory("no memory")
        return 0.01 * len(images)

    engine.seconds = seconds
    outcome = run("--seconds", 0)
    (row,) = [line for line in outcome.out.splitlines() if line.startswith("│ 1 ")]
    assert [cell.strip() for cell in row.split("│")][1:-1] == ["1", "10.00 / 10.00", "20.00 / 20.00", "", "100 (1)"]
    cells = json.loads(outcome.out.splitlines()[-1])["cells"]
    assert {(cell["width"], cell["batch"]) for cell in cells if cell["width"] == 1} == {(1.0, 1), (1.0, 2)}


def test_progress_goes_to_standard_error(run: Any, engine: Engine) -> None:
    outcome = run("--seconds", 0)
    assert "measuring" in outcome.err
    assert "measuring" not in outcome.out


@pytest.mark.parametrize("chosen", [False, True])
def test_what_was_measured_is_kept_for_the_server(
    run: Any, engine: Engine, settings: Settings, tmp_path: Path, chosen: bool
) -> None:
    assert run("--seconds", 0, *(("--profile-dir", tmp_path / "kept") if chosen else ())).code == 0
    assert settings.checkpoint is not None
    sha256 = read_checkpoint(settings.checkpoint).card["weights_sha256"]
    folder = tmp_path / "kept" if chosen else tmp_path / "cache" / "scala-serve"
    table = ProfileStore(folder).read(Key("Fake GPU", "fake", 2, sha256, 4))
    assert table is not None
    assert table.scaled_samples_s(WIDE, 4, 1.0) == pytest.approx([0.1] * 20)
    assert len(table.quantiles_ms) == 12


def test_a_cache_that_cannot_be_written_costs_a_warning(
    run: Any, engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    outcome = run("--seconds", 0, "--profile-dir", tmp_path / "file")
    assert outcome.code == 0
    assert json.loads(outcome.out.splitlines()[-1])["cells"]
    assert "not kept" in caplog.text


def test_settings_come_from_everywhere(run: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALA_MAX_BATCH", "2")
    assert {cell["batch"] for cell in json.loads(run("--seconds", 0).out.splitlines()[-1])["cells"]} == {1, 2}
    outcome = run("--max-batch", "many")
    assert outcome == Outcome(
        2, "", "scala-serve: flag --max-batch is 'many'; it must be a whole number from 1 to 4096\n"
    )


def test_json_stands_alone_where_asked_and_the_plot_is_written(run: Any, engine: Engine, tmp_path: Path) -> None:
    outcome = run("--seconds", 0, "--json", "--plot", tmp_path / "x.png")
    assert outcome.code == 0, outcome.err
    (line,) = outcome.out.splitlines()
    assert json.loads(line)["cells"]
    with Image.open(tmp_path / "x.png") as image:
        image.load()
        assert image.format == "PNG"
    assert "matplotlib.pyplot" not in sys.modules


def test_what_cannot_be_written_is_refused_before_anything_is_measured(
    run: Any, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = run("--plot", tmp_path / "nowhere" / "x")
    assert outcome.code == 2
    assert f"there is no folder {tmp_path / 'nowhere'}; make it first" in outcome.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("--plot", tmp_path / "x.png")
    assert outcome == Outcome(2, "", "scala-serve: --plot needs matplotlib: pip install 'scala-serve[train]'\n")
    assert not engine.batches


# -- the picture


def test_the_picture_has_a_line_a_width_from_p50_to_p99(engine: Engine, settings: Settings) -> None:
    engine.seconds = lambda width, images: usual_seconds(width, images) + (0.05 if len(engine.batches) > 336 else 0)
    (axes,) = latency_figure(measure(settings, 0.0, no_progress)).axes
    lines = {str(bars.get_label()): bars for bars in axes.containers if isinstance(bars, ErrorbarContainer)}
    assert list(lines) == ["0.25", "0.5", "0.75", "1"]
    wide, _, (bars,) = lines["1"]
    assert np.asarray(wide.get_xdata()).tolist() == [1, 2, 4]
    assert np.asarray(wide.get_ydata()).tolist() == pytest.approx([40, 60, 100])
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    assert ends == [pytest.approx([40, 90]), pytest.approx([60, 110]), pytest.approx([100, 150])]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert "ms" in axes.get_ylabel()
    assert "Fake GPU, fake, 2 CPU threads" in axes.get_title()
