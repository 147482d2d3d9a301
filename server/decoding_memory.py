"""How much memory large images may take while they are decoded: a few of those at once would fill a small container.

The rest of a container's memory is the network's, the bodies' and the interpreter's.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import TooLarge

SHARE = 0.5  # of what the process may use
FREE_BYTES = 16 * 2**20  # an image of at most so many is not counted


class DecodingMemory:
    """``limit_bytes`` for all large images together, unless given any number. ``held_bytes`` are taken now."""

    def __init__(self, limit_bytes: float = math.inf) -> None:
        self.limit_bytes = limit_bytes
        self.held_bytes = 0
        self._next = threading.Lock()  # who holds it is the first of those who wait, so that small ones do not pass
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Waits in its thread until there is room for so many bytes. Raises TooLarge when there could never be."""
        if num_bytes <= FREE_BYTES:
            yield
            return
        if num_bytes > self.limit_bytes:
            raise TooLarge(
                f"Decoding the image takes {num_bytes / 2**20:.0f} MiB; this server has {self.limit_bytes / 2**20:.0f} "
                "MiB for that: send a smaller one, or a PNG or a plain JPEG of it."
            )
        with self._next, self._changed:
            self._changed.wait_for(lambda: self.held_bytes + num_bytes <= self.limit_bytes)
            self.held_bytes += num_bytes
        try:
            yield
        finally:
            with self._changed:
                self.held_bytes -= num_bytes
                self._changed.notify_all()
