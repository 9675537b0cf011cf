"""Tasks whose failure must not go unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

log = structlog.get_logger()


def watched(work: Coroutine[Any, Any, Any], name: str, on_failure: Callable[[], None]) -> asyncio.Task[Any]:
    """Run `work` as a task; if it fails, log it at the highest level and call `on_failure`."""

    def ended(task: asyncio.Task[Any]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("task_failed", task=name, exc_info=error)
            on_failure()

    task = asyncio.create_task(work, name=name)
    task.add_done_callback(ended)
    return task
