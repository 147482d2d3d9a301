"""A server that gives back all memory it has no use for when it is told SIGUSR1: ``python -m tests.chaos.tidy_server``.

What it still holds then is in use: the heap's own reserve moves by the 8 MiB up to which it is kept
(``server/heap.py``), which hides a leak of one or makes one of none.
"""

from __future__ import annotations

import ctypes
import gc
import signal

from server.cli import main


def give_back(*_: object) -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


if __name__ == "__main__":
    signal.signal(signal.SIGUSR1, give_back)
    main(["serve"])
