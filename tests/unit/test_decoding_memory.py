"""Large images wait for memory in their threads, in turn, and small ones do not."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from server.decoding_memory import FREE_BYTES, DecodingMemory
from server.errors import TooLarge

LARGE = FREE_BYTES + 1


def test_what_there_could_never_be_room_for_is_refused() -> None:
    memory = DecodingMemory(LARGE)
    with pytest.raises(TooLarge, match="takes 17 MiB; this server has 16 MiB"), memory.hold(LARGE + 2**20):
        pass
    with memory.hold(LARGE):
        assert memory.held_bytes == LARGE
    assert memory.held_bytes == 0


def test_small_images_are_not_counted() -> None:
    memory = DecodingMemory(LARGE)
    with memory.hold(LARGE), memory.hold(FREE_BYTES):
        assert memory.held_bytes == LARGE


def test_memory_comes_back_after_an_error() -> None:
    memory = DecodingMemory(LARGE)
    with pytest.raises(OSError, match="broken"), memory.hold(LARGE):
        raise OSError("broken")
    assert memory.held_bytes == 0


def test_a_large_image_waits_and_is_not_passed_by_smaller_ones() -> None:
    memory, turns = DecodingMemory(3 * LARGE), list[int]()
    first_may_end, waiting = threading.Event(), threading.Event()

    def decode(size: int) -> None:
        waiting.set()
        with memory.hold(size * LARGE):
            turns.append(size)

    def decode_first() -> None:
        with memory.hold(2 * LARGE):
            started.set()
            first_may_end.wait(10)

    started = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        first = threads.submit(decode_first)
        assert started.wait(10)
        second = threads.submit(decode, 3)
        while not memory._next.locked():
            assert not second.done()
        third = threads.submit(decode, 1)  # there would be room for it
        with pytest.raises(TimeoutError):
            third.result(0.05)
        assert turns == []
        first_may_end.set()
        for each in (first, second, third):
            each.result(10)
    assert turns == [3, 1]
    assert memory.held_bytes == 0


def test_no_more_is_held_than_there_is() -> None:
    memory, most = DecodingMemory(4 * LARGE), list[float]()

    def decode(size: int) -> None:
        with memory.hold(size * LARGE):
            most.append(memory.held_bytes)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(decode, [1, 2, 3, 4] * 50))
    assert len(most) == 200
    assert max(most) <= 4 * LARGE
