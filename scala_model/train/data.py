"""Images to train and to measure on, decoded up front or while training goes on; ``layouts.py`` finds them.

``decode_all`` keeps a whole split in memory as uint8, which is fastest; ``stream`` decodes each batch in worker
processes, for what does not fit.
"""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import signal
import warnings
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Protocol

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from scala_model.preprocess import Preprocessing, to_pixels

# A container's limit, as control groups of version 2 and 1 show it inside; psutil reports the host.
_MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_CHUNK = 64  # images that a thread decodes at a time


class Images(Protocol):
    """What training and evaluation read."""

    @property
    def labels(self) -> Tensor:
        """int64 (N): on the CPU for a streamed set, beside the pixels for a resident one."""

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """uint8 (B, R, R, 3) on ``device`` for each tensor of indices (B), which may come from a generator."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: ``pixels`` uint8 (N, R, R, 3), ``labels`` int64 (N)."""

    pixels: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.pixels.to(device), self.labels.to(device))

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """See ``Images``."""
        for chosen in indices:
            yield self.pixels[chosen.to(self.pixels.device)].to(device)


class Source(Protocol):
    """Encoded images by number. Can be pickled, for any way to start a process."""

    def name(self, index: int) -> str: ...
    def read(self, index: int) -> bytes: ...
    def num_bytes(self) -> NDArray[np.int64]:
        """How long each image is, encoded (N)."""


@dataclass(frozen=True)
class Files:
    """Images that stay on disk; their paths are in memory."""

    paths: list[str]

    def name(self, index: int) -> str:
        return self.paths[index]

    def read(self, index: int) -> bytes:
        return Path(self.paths[index]).read_bytes()

    def num_bytes(self) -> NDArray[np.int64]:
        return np.array([Path(path).stat().st_size for path in self.paths])


@dataclass(frozen=True)
class Shard:
    """The encoded images of one Parquet file: row i is ``data`` from ``ends[i]`` to ``ends[i + 1]``."""

    path: Path
    data: Tensor
    ends: NDArray[np.int64]


@dataclass(frozen=True)
class Shards:
    """Encoded images in memory, a tensor a shard: every process that they are sent to sees the same memory.

    ``starts`` holds the number of each shard's first image.
    """

    shards: list[Shard]
    starts: list[int]

    def name(self, index: int) -> str:
        shard, row = self._find(index)
        return f"{shard.path}: row {row}"

    def read(self, index: int) -> bytes:
        shard, row = self._find(index)
        start, end = shard.ends[row : row + 2].tolist()
        return shard.data[start:end].numpy().tobytes()

    def num_bytes(self) -> NDArray[np.int64]:
        return np.concatenate([np.diff(shard.ends) for shard in self.shards])

    def _find(self, index: int) -> tuple[Shard, int]:
        number = bisect_right(self.starts, index) - 1
        return self.shards[number], index - self.starts[number]


@dataclass(frozen=True)
class EncodedSet:
    """A split whose images are found but not decoded: ``labels`` int64 (N), ``classes`` as a model's card lists them.

    ``num_skipped`` counts the files of a folder that are hidden or, by their suffix, no images.
    """

    labels: Tensor
    classes: list[dict[str, object]]
    source: Source = field(repr=False)
    num_skipped: int = 0

    @property
    def fingerprint(self) -> str:
        """What tells this data from other data: classes, labels, the length of each image; 64 hex digits."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        digest.update(self.labels.numpy().tobytes())
        digest.update(self.source.num_bytes().tobytes())
        return digest.hexdigest()

    def decode_all(self, spec: Preprocessing) -> ImageSet:
        """Every image, prepared as ``spec`` says, in threads.

        Raises ValueError that names the file, or shard and row, of an image that does not decode.
        """
        size, decoder = spec.image_size, _Decoder(self.source, spec)
        pixels = torch.empty((len(self.labels), size, size, 3), dtype=torch.uint8)

        def decode(chunk: range) -> None:
            for index in chunk:
                pixels[index] = torch.from_numpy(decoder.pixels(index))

        chunks = [range(len(pixels))[start : start + _CHUNK] for start in range(0, len(pixels), _CHUNK)]
        with _quiet_but_for_bombs(), ThreadPoolExecutor() as pool:
            for _ in pool.map(decode, chunks):  # which cancels the rest after an error or Ctrl-C
                pass
        return ImageSet(pixels, self.labels)

    def stream(self, spec: Preprocessing, workers: int) -> StreamedSet:
        """The same images, decoded batch by batch in ``workers`` processes, or in this one for 0.

        Raises ValueError for a negative number of them.
        """
        if workers < 0:
            raise ValueError(f"{workers} workers cannot decode: give a number of processes, or 0 to use this one")
        return StreamedSet(self.labels, _Decoder(self.source, spec), workers)


class _Decoder:
    """Runs in threads and in worker processes."""

    def __init__(self, source: Source, spec: Preprocessing) -> None:
        self.source, self.spec = source, spec

    def pixels(self, index: int) -> NDArray[np.uint8]:
        """uint8 (R, R, 3). Raises ValueError that names the image."""
        try:
            with Image.open(io.BytesIO(self.source.read(index))) as image:
                return to_pixels(image, self.spec)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            reason, _, _ = str(error).partition(",")  # what follows speaks of attacks
            raise ValueError(f"{self.source.name(index)} is too large: {reason}: scale it down or remove it") from None
        except Exception as error:  # Pillow's decoders raise a dozen kinds
            # Pillow would name the object in memory that it read from
            reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else str(error)
            raise ValueError(
                f"{self.source.name(index)} is not an image that can be read ({reason}): repair or remove it"
            ) from None

    def batch(self, indices: list[int]) -> Tensor:
        """uint8 (B, R, R, 3)."""
        with _quiet_but_for_bombs():
            return torch.from_numpy(np.stack([self.pixels(index) for index in indices]))


@dataclass(frozen=True)
class StreamedSet:
    """Images that are decoded when their turn comes, ahead of use, in processes of their own.

    Encoded images from Parquet are in memory all the same: a data set that exceeds it belongs in folders. With workers,
    they and the batches travel through shared memory, which containers limit (``/dev/shm``).
    """

    labels: Tensor
    decoder: _Decoder = field(repr=False)
    workers: int

    def batches(self, indices: Iterable[Tensor], device: torch.device) -> Iterator[Tensor]:
        """See ``Images``. The workers start with the first batch and end with the iterator, however that ends.

        Raises ValueError that names an image that does not decode, when its turn comes; and when a worker is killed.
        """
        pinned = device.type == "cuda"
        for pixels in self._decoded(chosen.tolist() for chosen in indices):
            yield (pixels.pin_memory() if pinned else pixels).to(device, non_blocking=pinned)

    def _decoded(self, indices: Iterator[list[int]]) -> Iterator[Tensor]:
        if not self.workers:
            yield from map(self.decoder.batch, indices)
            return
        # Not torch's DataLoader: if a forkserver's worker is killed, it may wait for ever for that worker's lock.
        pool = ProcessPoolExecutor(self.workers, _worker_context(), _start_worker, (self.decoder,))
        try:
            ahead = deque(pool.submit(_decode_batch, chosen) for chosen in islice(indices, 2 * self.workers))
            while ahead:
                pixels = ahead.popleft().result()
                ahead.extend(pool.submit(_decode_batch, chosen) for chosen in islice(indices, 1))
                yield pixels
        except BrokenProcessPool as error:
            raise ValueError(
                f"a decoding process failed ({error}): use fewer workers or give them more memory and /dev/shm"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_decoder: _Decoder  # of a worker process; sending it with every batch would send a million paths


def _start_worker(decoder: _Decoder) -> None:
    """What Ctrl-C means is for the parent to say. Where something else had started the helper, it is not blocked."""
    global _decoder
    _decoder = decoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _decode_batch(indices: list[int]) -> Tensor:
    return _decoder.batch(indices)


def _worker_context() -> BaseContext:
    """Workers are not forked from this process, whose threads and CUDA context no fork survives, but from a helper.

    The helper imports this module once for all of them, which takes seconds, and ends with this process. Ctrl-C is
    blocked in it and in its children: as a terminal sends it to all of them, it would end the helper amid its imports.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return torch.multiprocessing.get_context("spawn")
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    resource_tracker.ensure_running()  # now, for its start lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@contextmanager
def _quiet_but_for_bombs() -> Iterator[None]:
    """Pillow warns of odd metadata without saying in which image; that an image is huge shall be an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\.")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def fits(num_images: int, size_px: int, available_bytes: int) -> bool:
    """Whether that many decoded images take at most half of the memory; the rest is for the network."""
    return 2 * num_images * size_px * size_px * 3 <= available_bytes


def available_bytes(device: torch.device, processes: int = 1) -> int:
    """Free memory for decoded images: a process's share of the host's, where they are decoded, or its device's."""
    available = int(psutil.virtual_memory().available)
    for limit in _MEMORY_LIMITS:
        if limit.is_file() and (text := limit.read_text().strip()).isdigit():
            available = min(available, max(0, int(text) - psutil.Process().memory_info().rss))
    share = available // processes
    return min(share, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else share
