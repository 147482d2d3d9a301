"""What unit tests share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _one_torch_thread() -> Iterator[None]:
    """Beside other work, the threads of a tiny network mostly wait for each other: six times slower than one."""
    torch = sys.modules.get("torch")
    if torch is None:  # most tests do without, and shall not load it here
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
