"""How many large images are decoded at once: a few of them would fill a small container, and keep every decoder busy.

The rest of a container's memory is the network's, the bodies' and the interpreter's; the other decoders are everybody
else's. They wait in the event loop, each as long as its request does.
"""

from __future__ import annotations

import asyncio
import math

from server.errors import TooLarge

SHARE = 0.5  # of what the process may use
LARGE_BYTES = 16 * 2**20  # an image that takes more is large


class LargeImages:
    """At most ``most``, which together take at most ``limit_bytes``. ``held_bytes`` are taken now."""

    def __init__(self, most: int, limit_bytes: float = math.inf) -> None:
        self.most, self.limit_bytes = most, limit_bytes
        self.count = self.held_bytes = 0
        self._first = asyncio.Lock()  # held by the first of those who wait, so that small ones do not pass
        self._freed = asyncio.Event()

    async def acquire(self, num_bytes: int) -> None:
        """Waits until there is room for one of so many bytes. Raises TooLarge when there could never be."""
        if num_bytes > self.limit_bytes:
            raise TooLarge(
                f"Decoding the image takes {num_bytes / 2**20:.0f} MiB; this server has {self.limit_bytes / 2**20:.0f} "
                "MiB for that: send a smaller one, or a PNG or a plain JPEG of it."
            )
        async with self._first:
            while self.count == self.most or self.held_bytes + num_bytes > self.limit_bytes:
                self._freed.clear()
                await self._freed.wait()
            self.count += 1
            self.held_bytes += num_bytes

    def release(self, num_bytes: int) -> None:
        self.count -= 1
        self.held_bytes -= num_bytes
        self._freed.set()
