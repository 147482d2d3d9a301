"""Servers as processes: started until they answer, halted while it is others' turn, and what CPU time they took."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[1]
START_S, POLL_EVERY_S = 120.0, 0.1


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to serve: a command that takes ``--port``. ``settings`` tell it from others of the same ``name``."""

    name: str
    settings: str
    command: Sequence[str]
    path: str = "/classify"


@dataclass(frozen=True, slots=True)
class Running:
    """A server that answers ``POST path``, its first process being ``pid``."""

    pid: int
    port: int
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.path}"

    def processes(self) -> list[psutil.Process]:
        """The first one and all that came of it."""
        first = psutil.Process(self.pid)
        return [first, *first.children(recursive=True)]

    def halt(self) -> None:
        """Stop all of its processes where they are: some look for work all the time."""
        for process in self.processes():
            process.suspend()

    def go_on(self) -> None:
        for process in self.processes():
            process.resume()

    def cpu_s(self) -> float:
        """CPU seconds that its processes have taken so far."""
        times = [process.cpu_times() for process in self.processes()]
        return float(sum(each.user + each.system for each in times))

    def ask(self, image: bytes) -> Any:
        """Its answer to this image. Raises OSError when it does not answer, ValueError for anything but 200."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=START_S)
        try:
            connection.request("POST", self.path, image, {"Content-Type": "image/jpeg", **self.headers})
            reply = connection.getresponse()
            body = reply.read()
        finally:
            connection.close()
        if reply.status != 200:
            raise ValueError(f"{self.url} answers {reply.status}: {body[:200]!r}")
        return json.loads(body)


@contextmanager
def started(contender: Contender, image: bytes) -> Iterator[Running]:
    """The contender once it answers; all of its processes are killed at the end.

    Raises RuntimeError when it ends by itself or does not answer in two minutes.
    """
    port = free_port()
    process = subprocess.Popen(
        [*contender.command, "--port", str(port)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    running = Running(process.pid, port, contender.path)
    try:
        _wait(running, process, contender, image)
        yield running
    finally:
        for each in running.processes() if process.poll() is None else []:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()


def _wait(running: Running, process: subprocess.Popen[bytes], contender: Contender, image: bytes) -> None:
    until = time.monotonic() + START_S
    why: Exception | None = None
    while time.monotonic() < until and process.poll() is None:
        try:
            running.ask(image)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = error
            time.sleep(POLL_EVERY_S)
    command = " ".join([*contender.command, "--port", str(running.port)])
    raise RuntimeError(f"{contender.name} ({contender.settings}) does not serve ({why}); try: {command}")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
