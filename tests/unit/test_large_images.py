"""Large images wait for memory and for a decoder, in turn, and as long as anybody waits for them."""

from __future__ import annotations

import asyncio

import pytest

from server.errors import TooLarge
from server.large_images import LargeImages
from tests.unit.virtual_time import Clock, run

MIB = 2**20


def test_what_there_could_never_be_room_for_is_refused() -> None:
    async def scenario(_: Clock) -> None:
        large = LargeImages(2, 20 * MIB)
        with pytest.raises(TooLarge, match="takes 21 MiB; this server has 20 MiB"):
            await large.acquire(21 * MIB)
        await large.acquire(20 * MIB)
        assert large.held_bytes == 20 * MIB

    run(scenario)


async def decode(large: LargeImages, size: int, seconds: float, turns: list[int]) -> None:
    await large.acquire(size)
    turns.append(size)
    assert large.held_bytes <= large.limit_bytes
    assert large.count <= large.most
    await asyncio.sleep(seconds)
    large.release(size)


def test_a_large_image_waits_and_is_not_passed_by_smaller_ones() -> None:
    async def scenario(_: Clock) -> None:
        large, turns = LargeImages(9, 3), list[int]()
        tasks = [asyncio.create_task(decode(large, size, 1.0, turns)) for size in (2, 3, 1)]
        await asyncio.sleep(0.9)
        assert turns == [2], "there would be room for the last"
        await asyncio.gather(*tasks)
        assert turns == [2, 3, 1]
        assert (large.count, large.held_bytes) == (0, 0)

    run(scenario)


def test_no_more_are_decoded_at_once_than_may_be() -> None:
    async def scenario(clock: Clock) -> None:
        large, turns, started = LargeImages(2), list[int](), clock.now
        await asyncio.gather(*(decode(large, 1, 1.0, turns) for _ in range(10)))
        assert len(turns) == 10
        assert clock.now - started == pytest.approx(5)

    run(scenario)


def test_who_gives_up_makes_room() -> None:
    """Its deadline passed, or its client left: those behind it must not wait for memory that nobody wants."""

    async def scenario(_: Clock) -> None:
        large, turns = LargeImages(9, 3), list[int]()
        tasks = [asyncio.create_task(decode(large, size, 1.0, turns)) for size in (2, 3, 1)]
        await asyncio.sleep(0.5)
        tasks[1].cancel()
        await asyncio.sleep(0.1)
        assert turns == [2, 1]
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (large.count, large.held_bytes) == (0, 0)

    run(scenario)


def test_no_more_is_held_than_there_is() -> None:
    async def scenario(_: Clock) -> None:
        large, turns = LargeImages(3, 4), list[int]()
        await asyncio.gather(*(decode(large, size, 0.1 * size, turns) for size in [1, 2, 3, 4] * 50))
        assert turns == [1, 2, 3, 4] * 50

    run(scenario)
