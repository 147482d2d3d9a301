"""The OpenVINO engine beyond its agreement with the specification, for which see tests/golden/test_engines.py."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from scala_model.checkpoint import Checkpoint, read_checkpoint
from scala_model.width import Width
from server.engine import openvino_engine
from server.engine.contract import DeviceOutOfMemory
from server.engine.openvino_engine import OpenVinoEngine, Originals
from tests.unit.toy import SIZE, write_toy

ROOT = Path(__file__).parents[2]
WIDE = Width(1.0)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy"))


def loaded(checkpoint: Checkpoint, *, threads: int = 1, max_batch: int = 16) -> OpenVinoEngine:
    engine = OpenVinoEngine(checkpoint, threads=threads, max_batch=max_batch, precision="f32")
    for width in checkpoint.config.widths:
        engine.load(width, engine.max_batch)
    return engine


def images(count: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 15, 16])
def test_an_image_gets_the_same_answer_in_any_batch(checkpoint: Checkpoint, count: int) -> None:
    engine, pixels = loaded(checkpoint), images(16)
    alone = np.concatenate([engine.run(pixels[i : i + 1], WIDE) for i in range(count)])
    together = engine.run(pixels[:count], WIDE)
    assert together.dtype == np.float32
    assert together.shape == (count, 200)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1.0, atol=1e-5)


@pytest.mark.parametrize(
    ("threads", "count", "sizes"),
    [
        (1, 1, [1]),
        (1, 7, [4, 2, 1]),
        (1, 16, [4] * 4),
        (2, 16, [8, 8]),
        (3, 16, [8, 8]),
        (4, 16, [16]),
        (4, 13, [8, 4, 1]),
    ],
)
def test_pieces_are_powers_of_two_up_to_four_images_a_thread(
    checkpoint: Checkpoint, threads: int, count: int, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_engine, "LIGHT_BYTES", 0)
    pixels = images(count)
    pieces = list(OpenVinoEngine(checkpoint, threads=threads, max_batch=16)._pieces(pixels, WIDE))
    assert [len(piece) for piece in pieces] == sizes
    assert np.array_equal(np.concatenate(pieces), pixels)


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (2, [1, 1]), (3, [4]), (4, [4]), (6, [4, 1, 1]), (7, [4, 4]), (8, [4, 4])]
)
def test_on_one_thread_a_light_network_runs_one_image_or_four_and_three_as_four(
    checkpoint: Checkpoint, count: int, sizes: list[int]
) -> None:
    engine, pixels = loaded(checkpoint), images(count)
    assert [len(piece) for piece in engine._pieces(pixels, WIDE)] == sizes
    alone = np.concatenate([engine.run(pixels[i : i + 1], WIDE) for i in range(count)])
    np.testing.assert_allclose(engine.run(pixels, WIDE), alone, atol=1e-6)


def test_an_answer_is_not_overwritten_by_the_next(checkpoint: Checkpoint) -> None:
    engine, pixels = loaded(checkpoint), images(2)
    first = engine.run(pixels[:1], WIDE)
    before = first.copy()
    engine.run(pixels[1:], WIDE)
    assert np.array_equal(first, before)


def test_the_network_with_one_image_fixed_computes_what_the_open_one_does(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = loaded(checkpoint)
    monkeypatch.setattr(openvino_engine, "LIGHT_BYTES", 0)
    only_open = loaded(checkpoint)
    assert [(len(engine._single), len(engine._many)) for engine in (both, only_open)] == [(4, 4), (0, 4)]
    for width in checkpoint.config.widths:
        np.testing.assert_allclose(both.run(images(1), width), only_open.run(images(1), width), atol=1e-6)


def test_the_weights_are_let_go_once_every_width_is_loaded(checkpoint: Checkpoint) -> None:
    engine = OpenVinoEngine(checkpoint, threads=1, max_batch=4)
    for width in checkpoint.config.widths:
        assert engine._checkpoint.weights
        engine.load(width, engine.max_batch)
    assert not engine._checkpoint.weights


def test_a_narrow_width_can_run_one_image_before_it_is_compiled_for_batches(checkpoint: Checkpoint) -> None:
    engine = OpenVinoEngine(checkpoint, threads=1, max_batch=4, precision="f32")
    for width in checkpoint.config.widths:
        engine.load(width, 1)
    assert not engine._checkpoint.weights
    alone = engine.run(images(1), WIDE)
    assert not engine._many
    engine.load(WIDE, 4)
    np.testing.assert_allclose(engine.run(images(3), WIDE)[:1], alone, atol=1e-6)
    request = engine._many[WIDE]
    engine.load(WIDE, 4)
    assert engine._many[WIDE] is request


def test_a_width_may_be_loaded_while_another_runs(checkpoint: Checkpoint) -> None:
    engine = OpenVinoEngine(checkpoint, threads=1, max_batch=4, precision="f32")
    engine.load(WIDE, engine.max_batch)
    before = engine.run(images(3), WIDE)
    engine.load(Width(0.25), engine.max_batch)
    assert np.array_equal(engine.run(images(3), WIDE), before)


# -- runs that fail


class Failing:
    """In the place of a compiled network."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def set_input_tensor(self, tensor: object) -> None: ...

    def infer(self) -> None:
        raise self._error


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (RuntimeError("Exception from node.cpp:823:\n[CPU] Transpose node with name 'T' can't alloc\n"), "can't alloc"),
        (RuntimeError("Exception from plugin.cpp:54:\nstd::bad_alloc\n\n"), "std::bad_alloc"),
        (MemoryError("Unable to allocate 1 GiB"), "Unable to allocate 1 GiB"),
    ],
)
def test_a_lack_of_memory_is_told_in_the_words_of_the_contract(
    checkpoint: Checkpoint, error: Exception, seen: str
) -> None:
    engine = loaded(checkpoint)
    engine._many[WIDE] = Failing(error)
    with pytest.raises(DeviceOutOfMemory) as told:
        engine.run(images(8), WIDE)
    assert str(told.value).endswith(seen)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [RuntimeError("can't alloc"), RuntimeError("std::future_error: Broken promise")])
def test_a_network_that_failed_is_not_run_again_before_it_was_compiled_anew(
    checkpoint: Checkpoint, error: Exception
) -> None:
    """It may give other classes than before, without an error."""
    engine, pixels = loaded(checkpoint), images(8)
    before = engine.run(pixels, WIDE)
    engine._many[WIDE] = Failing(error)
    with pytest.raises((DeviceOutOfMemory, RuntimeError)):
        engine.run(pixels, WIDE)
    for count in (1, 8):
        with pytest.raises(DeviceOutOfMemory, match="width 1 is not loaded any more"):
            engine.run(pixels[:count], WIDE)
    assert engine.run(pixels, Width(0.25)).shape == (8, 200), "another width is another network"
    assert not engine._checkpoint.weights, "what it is compiled from does not need them"
    engine.load(WIDE, 8)
    np.testing.assert_allclose(engine.run(pixels, WIDE), before, atol=1e-6)
    np.testing.assert_allclose(engine.run(pixels[:1], WIDE), before[:1], atol=1e-6)


# -- the originals of the weights


def resident_bytes(originals: Originals) -> int:
    """Of the mapping that holds the originals, by the kernel's account."""
    address = np.frombuffer(originals._memory, np.uint8).ctypes.data
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    next(line for line in lines if line.startswith(f"{address:x}-"))
    return 1024 * int(next(line for line in lines if line.startswith("Rss:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_originals_leave_memory_and_come_back_when_they_are_read() -> None:
    matrix = np.random.default_rng(0).standard_normal((1000, 500)).astype(np.float32)
    originals = Originals(matrix.nbytes)
    node = originals.constant(matrix)
    assert resident_bytes(originals) >= matrix.nbytes
    originals.release()
    assert resident_bytes(originals) < 100_000
    assert np.array_equal(node.get_data(), matrix)


def test_without_a_temporary_file_the_originals_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_place(*_: object) -> None:
        raise OSError("read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_place)
    matrix = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    originals = Originals(matrix.nbytes)
    node = originals.constant(matrix)
    originals.release()
    assert np.array_equal(node.get_data(), matrix)


def test_small_constants_take_no_place_in_the_file() -> None:
    originals = Originals(0)
    small = np.arange(10, dtype=np.float32)
    assert np.array_equal(originals.constant(small).get_data(), small)
    assert originals._used == 0


# -- what a server on a CPU loads


def test_serving_on_a_cpu_loads_no_torch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = write_toy(tmp_path / "toy")
    code = f"""
import sys
import numpy as np
from scala_model.checkpoint import read_checkpoint
from server.engine import engine_of
from server.settings import Settings

checkpoint = read_checkpoint({str(folder)!r})
engine = engine_of(Settings(device="cpu"), checkpoint, 1.0)
for width in checkpoint.config.widths:
    engine.load(width, engine.max_batch)
    assert engine.run(np.zeros((3, {SIZE}, {SIZE}, 3), np.uint8), width).shape == (3, 200)
assert engine.name.startswith("openvino"), engine.name
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_a_signal_is_survived_after_engines_have_come_and_gone(tmp_path: Path) -> None:
    """With faulthandler on and a second engine made before the first went, the signal's handler had no stack left."""
    folder = write_toy(tmp_path / "toy")
    code = f"""
import faulthandler, os, signal
from scala_model.checkpoint import read_checkpoint
from server.engine.openvino_engine import OpenVinoEngine

faulthandler.enable()
signal.signal(signal.SIGTERM, lambda *_: print("handled"))

def engine():
    made = OpenVinoEngine(read_checkpoint({str(folder)!r}), threads=1, max_batch=1, precision="f32")
    made.load(read_checkpoint({str(folder)!r}).config.widths[0], 1)
    return made

one, other = engine(), engine()
del one
del other
os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr
