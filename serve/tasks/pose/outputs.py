"""Remove files under the output root after a time: those that this server wrote, and no others.

A list in the data directory records the folders, one line for each request with an `output_dir`. Nothing is added to
the folders themselves, and a folder of somebody else's is never touched, whatever its files are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from pathlib import Path

import structlog

from posekit.errors import StoreError
from posekit.store import write_atomically
from workers.messages import OUTPUT_FILES

log = structlog.get_logger()

_PERIOD_S = 3600.0


class Outputs:
    """The folders that were written, and when."""

    def __init__(self, list_path: Path, days: int) -> None:
        self._path = list_path
        self._days = days  # 0: keep for ever

    def wrote(self, folder: Path) -> None:
        """Record a folder. If there is no room for the record, the folder's files stay."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{time.time():.0f} {os.fsencode(folder).hex()}\n")
        except OSError as error:
            log.warning("output_not_noted", error=error.strerror, hint="its files will not be removed by themselves")

    async def sweep_for_ever(self) -> None:
        """Sweep once an hour, for ever."""
        while self._days:
            removed = await asyncio.to_thread(self.sweep, time.time() - self._days * 86_400)
            if removed:
                log.info("outputs_removed", files=removed, older_than_days=self._days)
            await asyncio.sleep(_PERIOD_S)

    def sweep(self, oldest_unix: float) -> int:
        """Remove the files in folders that were last written before `oldest_unix`; return how many."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
        except OSError:
            return 0
        latest: dict[str, float] = {}
        for line in lines:
            written, _, folder = line.partition(" ")
            with contextlib.suppress(ValueError):
                latest[folder] = max(latest.get(folder, 0.0), float(written))
        old = [folder for folder, written in latest.items() if written < oldest_unix]
        removed = sum(_remove(Path(os.fsdecode(bytes.fromhex(folder)))) for folder in old)
        kept = "".join(f"{written:.0f} {folder}\n" for folder, written in latest.items() if folder not in old)
        if len(latest) < len(lines) or old:
            with contextlib.suppress(StoreError):
                write_atomically(self._path, kept.encode())
        return removed


def _remove(folder: Path) -> int:
    removed = 0
    for name in OUTPUT_FILES:
        with contextlib.suppress(OSError):
            (folder / name).unlink()
            removed += 1
    with contextlib.suppress(OSError):
        folder.rmdir()  # only if nothing else is in it
    return removed
