"""How many heaps the threads of a process have, as glibc counts them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.service.service_process import ROOT

COUNT = """
import ctypes, os, threading
from server.heap import keep_little
keep_little()
c = ctypes.CDLL(None)
c.malloc.restype = c.fdopen.restype = ctypes.c_void_p
together = threading.Barrier(8)
def take():
    together.wait()
    c.malloc(100_000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
stream = ctypes.c_void_p(c.fdopen(1, b"w"))
c.malloc_info(0, stream)
c.fflush(stream)
"""


def num_heaps(**environment: str) -> int:
    asked = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"} | environment
    told = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, env=asked, capture_output=True, check=True)
    return told.stdout.count(b"<heap nr=")


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc has a heap for each thread")
def test_threads_share_one_heap_unless_asked_otherwise() -> None:
    assert num_heaps() == 1
    assert num_heaps(MALLOC_ARENA_MAX="8") > 1
