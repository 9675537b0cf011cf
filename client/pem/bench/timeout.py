"""`asyncio.timeout` for Python 3.10, which has only `wait_for`: that wraps each request in a task of its own."""

from __future__ import annotations

import asyncio
from types import TracebackType


class Timeout:
    """`async with Timeout(seconds):` cancels what the block waits for after so long; then TimeoutError comes out."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._over = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task: asyncio.Task[object] = task
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._over and kind is asyncio.CancelledError:
            if (uncancel := getattr(self._task, "uncancel", None)) is not None and uncancel() > 0:
                return  # somebody else has cancelled it, too, which a time-out must not swallow
            raise TimeoutError from None

    def _end(self) -> None:
        self._over = True
        self._task.cancel()
