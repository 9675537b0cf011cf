"""The run directory: large requests on their way into the backend, as files in shared memory.

It holds Mosec's sockets, the workers' state files and these spooled requests. Requests go inline if there is no room.
The directory lies in /dev/shm if possible, else in the temporary folder, and is locked while the server lives. What
dead servers left behind is swept at start.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

import structlog

from workers.jobs import BESIDE, write_large
from workers.state import keep_spares

log = structlog.get_logger()

_PREFIX = "pem-server-"
_LONGEST_SOCKET = 107  # bytes of a Unix socket's path
_MOSEC_SOCKET = "mosec/ipc_InspectStage_99.socket"  # the longest name that Mosec gives one, below the run directory


def _bases(first: Path) -> list[Path]:
    return [first, Path(tempfile.gettempdir())]


class RunDir:
    """A locked directory for this server's run-time files."""

    def __init__(self, base: Path = Path("/dev/shm")) -> None:
        sweep(base)
        self.path = self._make(base)
        self.jobs = self.path / "jobs"
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def _make(self, first: Path) -> Path:
        for base in _bases(first):
            path = None
            try:
                path = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=base))
                if len(os.fsencode(path / _MOSEC_SOCKET)) > _LONGEST_SOCKET:
                    raise OSError(errno.ENAMETOOLONG, "its path is too long for a Unix socket")
                for folder in ("jobs", "workers", "progress"):
                    (path / folder).mkdir()
                _reserve_probe(path)
                keep_spares(path)
                return path
            except OSError as error:
                log.warning("no_run_directory", base=str(base), error=error.strerror)
                if path is not None:
                    shutil.rmtree(path, ignore_errors=True)
        tried = " nor in ".join(map(str, _bases(first)))
        raise OSError(
            errno.ENOSPC, f"the server's run directory can be made neither in {tried}; name another spool_dir"
        )

    def put(self, name: str, data: bytes) -> str | None:
        """Spool a request; return its path, or None if it should go inline (small, or no room)."""
        return write_large(self.jobs / name, data)

    def drop(self, path: str | None) -> None:
        """Remove an answered request's file."""
        if path is not None:
            with contextlib.suppress(OSError):
                os.unlink(path)
            beside = f"{os.path.basename(path)}{BESIDE}"
            with contextlib.suppress(OSError):  # the folder may be gone by now
                for name in os.listdir(self.jobs):
                    if name.startswith(beside):  # left by a worker that died
                        with contextlib.suppress(OSError):
                            os.unlink(self.jobs / name)

    def remove(self) -> None:
        """Remove the directory, at the very end."""
        shutil.rmtree(self.path, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._lock)


def _reserve_probe(path: Path) -> None:
    """Check that 2 MiB can be written here: the workers' state files must fit. Raises OSError if not."""
    probe = path / "probe"
    with probe.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 2 * 2**20)
    probe.unlink()


def sweep(base: Path) -> int:
    """Remove run directories whose server is gone; return how many."""
    removed = 0
    for folder in _bases(base):
        for path in folder.glob(f"{_PREFIX}*"):
            try:
                lock = os.open(path / "lock", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                if _owner_is_alive(path):
                    continue
                lock = -1
            except OSError:
                continue
            try:
                if lock >= 0:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed += 1
            except OSError:
                pass  # locked: its server lives
            finally:
                if lock >= 0:
                    os.close(lock)
    if removed:
        log.info("swept_run_directories", removed=removed)
    return removed


def _owner_is_alive(path: Path) -> bool:
    """Return True if the process in an unlocked directory's name lives: then it is just making the directory."""
    pid = path.name.removeprefix(_PREFIX).partition("-")[0]
    return pid.isdigit() and Path(f"/proc/{pid}").exists()
