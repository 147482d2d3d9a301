"""What is free of the memory goes back to the system, instead of waiting in a heap of each thread.

Of itself the C library (glibc) gives threads up to eight heaps a core, and each keeps what its busiest moment took:
hostile requests left 60 MiB behind in 16 heaps, and 10 in one. And it raises the size from which a piece is returned
to that of the largest piece that was freed, up to 32 MB. Pillow takes an image's memory in pieces of 16 MB, which
after the first large image stayed, too: the server held 430 MB more after two images of 50 million pixels.
"""

from __future__ import annotations

import ctypes
import os

LARGE_BYTES = 4 * 2**20  # above what a band of a large image takes, which is needed again at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)


def keep_little() -> None:
    """For the whole process, before it has threads. Without effect where the C library is not glibc, and on the number
    of heaps where ``MALLOC_ARENA_MAX`` asks for one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
    mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
    if "MALLOC_ARENA_MAX" not in os.environ:
        mallopt(_M_ARENA_MAX, 1)
