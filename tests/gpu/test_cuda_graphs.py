"""The GPU engine on a GPU: its graphs compute what is specified, and all widths share one set of weights."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from scala_model import ScalaViT
from scala_model.checkpoint import Checkpoint, build_model, default_checkpoint, read_checkpoint
from scala_model.normalise import normalise
from scala_model.preprocess import Preprocessing
from scala_model.train.layouts import open_split
from scala_model.width import Width
from server.engine.contract import DeviceOutOfMemory
from server.engine.cuda_graphs import CudaGraphsEngine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]
MAX_BATCH = 48  # no power of two: the last bucket is none either


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return read_checkpoint(default_checkpoint())


@pytest.fixture(scope="module")
def model(checkpoint: Checkpoint) -> ScalaViT:
    """The specification: eager and in float32, on the same device."""
    return build_model(checkpoint).to("cuda")


@pytest.fixture(scope="module")
def engine(checkpoint: Checkpoint) -> Iterator[CudaGraphsEngine]:
    engine = CudaGraphsEngine(checkpoint, device="cuda", max_batch=MAX_BATCH)
    for width in checkpoint.config.widths:
        engine.load(width, engine.max_batch)
    yield engine
    engine.close()


def images(count: int, seed: int = 0) -> NDArray[np.uint8]:
    """Noise on a colour of their own, of the shipped checkpoint's size."""
    random = np.random.default_rng(seed)
    colours, noise = random.integers(0, 192, (count, 1, 1, 3)), random.integers(0, 64, (count, 48, 48, 3))
    pixels: NDArray[np.uint8] = (colours + noise).astype(np.uint8)
    return pixels


@torch.inference_mode()
def specified(model: ScalaViT, pixels: NDArray[np.uint8], width: Width) -> NDArray[np.float32]:
    normalised = normalise(torch.from_numpy(pixels).to("cuda"), Preprocessing(48))
    answers: NDArray[np.float32] = model(normalised, width).softmax(-1).cpu().numpy()
    return answers


def test_names_the_hardware_and_counts_its_memory(engine: CudaGraphsEngine) -> None:
    assert engine.device == torch.cuda.get_device_name()
    assert engine.memory_bytes() > sum(tensor.nbytes for tensor in engine._weights.values())


def test_every_bucket_of_every_width_is_a_graph(engine: CudaGraphsEngine, checkpoint: Checkpoint) -> None:
    buckets = (1, 2, 4, 8, 16, 32, 48)
    assert engine._graphs.keys() == {(width, bucket) for width in checkpoint.config.widths for bucket in buckets}


@pytest.mark.parametrize("batch", [1, 3, 16, 33, 48])
def test_answers_as_specified_in_any_order_of_widths(
    engine: CudaGraphsEngine, checkpoint: Checkpoint, model: ScalaViT, batch: int
) -> None:
    widths = checkpoint.config.widths
    for turn, width in enumerate((*widths, *reversed(widths), *widths)):
        pixels = images(batch, seed=turn)
        answers = engine.run(pixels, width)
        assert answers.shape == (batch, 200)
        np.testing.assert_allclose(answers, specified(model, pixels, width), atol=0.02)
        np.testing.assert_allclose(answers.sum(1), 1, atol=1e-5)


def test_top_1_of_real_images_is_that_of_the_specification(
    engine: CudaGraphsEngine, checkpoint: Checkpoint, model: ScalaViT, shared_data: Path
) -> None:
    """All 10,000: of 500, on a CPU, 98.8 to 99.4 % agree, and 99.2 to 99.5 % of all."""
    data = open_split(shared_data / "tiny-imagenet", "val").decode_all(checkpoint.preprocessing)
    batches = np.array_split(data.pixels.numpy(), 250)
    for width in checkpoint.config.widths:
        ours = np.concatenate([engine.run(batch, width).argmax(1) for batch in batches])
        theirs = np.concatenate([specified(model, batch, width).argmax(1) for batch in batches])
        assert (ours == theirs).mean() >= 0.99
        labels = data.labels.numpy()
        assert abs((ours == labels).mean() - (theirs == labels).mean()) <= 0.003


@pytest.mark.parametrize("batch", [3, 5, 33])
def test_a_padded_batch_answers_like_a_full_one(engine: CudaGraphsEngine, checkpoint: Checkpoint, batch: int) -> None:
    for width in checkpoint.config.widths:
        full = engine.run(images(MAX_BATCH), width)
        np.testing.assert_allclose(engine.run(images(MAX_BATCH)[:batch], width), full[:batch], atol=0.02)


def test_a_batch_without_a_graph_answers_like_one_with(engine: CudaGraphsEngine) -> None:
    width, pixels = Width(0.5), images(8)
    replayed, graph = engine.run(pixels, width), engine._graphs.pop((width, 8))
    try:
        np.testing.assert_allclose(engine.run(pixels, width), replayed, atol=0.02)
    finally:
        engine._graphs[width, 8] = graph


def test_the_weights_of_all_widths_are_those_of_the_widest(checkpoint: Checkpoint) -> None:
    """What is allocated, graphs aside: these are recorded first, and hold nothing that counts as allocated."""
    gc.collect()
    engine = CudaGraphsEngine(checkpoint, device="cuda", max_batch=1)
    *others, widest = checkpoint.config.widths
    engine.load(widest, engine.max_batch)
    alone = torch.cuda.memory_allocated()
    for width in others:
        engine.load(width, engine.max_batch)
    weights = sum(tensor.nbytes for tensor in engine._weights.values())
    assert torch.cuda.memory_allocated() - alone <= 0.05 * weights
    engine.close()


def test_graphs_share_their_memory(checkpoint: Checkpoint) -> None:
    """Narrower widths find room in the pool of the widest, but for what the allocator rounds up (2 MiB and 20 MiB)."""
    gc.collect()
    torch.cuda.empty_cache()
    engine = CudaGraphsEngine(checkpoint, device="cuda", max_batch=256)
    *others, widest = checkpoint.config.widths
    before = engine.memory_bytes()
    engine.load(widest, engine.max_batch)
    first = engine.memory_bytes() - before
    for width in others:
        engine.load(width, engine.max_batch)
    assert engine.memory_bytes() - before <= 1.5 * first + 64 * 2**20
    engine.close()


def test_widths_are_loaded_while_another_runs(checkpoint: Checkpoint, model: ScalaViT) -> None:
    *others, widest = checkpoint.config.widths
    engine = CudaGraphsEngine(checkpoint, device="cuda", max_batch=MAX_BATCH)
    engine.load(widest, engine.max_batch)
    before = engine.run(images(5), widest)
    with ThreadPoolExecutor(1) as loader:
        loading = [loader.submit(engine.load, width, engine.max_batch) for width in others]
        while not all(future.done() for future in loading):
            np.testing.assert_allclose(engine.run(images(5), widest), before, atol=1e-6)
        assert [future.result() for future in loading] == [None] * len(others)
    for width in others:
        np.testing.assert_allclose(engine.run(images(5), width), specified(model, images(5), width), atol=0.02)
    engine.close()


def test_it_serves_on_after_it_ran_out_of_memory(checkpoint: Checkpoint, model: ScalaViT) -> None:
    """A graph of 16384 images would need 2 GB."""
    engine, widest = CudaGraphsEngine(checkpoint, device="cuda", max_batch=16384), checkpoint.config.widths[-1]
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 800e6) / total)
    try:
        engine.load(widest, engine.max_batch)
        assert (widest, 16384) not in engine._graphs
        with pytest.raises(DeviceOutOfMemory, match="out of memory"):
            engine.run(np.zeros((16384, 48, 48, 3), np.uint8), widest)
        np.testing.assert_allclose(engine.run(images(2), widest), specified(model, images(2), widest), atol=0.02)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        engine.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's compiler about torch
def test_compiled_graphs_answer_as_specified(checkpoint: Checkpoint, model: ScalaViT) -> None:
    engine = CudaGraphsEngine(checkpoint, device="cuda", max_batch=32, compile=True)
    for width in (checkpoint.config.widths[0], checkpoint.config.widths[-1]):
        engine.load(width, engine.max_batch)
        np.testing.assert_allclose(engine.run(images(32), width), specified(model, images(32), width), atol=0.02)
    engine.close()
