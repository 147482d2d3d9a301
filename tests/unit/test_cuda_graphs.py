"""All of the GPU engine that does not need a GPU: buckets, padding, fallback, errors, and whose turn the device is."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from scala_model.checkpoint import Checkpoint, build_model, read_checkpoint
from scala_model.normalise import normalise
from scala_model.width import Width
from server.engine import cuda_graphs
from server.engine.contract import DeviceLost, DeviceOutOfMemory, Engine
from server.engine.cuda_graphs import CudaGraphsEngine, NoStream, Turns, Work
from server.engine.device_errors import device_errors
from server.engine.serving_forward import BlockFunction, BlockShape, BlockWeights, ServingForward, block
from tests.unit.toy import SIZE, write_toy

WIDE, NARROW = Width(1.0), Width(0.25)
BUCKETS = [6, 4, 2, 1]  # of max_batch 6, as they are recorded


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return read_checkpoint(write_toy(tmp_path_factory.mktemp("checkpoints") / "toy"))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every forward pass."""
    seen: list[int] = []
    forward = ServingForward.__call__

    def watched(self: ServingForward, pixels: Tensor, run_block: BlockFunction) -> Tensor:
        seen.append(len(pixels))
        return forward(self, pixels, run_block)

    monkeypatch.setattr(ServingForward, "__call__", watched)
    return seen


def loaded(checkpoint: Checkpoint, *widths: Width, max_batch: int = 6, compile: bool = False) -> CudaGraphsEngine:
    engine = CudaGraphsEngine(checkpoint, device="cpu", max_batch=max_batch, compile=compile)
    for width in widths:
        engine.load(width, engine.max_batch)
    return engine


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, SIZE, SIZE, 3), np.uint8)


@torch.inference_mode()
def specified(checkpoint: Checkpoint, pixels: NDArray[np.uint8], width: Width) -> NDArray[np.float32]:
    normalised = normalise(torch.from_numpy(pixels), checkpoint.preprocessing)
    answers: NDArray[np.float32] = build_model(checkpoint)(normalised, width).softmax(-1).numpy()
    return answers


def record_with(monkeypatch: pytest.MonkeyPatch, record: Callable[[Work], Work]) -> None:
    monkeypatch.setattr(NoStream, "record", lambda self, work: record(work))


# -- what it computes


def test_is_an_engine(checkpoint: Checkpoint) -> None:
    engine: Engine = loaded(checkpoint)
    assert engine.name == f"cuda_graphs {torch.__version__}"
    assert engine.device
    assert (engine.max_batch, engine.threads, engine.memory_bytes()) == (6, 1, 0)


def test_answers_as_specified_at_every_width(checkpoint: Checkpoint) -> None:
    engine = loaded(checkpoint, *checkpoint.config.widths)
    for width in (*checkpoint.config.widths, *checkpoint.config.widths):
        answers = engine.run(images(5), width)
        assert answers.dtype == np.float32
        assert answers.shape == (5, 200)
        np.testing.assert_allclose(answers, specified(checkpoint, images(5), width), atol=0.02)
        np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)


def test_pixels_may_be_read_only(checkpoint: Checkpoint) -> None:
    pixels = images(2)
    pixels.setflags(write=False)
    assert loaded(checkpoint, WIDE).run(pixels, WIDE).shape == (2, 200)


def test_an_answer_is_not_overwritten_by_the_next(checkpoint: Checkpoint) -> None:
    engine = loaded(checkpoint, WIDE)
    first = engine.run(images(2), WIDE)
    before = first.copy()
    engine.run(images(2, seed=1), WIDE)
    assert np.array_equal(first, before)


# -- buckets


@pytest.mark.parametrize(("batch", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 6), (6, 6)])
def test_a_batch_is_padded_to_the_next_bucket_and_only_its_rows_come_back(
    checkpoint: Checkpoint, forwards: list[int], batch: int, bucket: int
) -> None:
    engine = loaded(checkpoint, WIDE)
    engine.run(images(6, seed=1), WIDE)  # leaves its images in the rows that are padding next
    answers = engine.run(images(batch), WIDE)
    assert forwards == [6, bucket]
    assert len(answers) == batch
    np.testing.assert_allclose(answers, specified(checkpoint, images(batch), WIDE), atol=0.02)


def test_every_bucket_of_every_loaded_width_is_recorded_once_the_largest_first(
    checkpoint: Checkpoint, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def recorded(work: Work) -> Work:
        work()
        return work

    record_with(monkeypatch, recorded)
    loaded(checkpoint, NARROW, WIDE)
    assert forwards == BUCKETS * 2


def test_more_than_the_largest_batch_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"a batch of 7 images is more than max_batch 6: send it in parts"):
        loaded(checkpoint, WIDE).run(images(7), WIDE)


def test_a_bucket_that_no_memory_was_left_for_runs_as_it_is(
    checkpoint: Checkpoint, forwards: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    records = iter(BUCKETS)

    def recorded(work: Work) -> Work:
        if next(records) in (6, 4):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return work

    record_with(monkeypatch, recorded)
    engine = loaded(checkpoint, WIDE)
    assert caplog.messages == [
        f"width 1 runs batches of {bucket} without a graph: CUDA out of memory. Tried to allocate 2.00 GiB."
        for bucket in (6, 4)
    ]
    np.testing.assert_allclose(engine.run(images(3), WIDE), specified(checkpoint, images(3), WIDE), atol=0.02)
    for batch in (5, 2, 1):
        engine.run(images(batch), WIDE)
    assert forwards == [3, 5, 2, 1]


# -- compiled blocks


def test_only_graphs_of_large_buckets_are_compiled(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(x_BTC: Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> Tensor:
        seen.append(len(x_BTC))
        return block(x_BTC, w, shape, num_read)

    monkeypatch.setattr(cuda_graphs, "compiled_block", lambda: watched)
    engine, plain = (loaded(checkpoint, WIDE, max_batch=40, compile=compile) for compile in (True, False))
    for batch in (40, 32, 16, 1):
        assert np.array_equal(engine.run(images(batch), WIDE), plain.run(images(batch), WIDE))
    assert seen == [40, 32]  # the toy is one block deep
    engine._graphs.clear()
    engine.run(images(40), WIDE)
    assert seen == [40, 32]  # nobody waits for a compiler


# -- errors


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB."), DeviceOutOfMemory),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), DeviceOutOfMemory),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), DeviceLost),
        (torch.AcceleratorError("the device is gone"), DeviceLost),
        (RuntimeError("CUDA error: unspecified launch failure"), DeviceLost),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), RuntimeError),
        (ValueError("CUDA error"), ValueError),
    ],
)
def test_what_torch_raises_is_told_in_the_contracts_words(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    engine = loaded(checkpoint, WIDE)

    def fails(*arguments: object) -> Tensor:
        raise raised

    with monkeypatch.context() as broken:
        broken.setattr(ServingForward, "__call__", fails)
        with pytest.raises(Exception, match=r".") as caught:
            engine.run(images(1), WIDE)
    assert caught.type is (expected if expected in (DeviceLost, DeviceOutOfMemory) else type(raised))
    assert str(caught.value) == str(raised).partition("\n")[0]
    assert len(engine.run(images(1), WIDE)) == 1  # the next one has its turn


def test_a_recording_that_failed_twice_failed_for_its_first_reason() -> None:
    def record() -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        finally:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")

    with pytest.raises(DeviceOutOfMemory, match="Tried to allocate"), device_errors():
        record()


def test_a_lost_device_ends_the_loading(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(work: Work) -> Work:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    record_with(monkeypatch, lost)
    with pytest.raises(DeviceLost):
        loaded(checkpoint, WIDE)


def test_out_of_memory_lets_go_of_the_batch_before_the_cache_is_emptied(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Tensor]] = []
    left: list[Tensor | None] = []

    def fails() -> None:
        activations = torch.zeros(4)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(held[0]()))
    with pytest.raises(DeviceOutOfMemory), device_errors():
        fails()
    assert left == [None]


# -- turns


def until_someone_waits(turns: Turns) -> None:
    while not turns._next.locked():
        time.sleep(0.001)


def test_who_waits_goes_before_who_asks_again() -> None:
    turns, order = Turns(), list[str]()

    def wait() -> None:
        with turns.next():
            order.append("who waited")

    waiting = threading.Thread(target=wait, daemon=True)
    with turns.next():
        waiting.start()
        until_someone_waits(turns)
    with turns.next():
        order.append("who asked again")
    waiting.join()
    assert order == ["who waited", "who asked again"]


def test_a_batch_waits_for_one_recording_not_for_a_whole_width(
    checkpoint: Checkpoint, forwards: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = loaded(checkpoint, WIDE)
    recorded, begun = list[Work](), threading.Event()

    def slowly(work: Work) -> Work:
        if not recorded:
            begun.set()
            until_someone_waits(engine._turns)
            assert forwards == []  # nobody else was at the device
        recorded.append(work)
        return work

    record_with(monkeypatch, slowly)
    loader = threading.Thread(target=engine.load, args=(NARROW, engine.max_batch), daemon=True)
    loader.start()
    begun.wait()
    monkeypatch.setattr(engine._stream, "wait", lambda: forwards.append(len(recorded)))
    engine.run(images(1), WIDE)
    loader.join()
    assert forwards == [1, 1]  # an image, after one recording
    assert len(recorded) == 4
    assert len(engine.run(images(3), NARROW)) == 3


# -- the end


def test_closing_lets_go_of_the_weights(checkpoint: Checkpoint) -> None:
    engine = loaded(checkpoint, WIDE)
    weight = weakref.ref(engine._weights["head.weight"])
    engine.close()
    gc.collect()
    assert weight() is None
