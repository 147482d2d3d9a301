"""What a running server costs before its first request: seconds until it serves, and memory with every width in use."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.quote import noise
from server.bench.client import Client

POLL_EVERY_S, TIMEOUT_S = 0.02, 300.0
Models = Sequence[dict[str, Any]]  # the widths of ``/v1/model``


@dataclass(frozen=True, slots=True)
class Served:
    """Seconds from the process's start until it is ready, and until every width is; its resident memory in MiB.

    ``rss_mib`` is measured when every width has answered a request, ``rss_batches_mib`` when every width has also run
    every batch size, for which runtimes keep kernels and buffers.
    """

    ready_s: float
    all_widths_s: float
    rss_mib: float
    rss_batches_mib: float


def measure_server(checkpoint: Path, device: str, max_batch: int) -> Served:
    """Start a server with nothing remembered from earlier starts and default settings otherwise, watch it, end it.

    Raises RuntimeError when the server ends by itself or does not get there in five minutes.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with tempfile.TemporaryDirectory() as profiles:
        options = {"port": port, "checkpoint": checkpoint, "device": device, "max-batch": max_batch}
        options |= {"profile-dir": profiles, "log-level": "warning"}
        command = [sys.executable, "-m", "server", "serve"]
        command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALA_")}
        started = time.monotonic()
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            return asyncio.run(_watch(process, Client(port), max_batch, started))
        finally:
            process.kill()
            process.wait()


async def _watch(process: subprocess.Popen[bytes], client: Client, max_batch: int, started: float) -> Served:
    async def until(reached: Callable[[Models], bool]) -> float:
        while time.monotonic() < started + TIMEOUT_S and process.poll() is None:
            try:
                ready = (await client.get("/readyz")).status == 200
                if ready and reached((await client.get("/v1/model")).json()["widths"]):
                    return time.monotonic() - started
            except ConnectionRefusedError:
                pass
            await asyncio.sleep(POLL_EVERY_S)
        raise RuntimeError(f"the server did not get there (exit code {process.poll()}): see what it wrote above")

    def rss_mib() -> float:
        return float(psutil.Process(process.pid).memory_info().rss / 2**20)

    ready_s = await until(lambda widths: True)
    all_widths_s = await until(lambda widths: every_width_runs(widths, 1))
    model = (await client.get("/v1/model")).json()
    for width in model["widths"]:
        reply = await client.classify(noise(model["image_size"]), {"X-Width": f"{width['width']}"})
        if reply.status != 200:
            raise RuntimeError(f"width {width['width']} answered {reply.status}: {reply.body.decode()}")
    rss_widths_mib = rss_mib()
    await until(lambda widths: every_width_runs(widths, max_batch))
    client.close()
    return Served(ready_s, all_widths_s, rss_widths_mib, rss_mib())


def every_width_runs(widths: Models, batch: int) -> bool:
    """Whether each of the listed widths has a latency for batches of this size."""
    return all(str(batch) in width["latency_ms"] for width in widths)
