"""Pools of threads that run before anybody needs them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

from server.settings import SettingsError


def started_pool(num_threads: int, name: str) -> ThreadPoolExecutor:
    """All of its threads run when it is returned. Raises SettingsError where the system does not allow so many.

    Left to itself a pool starts each when there is work for it, and waits until the thread says that it runs. One that
    finds no memory dies before it can, and whoever waits, the event loop, waits for ever (seen with Python 3.11).
    """
    pool, together = ThreadPoolExecutor(num_threads, thread_name_prefix=name), threading.Barrier(num_threads)
    try:
        for started in [pool.submit(together.wait) for _ in range(num_threads)]:
            started.result()
    except RuntimeError as error:
        together.abort()  # those that do run would wait for the others, and the end of the process for them
        raise SettingsError(
            f"not all of {num_threads} threads could be started ({error}): raise the limit of processes, which counts "
            "threads (ulimit -u, or pids.max of the container)"
        ) from None
    return pool
