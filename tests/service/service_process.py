"""A real server process on the shipped checkpoint, and images drawn for it."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120


@dataclass(frozen=True)
class Running:
    """A server process, its port, and a client bound to it."""

    process: subprocess.Popen[bytes]
    port: int
    http: httpx.Client

    def wait_ready(self) -> None:
        self.wait_until(lambda: self.http.get("/readyz").status_code == 200)

    def wait_measured(self) -> None:
        """Until every width is measured at every batch size, after which the server's memory no longer grows."""
        self.wait_until(lambda: all("16" in w["latency_ms"] for w in self.http.get("/v1/model").json()["widths"]))

    def wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, "the server ended"
            try:
                if reached():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError("the server did not get there in time")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    log: Path,
    *,
    command: Sequence[str] = ("-m", "server", "serve"),
    within: Sequence[str] = (),
    port: int = 0,
    **settings: str,
) -> Iterator[Running]:
    """A server with these settings (``SCALA_*`` without the prefix); killed at the end if it still runs.

    ``within`` is a command that becomes the one it is given, such as ``taskset -c 0``.
    """
    port = port or free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALA_")}
    environment["SCALA_PROFILE_DIR"] = str(log.parent / "profiles")
    environment |= {f"SCALA_{name}": value for name, value in settings.items()} | {"SCALA_PORT": str(port)}
    with log.open("wb") as output:
        words = [*within, sys.executable, *command]
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
            yield Running(process, port, http)
    finally:
        process.kill()
        process.wait()


def draw_photos(count: int, size: int = 64) -> list[bytes]:
    """JPEGs of blurred coloured noise: as varied to a network as photos are, and the same in every run."""
    random = np.random.default_rng(0)
    photos = []
    for _ in range(count):
        noise = Image.fromarray(random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        noise.resize((size, size)).filter(ImageFilter.GaussianBlur(2)).save(buffer, "JPEG")
        photos.append(buffer.getvalue())
    return photos
