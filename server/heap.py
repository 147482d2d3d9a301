"""Large pieces of memory go back to the system as soon as they are free.

Of itself the C library (glibc) raises the size from which it does so to that of the largest piece that was freed, up to
32 MB. Pillow takes an image's memory in pieces of 16 MB, which after the first large image came from each thread's own
heap and stayed there: the server held 430 MB more after two images of 50 million pixels.
"""

from __future__ import annotations

import ctypes

LARGE_BYTES = 4 * 2**20  # above what a band of a large image takes, which is needed again at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def return_large_pieces() -> None:
    """For the whole process. Without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
