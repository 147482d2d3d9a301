"""The GPU engine: every width and batch bucket a CUDA graph, over one bfloat16 set of weights.

At a narrow width a block is a dozen kernels of a few microseconds, which Python launches slower than they run; a graph
launches those of all blocks at once. Batches are padded up to the next bucket, in buffers that stay where they are. The
graphs take turns with one pool of memory, so together they need little more than the largest.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray

from scala_model.checkpoint import Checkpoint
from scala_model.width import Width
from server.engine.contract import DeviceOutOfMemory
from server.engine.device_errors import device_errors
from server.engine.serving_forward import (
    BlockFunction,
    BlockShape,
    BlockWeights,
    ServingForward,
    block,
    resident_weights,
)
from server.latency_profile import buckets_up_to
from server.machine import cpu_name
from server.types import Probabilities

WARM_UP_RUNS = 2  # the first loads kernels or compiles them, which a recording must not
MIN_COMPILED_BATCH = 32  # smaller ones do not wait for memory, whose traffic is what compiling saves
MAX_COMPILED = 256  # variants of the block; a bucket of a width has two, for all tokens and for the leading ones
Work = Callable[[], None]
log = logging.getLogger("scala.engine")


class CudaGraphsEngine:
    """On ``device``: ``cuda``, or for tests ``cpu``, where all is the same but that work is done instead of recorded.

    With ``compile``, what the graphs of large buckets record is compiled, which fuses norms, GELU and sums. A bucket
    then takes ten seconds or more to load, and ``run`` waits for it: for benchmarks, or where nothing is served yet.
    """

    name = f"cuda_graphs {torch.__version__}"
    threads = 1

    def __init__(self, checkpoint: Checkpoint, *, device: str, max_batch: int, compile: bool = False) -> None:
        self.max_batch, self._config = max_batch, checkpoint.config
        self._place = torch.device(device)
        cuda = self._place.type == "cuda"
        self.device = torch.cuda.get_device_name(self._place) if cuda else cpu_name()
        self._stream = CudaStream(self._place) if cuda else NoStream()
        self._turns, self._loading, self._buckets = Turns(), Lock(), buckets_up_to(max_batch)
        self._compiled_block = compiled_block() if compile else block
        self._forwards: dict[Width, ServingForward] = {}
        self._graphs: dict[tuple[Width, int], Work] = {}
        size, num_classes = checkpoint.config.image_size, checkpoint.config.num_classes
        images, answers = (max_batch, size, size, 3), (max_batch, num_classes)
        with self._turn():
            self._weights = resident_weights(checkpoint, self._place, torch.bfloat16)
            self._pixels = torch.zeros(images, dtype=torch.uint8, device=self._place)
            self._probabilities = torch.zeros(answers, device=self._place)
            # Only pinned memory is copied while the CPU goes on.
            self._host_pixels = torch.zeros(images, dtype=torch.uint8, pin_memory=cuda)
            self._host_probabilities = torch.zeros(answers, pin_memory=cuda)

    def load(self, width: Width, batch: int) -> None:
        """Record the width's graphs, the largest first: the smaller ones then fit into its memory.

        A bucket for whose graph there is no memory does without. Raises DeviceLost, or what else torch has to say.
        """
        with self._loading:  # one at a time, as turns are for two
            before = self.memory_bytes()
            self._forwards.setdefault(width, ServingForward(self._config, self._weights, width))
            for bucket in reversed(self._buckets[: 1 + bisect_left(self._buckets, batch)]):
                if (width, bucket) not in self._graphs:
                    self._record(width, bucket)
            log.info("width %s: its graphs took %.0f MB", width, (self.memory_bytes() - before) / 1e6)

    def _record(self, width: Width, bucket: int) -> None:
        try:
            with self._turn():
                self._graphs[width, bucket] = self._graph(width, bucket)
        except DeviceOutOfMemory as error:
            log.warning("width %s runs batches of %d without a graph: %s", width, bucket, error)

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        """As the contract says. Raises ValueError for more than ``max_batch`` images."""
        batch = len(pixels)
        if batch > self.max_batch:
            raise ValueError(f"a batch of {batch} images is more than max_batch {self.max_batch}: send it in parts")
        self._host_pixels[:batch].numpy()[...] = pixels
        with self._turn():
            self._pixels[:batch].copy_(self._host_pixels[:batch], non_blocking=True)
            self._compute(width, batch)
            self._host_probabilities[:batch].copy_(self._probabilities[:batch], non_blocking=True)
            self._stream.wait()
        return self._host_probabilities[:batch].numpy().copy()

    def memory_bytes(self) -> int:
        """All that torch's allocator holds there: weights, buffers, the graphs' memory, workspaces; not the context."""
        return torch.cuda.memory_reserved(self._place) if self._place.type == "cuda" else 0

    def close(self) -> None:
        for held in (self._graphs, self._forwards, self._weights):
            held.clear()

    def _compute(self, width: Width, batch: int) -> None:
        """By the graph of the next bucket, whose further rows hold images of earlier batches; without one, as it is."""
        graph = self._graphs.get((width, self._buckets[bisect_left(self._buckets, batch)]))
        if graph is None:
            self._forward(width, batch, block)
        else:
            graph()

    def _graph(self, width: Width, bucket: int) -> Work:
        run_block = self._compiled_block if bucket >= MIN_COMPILED_BATCH else block
        return self._stream.record(lambda: self._forward(width, bucket, run_block))

    def _forward(self, width: Width, rows: int, run_block: BlockFunction) -> None:
        self._probabilities[:rows] = self._forwards[width](self._pixels[:rows], run_block)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """All work on the device happens in here, in one thread at a time."""
        with self._turns.next(), device_errors(), torch.inference_mode(), self._stream.current():
            yield


class NoStream:
    """Work is done at once, and nothing is recorded."""

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def record(self, work: Work) -> Work:
        return work

    def wait(self) -> None: ...


class CudaStream(NoStream):
    """The one stream for everything, and the graphs that are recorded on it into one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # The thread sleeps until then: spinning would take the core from whoever decodes images.
        self._done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            yield

    def record(self, work: Work) -> Work:
        """``work`` as a graph; called, it replays it. Errors of other threads do not spoil the recording."""
        for _ in range(WARM_UP_RUNS):
            work()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return graph.replay

    def wait(self) -> None:
        """Until all work so far is done."""
        self._done.record(self._stream)
        self._done.synchronize()


class Turns:
    """A lock that two threads get by turns.

    Whoever releases a plain lock and asks again often gets it again at once: of 40 threads that waited for one which
    took a lock 20 times, 8 saw it taken 7 times or more, 2 of them all 20 times.
    """

    def __init__(self) -> None:
        self._next, self._now = Lock(), Lock()

    @contextmanager
    def next(self) -> Iterator[None]:
        with self._next:  # held while waiting, so that the other thread queues up behind
            self._now.acquire()
        try:
            yield
        finally:
            self._now.release()


def compiled_block() -> BlockFunction:
    """The block compiled for every shape that comes: known shapes make the better kernels."""
    compiled: BlockFunction = torch.compile(block, dynamic=False, fullgraph=True)

    def run_block(x_BTC: torch.Tensor, w: BlockWeights, shape: BlockShape, num_read: int) -> torch.Tensor:
        with torch._dynamo.config.patch(recompile_limit=MAX_COMPILED):
            return compiled(x_BTC, w, shape, num_read)

    return run_block
