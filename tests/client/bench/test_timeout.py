"""A timeout that works on Python 3.10, too."""

from __future__ import annotations

import asyncio
import time

import pytest

from pem.bench.wire import Timeout


def test_what_takes_too_long_is_a_timeout() -> None:
    async def wait() -> None:
        async with Timeout(0.05):
            await asyncio.sleep(60)

    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        asyncio.run(wait())
    assert time.monotonic() - begun < 10


def test_what_is_in_time_passes_with_its_result_and_its_errors() -> None:
    async def work(error: Exception | None) -> int:
        async with Timeout(60):
            await asyncio.sleep(0)
            if error is not None:
                raise error
            return 5

    assert asyncio.run(work(None)) == 5
    with pytest.raises(KeyError):
        asyncio.run(work(KeyError("mine")))


def test_a_task_that_somebody_else_cancels_is_cancelled() -> None:
    async def outer() -> bool:
        async def wait() -> None:
            async with Timeout(60):
                await asyncio.sleep(60)

        task = asyncio.create_task(wait())
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        return task.cancelled()

    assert asyncio.run(outer())


def test_a_task_goes_on_after_its_timeout() -> None:
    async def wait() -> str:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                async with Timeout(0.01):
                    await asyncio.sleep(60)
        await asyncio.sleep(0.02)
        return "on"

    assert asyncio.run(wait()) == "on"
