"""A worker's report to the gateway while it lives: one small memory-mapped file per worker.

The file is allocated in full when the worker starts, so a disk that fills up later cannot stop it. It holds two copies
and one byte that says which of them is current. The writer fills the other copy and then flips the byte, so a worker
killed in the middle of a write leaves its last complete state behind. That matters most then: the gateway reads from
it which parts died with the worker.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import msgspec

COPY_BYTES = 64 * 1024
_FIRST_COPY = 64  # the byte that says which copy is current has the first cache line to itself
_FILE_BYTES = _FIRST_COPY + 2 * COPY_BYTES
_HEADER = struct.Struct("<II")  # length and crc32 of the content
_SPARES = 4  # files kept for workers that start while the disk is full
_READ_TRIES = 20
_READ_PAUSE_S = 0.0005


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """The last report of one worker process."""

    stage: str  # decode | pose | respond | inspect | onboard
    slot: int
    pid: int
    started_unix: float
    ready: bool = False
    holding: list[str] = []  # ids of the parts and tasks inside this worker
    busy_since_unix: float | None = None  # since when it has held something without a pause
    info: dict[str, Any] = {}

    @property
    def alive(self) -> bool:
        """Return True if the process still runs (a zombie does not)."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return False
        return stat.rpartition(")")[2].split()[0] not in ("Z", "X")


class StateWriter:
    """The worker's end. If its file cannot be made, everything else works and the state is absent."""

    def __init__(self, run_dir: Path, stage: str, slot: int) -> None:
        self._state = WorkerState(stage=stage, slot=slot, pid=os.getpid(), started_unix=time.time())
        self._encoder = msgspec.msgpack.Encoder()
        self._map: mmap.mmap | None = None
        self.failure: OSError | None = None  # the reason if there is no file
        path = states_dir(run_dir) / f"{stage}-{slot}-{os.getpid()}.state"
        try:
            self._map = _allocate(path)
        except OSError as error:
            self.failure = error
        self._write()

    @property
    def state(self) -> WorkerState:
        """Return the state as last written."""
        return self._state

    def ready(self, **info: Any) -> None:
        """Report that the worker can take work from now on."""
        self._change(ready=True, info={**self._state.info, **info})

    def update(self, **info: Any) -> None:
        """Add or replace entries of `info`."""
        self._change(info={**self._state.info, **info})

    def hold(self, item_id: str) -> None:
        """Record a part that came in; call it before anything is done with the part."""
        busy_since = self._state.busy_since_unix
        self._change(
            holding=[*self._state.holding, item_id], busy_since_unix=time.time() if busy_since is None else busy_since
        )

    def release(self, item_id: str) -> None:
        """Remove a part that is about to leave; unknown ids are ignored."""
        holding = list(self._state.holding)
        with contextlib.suppress(ValueError):
            holding.remove(item_id)
        self._change(holding=holding, busy_since_unix=self._state.busy_since_unix if holding else None)

    def release_all(self) -> None:
        """Remove all parts."""
        self._change(holding=[], busy_since_unix=None)

    @contextlib.contextmanager
    def holding(self, item_ids: list[str]) -> Iterator[Self]:
        """Hold several ids while the block runs."""
        for item_id in item_ids:
            self.hold(item_id)
        try:
            yield self
        finally:
            for item_id in item_ids:
                self.release(item_id)

    def _change(self, **changes: Any) -> None:
        self._state = msgspec.structs.replace(self._state, **changes)
        self._write()

    def _write(self) -> None:
        if self._map is None:
            return
        encoded = self._encoder.encode(self._state)
        if len(encoded) > COPY_BYTES - _HEADER.size:  # drop the lists: what matters most is small
            encoded = self._encoder.encode(msgspec.structs.replace(self._state, info=_shortened(self._state.info)))
        current = 1 - self._map[0]
        start = _FIRST_COPY + current * COPY_BYTES
        end = start + _HEADER.size + len(encoded)
        self._map[start:end] = _HEADER.pack(len(encoded), zlib.crc32(encoded)) + encoded
        self._map[0] = current


def read_states(run_dir: Path) -> list[WorkerState]:
    """Return every worker's state, dead workers included (see `WorkerState.alive`), until `remove_state` removes it.

    Files that another process is just making, or that hold nothing valid, are left out.
    """
    try:
        names = sorted(name for name in os.listdir(states_dir(run_dir)) if name.endswith(".state"))
    except FileNotFoundError:
        return []
    states = (_read(states_dir(run_dir) / name) for name in names)
    return [state for state in states if state is not None]


def keep_spares(run_dir: Path) -> None:
    """Reserve the spare files, as far as there is room."""
    for spare in _spares(states_dir(run_dir)):
        with contextlib.suppress(OSError):
            _reserve(spare)


def remove_state(run_dir: Path, pid: int) -> None:
    """Remove the state of worker `pid`; its file becomes a spare if one was taken."""
    for path in states_dir(run_dir).glob(f"*-{pid}.state"):
        with contextlib.suppress(OSError):
            missing = next((spare for spare in _spares(path.parent) if not spare.exists()), None)
            if missing is None:
                path.unlink(missing_ok=True)
            else:
                with path.open("r+b") as file:
                    file.write(bytes(_FILE_BYTES))
                path.rename(missing)


def states_dir(run_dir: Path) -> Path:
    """Return the folder of the state files."""
    return run_dir / "workers"


def progress_path(run_dir: Path, object_id: str, engine: str) -> Path:
    """Return the file where an engine's onboard stage writes how far it is with an object, 0 to 1."""
    return run_dir / "progress" / f"{object_id}-{engine}"


def _shortened(info: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that are no lists, and the names of those that are."""
    kept: dict[str, Any] = {name: value for name, value in info.items() if not isinstance(value, list)}
    return kept | {"left_out": sorted(info.keys() - kept.keys())}


def _allocate(path: Path) -> mmap.mmap:
    """Map a new, zeroed file of full size. Its blocks are reserved: a write to the map cannot fail later.

    On a full disk it is one of the spares.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        _reserve(path)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        if not any(_moved(spare, path) for spare in _spares(path.parent)):
            raise
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        return mmap.mmap(descriptor, _FILE_BYTES)
    finally:
        os.close(descriptor)


def _reserve(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        os.posix_fallocate(descriptor, 0, _FILE_BYTES)
    finally:
        os.close(descriptor)


def _spares(folder: Path) -> list[Path]:
    return [folder / f"spare-{number}" for number in range(_SPARES)]


def _moved(path: Path, to: Path) -> bool:
    """Rename a file; return True if it was there."""
    try:
        path.rename(to)
    except FileNotFoundError:
        return False
    return True


def _read(path: Path) -> WorkerState | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        for _ in range(_READ_TRIES):
            if (encoded := _current(descriptor)) is not None:
                return msgspec.msgpack.decode(encoded, type=WorkerState)
            time.sleep(_READ_PAUSE_S)
    except (OSError, msgspec.DecodeError):
        return None
    finally:
        os.close(descriptor)
    return None


def _current(descriptor: int) -> bytes | None:
    """Read the current copy and nothing else of the file: the gateway reads all states ten times a second."""
    which = os.pread(descriptor, 1, 0)
    start = _FIRST_COPY + COPY_BYTES * (which == b"\x01")
    header = os.pread(descriptor, _HEADER.size, start)
    if os.fstat(descriptor).st_size != _FILE_BYTES or len(header) < _HEADER.size:
        return None  # still being made
    length, crc = _HEADER.unpack(header)
    if not 0 < length <= COPY_BYTES - _HEADER.size:
        return None
    encoded = os.pread(descriptor, length, start + _HEADER.size)
    return encoded if zlib.crc32(encoded) == crc else None
