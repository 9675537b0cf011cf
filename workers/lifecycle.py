"""The life of a worker: it dies with its parent, limits its threads, reports its state, and backs off when it fails.

Every stage derives from `Stage`. Each stage also has one slot more than it needs, its keeper (`PEM_KEEPER=1`): a
process that sleeps before any heavy import. Mosec stops the whole server when all processes of a stage are gone. The
keeper stays alive while a crashed worker is replaced.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from mosec import Worker

from posekit import registry
from posekit.errors import BrokenCheckpoint
from workers import settings
from workers.messages import Failure
from workers.state import StateWriter

KEEPER = "PEM_KEEPER"  # "1": this slot only keeps its stage alive
SLOT = "PEM_SLOT"
DEVICE = "PEM_SLOT_DEVICE"  # named as in this process: the only GPU that it sees is cuda:0
DEVICE_NAME = "PEM_SLOT_DEVICE_NAME"  # named as in the server
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_HABITS = {
    # Waiting threads sleep. With busy cores, spinning made one detection of the network take 4 to 19 s instead of 1.4.
    "OMP_WAIT_POLICY": "passive",
    # Torch's large arrays use large pages: 18 000 fewer page faults for each detection of the network.
    "THP_MEM_ALLOC_ENABLE": "1",
}

_PR_SET_PDEATHSIG = 1
_FAILURES_COUNT_FOR_S = 600.0
_LONGEST_PAUSE_S = 30.0


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the thread that started this process ends; exit if that has happened already.

    The parent must have started this process from a thread that lives as long as the parent: its main thread.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)


def keep_stage_alive(parent_pid: int) -> None:
    """Sleep while the parent exists, then exit: a keeper's whole life."""
    while os.getppid() == parent_pid:
        time.sleep(1.0)
    os._exit(0)


def slot_environment(*, slot: int, keeper: bool, device: str, threads: int) -> dict[str, str]:
    """Return the variables of one slot. Every slot of every stage sets all of them, so that none leaks into the next.

    `device` is "cpu" or "cuda:N". A process that needs no GPU sees none, so that it cannot take memory there.
    """
    gpu = device.partition("cuda:")[2]
    variables = {
        KEEPER: "1" if keeper else "0",
        SLOT: str(slot),
        DEVICE: "cuda:0" if gpu else "cpu",
        DEVICE_NAME: device,
        "CUDA_VISIBLE_DEVICES": _visible_gpu(int(gpu)) if gpu else "",
    }
    return variables | dict.fromkeys(_THREADS, str(threads)) | _HABITS


def _visible_gpu(index: int) -> str:
    """Return GPU `index` among those that this process was given, in CUDA's own naming."""
    given = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return given[index] if index < len(given) else str(index)


def limit_threads(count: int) -> None:
    """Limit the libraries that are already loaded to `count` threads; the slot's variables limited OpenMP and BLAS."""
    if (cv2 := sys.modules.get("cv2")) is not None:
        cv2.setNumThreads(count)
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(count)


class Log:
    """Writes one line of JSON to standard error for each event; the gateway adds these lines to its log."""

    def __init__(self, stage: str) -> None:
        self._stage = stage

    def info(self, event: str, **fields: Any) -> None:
        """Log something worth knowing."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log something that an operator may want to change."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log an error."""
        self._write("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log an error with the exception being handled."""
        self._write("error", event, {**fields, "traceback": traceback.format_exc()})

    def _write(self, level: str, event: str, fields: Mapping[str, Any]) -> None:
        line = {"level": level, "event": event, "stage": self._stage, "pid": os.getpid(), "time": time.time(), **fields}
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(json.dumps(line, default=str) + "\n")
            sys.stderr.flush()


class Stage(Worker):
    """Base of all stages. A stage defines `stage_name`, `__init__`, `forward` and `receives`.

    `receives` is the type of its input, first in a route (`deserialize`) or behind another stage (`deserialize_ipc`).
    Each input is recorded in the worker's state before anything is done with it, and removed when its result leaves.
    """

    stage_name: ClassVar[str]
    receives: ClassVar[Any]
    resp_mime_type = "application/msgpack"

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.settings = settings.from_environment()
        self.log = Log(self.stage_name)
        self.spawned = multiprocessing.parent_process() is not None  # False if a test calls a stage directly
        slot = int(os.environ.get(SLOT) or 0)
        if self.spawned:
            _become_a_worker()
            _Starts(self.run_dir, self.stage_name, slot).pause_after_failures(self.log)
        self._slot = slot
        self.state = StateWriter(self.run_dir, self.stage_name, slot)
        if self.state.failure is not None:
            self.log.warning("no_state_file", reason=str(self.state.failure))
        self._decoder = msgspec.msgpack.Decoder(self.receives)
        self._encoder = msgspec.msgpack.Encoder()

    @property
    def run_dir(self) -> Path:
        """Return the folder where workers leave files for the gateway."""
        return Path(self.settings.run_dir)

    @contextlib.contextmanager
    def starting(self) -> Iterator[None]:
        """Wrap a stage's loading and warm-up: report `ready` at the end, or the reason for the failure."""
        begun = time.monotonic()
        try:
            yield
        except BaseException as error:
            self.state.update(error=f"{type(error).__name__}: {error}")
            self.log.exception("start_failed")
            raise
        if self.spawned:
            _Starts(self.run_dir, self.stage_name, self._slot).forget()
        self.state.ready()
        self.log.info("worker_ready", seconds=round(time.monotonic() - begun, 3))

    @contextlib.contextmanager
    def engine_start(self, name: str) -> Iterator[None]:
        """Wrap the start of an engine. If it fails and may have a stand-in, note the reason in the state's `lost`.

        Then the stage goes on without the engine. If the settings allow no stand-in (`fallback = false`), the failure
        passes through, and `fatal` in the state asks the gateway to stop instead of trying for ever. The failure of an
        engine that has no stand-in passes through unchanged.
        """
        try:
            yield
        except Exception as error:
            spec = registry.spec(name)
            if spec.stand_in is None:
                raise
            self.log.exception("engine_lost", engine=name)
            if self.settings.stand_in(name) is None:
                self.state.update(fatal=spec.cannot_start(str(error) or type(error).__name__))
                raise
            lost = self.state.state.info.get("lost", {})
            self.state.update(lost={**lost, name: _for_clients(error, spec.words)})

    def deserialize(self, data: bytes) -> Any:
        """Decode a message from the gateway."""
        message = self._decoder.decode(data)
        self.state.hold(item_id(message))
        return message

    def deserialize_ipc(self, data: bytes) -> Any:
        """Decode a message from the stage before."""
        return self.deserialize(data)

    def serialize(self, data: Any) -> bytes:
        """Encode a message for the gateway."""
        encoded = self._encoder.encode(data)
        self.state.release(item_id(data))
        return encoded

    def serialize_ipc(self, data: Any) -> bytes:
        """Encode a message for the next stage."""
        return self.serialize(data)

    def internal(self, message_id: str, **fields: Any) -> Failure:
        """Log the exception being handled; tell the client only that an internal error happened."""
        self.log.exception("internal_error", part_id=message_id, **fields)
        return Failure(part_id=message_id, code="internal", detail=INTERNAL_DETAIL)


INTERNAL_DETAIL = "an internal error happened; the server's log has it under this request's id"


def item_id(message: Any) -> str:
    """Return the id of a message in the gateway: its part's or its task's."""
    holder = getattr(message, "part", message)
    identity: str = holder.part_id if hasattr(holder, "part_id") else holder.task_id
    return identity


def _for_clients(error: Exception, engine: str) -> str:
    """Return why an engine could not be started, without internals of the server; `engine` is its name in the text."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return f"there is not enough memory for {engine}"
    what = "weights cannot be used" if isinstance(error, BrokenCheckpoint) else "start failed"
    return f"{engine}'s {what}; the server's log says why"


def _become_a_worker() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    die_with_parent(parent.pid)
    if os.environ.get(KEEPER) == "1":
        keep_stage_alive(parent.pid)
    warnings.filterwarnings("ignore", message="IPC data")  # Mosec warns about messages over 1 MB, normal here


class _Starts:
    """Counts a slot's recent starts that did not get ready, in a file: each start is a new process."""

    def __init__(self, run_dir: Path, stage: str, slot: int) -> None:
        self._path = starts_dir(run_dir) / f"{stage}-{slot}.json"

    def pause_after_failures(self, log: Log) -> None:
        """Record this start, and wait the longer, the more of the last ones failed."""
        now = time.time()
        failed = [started for started in self._read() if 0 <= now - started < _FAILURES_COUNT_FOR_S]
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps([*failed[-20:], now]))
        if failed:
            pause_s = min(0.5 * 2.0 ** (len(failed) - 1), _LONGEST_PAUSE_S)
            log.warning("starting_again", failed_starts=len(failed), pause_s=pause_s)
            time.sleep(pause_s)

    def forget(self) -> None:
        """Reset the count: this start succeeded."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _read(self) -> list[float]:
        try:
            return [float(started) for started in json.loads(self._path.read_text())]
        except (OSError, ValueError, TypeError):
            return []


def starts_dir(run_dir: Path) -> Path:
    """Return the folder where slots record their starts; it is emptied when the server starts."""
    return run_dir / "starts"
