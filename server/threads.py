"""Pools of threads that run before anybody needs them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor


def started_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """All of its threads run when it is returned.

    Left to itself a pool starts each when there is work for it, and waits until the thread says that it runs. One that
    finds no memory dies before it can, and whoever waits, the event loop, waits for ever (seen with Python 3.11).
    """
    pool, together = ThreadPoolExecutor(num_threads, thread_name_prefix=name), threading.Barrier(num_threads)
    for started in [pool.submit(together.wait) for _ in range(num_threads)]:
        started.result()
    return pool
