"""The CPU engine: OpenVINO, in bfloat16 where the processor has it.

A width is compiled for any number of images. What is open until it comes costs 0.4 ms a run, which is little to a wide
network and a sixth of a narrow one's time: networks of few bytes are compiled for a single image too, and before.

A number of images that is new costs 10 to 20 ms and 2 MB when it first comes, so batches are run in pieces of 1, 2, 4,
... images, up to four a thread; larger pieces are no faster. (Figures: DeiT-S on two cores, see docs/log.md.) Another
number than the time before costs a millisecond again. On one thread, where a few images are no faster together,
networks of few bytes are therefore compiled for one image and for four, and for no other number; three are run as four.

A run that fails leaves a compiled network in an unknown state. After one that got no memory, some widths raised for
ever, and some gave other classes than before, with probabilities that sum to 1 and without an error (seen with OpenVINO
2026.4). So whatever fails is let go, and is compiled anew when it is loaded again.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import numpy as np
import openvino as ov
from numpy.typing import NDArray
from openvino import Node
from openvino import opset13 as ops

from scala_model.checkpoint import Checkpoint
from scala_model.cost import cost_of
from scala_model.width import Width
from server.engine.contract import DeviceOutOfMemory
from server.engine.openvino_network import Head, NetworkBuilder
from server.types import Probabilities

PIECE_PER_THREAD = 4  # images
LIGHT_BYTES = 12 * 2**20  # of a network in half precision that is compiled twice
SMALL_BYTES = 16 * 1024  # of a constant that is not worth a place in the file
# How OpenVINO and C++ say that there was no memory; the last is said of threads, whose stacks found no room.
OUT_OF_MEMORY = ("can't alloc", "bad_alloc", "Cannot allocate", "Resource temporarily unavailable")
PAGE_BYTES, ALIGNMENT_BYTES = mmap.PAGESIZE, 64


@cache
def core() -> ov.Core:
    """The process's one core, which never goes. Each core gives its thread a stack for signal handlers and frees it.

    The last of several to go may leave the thread with one that another has freed: the next signal then ends the
    process (seen with OpenVINO 2026.4).
    """
    return ov.Core()


class OpenVinoEngine:
    """With ``threads`` threads; ``precision`` is ``bf16`` or ``f32``, by default what the processor does best."""

    def __init__(self, checkpoint: Checkpoint, *, threads: int, max_batch: int, precision: str | None = None) -> None:
        self.threads, self.max_batch = threads, max_batch
        self._largest_piece = 1 << (PIECE_PER_THREAD * threads).bit_length() - 1
        self._checkpoint, self._core = checkpoint, core()
        self.device = str(self._core.get_property("CPU", "FULL_DEVICE_NAME"))
        has_bf16 = "BF16" in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        self._precision = precision or ("bf16" if has_bf16 else "f32")
        self.name = f"openvino {ov.__version__.partition('-')[0]} {self._precision}"
        widths = checkpoint.config.widths
        self._light = {width for width in widths if cost_of(checkpoint.config, width).num_bytes(2) <= LIGHT_BYTES}
        self._heads: dict[Width, Head] = {}
        self._many: dict[Width, ov.InferRequest] = {}
        self._single: dict[Width, ov.InferRequest] = {}
        self._graphs: dict[Width, Graphs] = {}  # whose bytes OpenVINO holds anyway

    def load(self, width: Width, batch: int) -> None:
        if width not in self._heads:
            self._prepare(width)
        graphs = self._graphs[width]
        with _errors_of_memory():
            if graphs.single is not None and width not in self._single:
                self._single[width] = self._compile(graphs.single)
            if width not in self._many and (batch > 1 or graphs.single is None):
                self._many[width] = self._compile(graphs.many, self._largest_piece if self._is_fixed(width) else 1)

    def _prepare(self, width: Width) -> None:
        """All for which the weights are needed: once it is done for every width, they are let go."""
        fixed = self._is_fixed(width)
        single = self._graph(width, 1) if width in self._light else None
        self._graphs[width] = Graphs(single, self._graph(width, self._largest_piece if fixed else None))
        self._heads[width] = NetworkBuilder(self._checkpoint, width, self._precision).head()
        if len(self._heads) == len(self._checkpoint.config.widths):
            self._checkpoint = replace(self._checkpoint, weights={})

    def _is_fixed(self, width: Width) -> bool:
        """Whether it runs one image or the largest piece, and no number between."""
        return self.threads == 1 and width in self._light

    def run(self, pixels: NDArray[np.uint8], width: Width) -> Probabilities:
        try:
            with _errors_of_memory():
                tokens_BLC = np.concatenate([self._run_piece(piece, width) for piece in self._pieces(pixels, width)])
                return self._heads[width](tokens_BLC[: len(pixels)])
        except Exception:
            self._let_go(width)
            raise

    def _let_go(self, width: Width) -> None:
        for compiled in (self._single, self._many):
            compiled.pop(width, None)

    def _pieces(self, pixels: NDArray[np.uint8], width: Width) -> Iterator[NDArray[np.uint8]]:
        size, fixed = self._largest_piece, self._is_fixed(width)
        while len(pixels):
            if fixed and len(pixels) == size - 1:
                pixels = np.concatenate((pixels, pixels[-1:]))
            while size > len(pixels):
                size = 1 if fixed else size // 2
            yield pixels[:size]
            pixels = pixels[size:]

    def _run_piece(self, pixels: NDArray[np.uint8], width: Width) -> NDArray[np.float32]:
        request = (self._single.get(width) if len(pixels) == 1 else None) or self._many.get(width)
        if request is None:
            raise DeviceOutOfMemory(f"width {width} is not loaded any more since it failed")
        request.set_input_tensor(ov.Tensor(pixels, shared_memory=True))
        request.infer()
        tokens_BLC: NDArray[np.float32] = request.get_output_tensor().data.copy()  # the next piece overwrites it
        return tokens_BLC

    def memory_bytes(self) -> int:
        return 0

    def close(self) -> None:
        for held in (self._single, self._many, self._graphs):
            held.clear()

    def _graph(self, width: Width, batch: int | None) -> Graph:
        originals = Originals(cost_of(self._checkpoint.config, width).num_bytes(4))
        model = NetworkBuilder(self._checkpoint, width, self._precision, originals.constant).graph(batch)
        originals.release()
        return Graph(model, originals)

    def _compile(self, graph: Graph, num_images: int = 1) -> ov.InferRequest:
        hints = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,  # no faster, and containers with a quota would all pin to the same cores
            "NUM_STREAMS": 1,  # two streams of one thread each served 0.6 to 1.0 times as many images (docs/log.md)
        }
        size = self._checkpoint.config.image_size
        request = self._core.compile_model(graph.model, "CPU", hints).create_infer_request()
        request.set_input_tensor(ov.Tensor(np.zeros((num_images, size, size, 3), np.uint8)))
        request.infer()
        graph.originals.release()
        return request


@contextmanager
def _errors_of_memory() -> Iterator[None]:
    """Raises DeviceOutOfMemory for what numpy and OpenVINO say of a lack of memory; the rest passes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
            raise DeviceOutOfMemory(str(error).strip().rpartition("\n")[2]) from error
        raise


class Graph(NamedTuple):
    """A network to be compiled, and its weights."""

    model: ov.Model
    originals: Originals


class Graphs(NamedTuple):
    """A width for one image, if it is light, and for many."""

    single: Graph | None
    many: Graph


class Originals:
    """The float32 matrices of a graph, in a nameless temporary file that is mapped into memory.

    OpenVINO packs each matrix in a layout and precision of its own, yet holds on to the original, two thirds of all
    bytes. ``release`` takes the originals out of memory; should one ever be read again, it comes back from the file.
    Without a file to be had they stay where they are.
    """

    def __init__(self, num_bytes: int) -> None:
        self._used, size = 0, num_bytes + PAGE_BYTES
        try:
            with tempfile.TemporaryFile() as file:
                # So that a full disk says so now, and not by a signal at the first write.
                os.posix_fallocate(file.fileno(), 0, size)
                self._memory = mmap.mmap(file.fileno(), size)
            self._backed = True
        except (OSError, AttributeError):  # a read-only system, or one without posix_fallocate
            self._memory, self._backed = mmap.mmap(-1, size), False

    def constant(self, array: NDArray[np.float32]) -> Node:
        if array.nbytes < SMALL_BYTES:
            return ops.constant(np.ascontiguousarray(array))
        held = np.frombuffer(self._memory, np.float32, array.size, self._used).reshape(array.shape)
        held[...] = array
        self._used += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return ops.constant(held, shared_memory=True)

    def release(self) -> None:
        if self._backed:
            self._memory.madvise(mmap.MADV_DONTNEED)
