"""One Mosec backend: its processes from start to stop, its workers' lives, and the calls into it.

The backend runs in a process group of its own. The kernel kills it when this process dies. It is restarted when it dies
by itself, and killed as a group when it does not stop in time. A watcher per worker pid reports at once when a worker
is gone. The calls that it held end with `Interrupted`, so that the caller can send them again without waiting for a
time-out.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal

import aiohttp
import structlog

from pem.host.ports import free_port
from posekit import registry
from serve.backend.watched import watched
from workers.settings import Stages, to_environment
from workers.state import WorkerState, read_states, remove_state

log = structlog.get_logger()

ROUTE_STAGES: Final = {
    "/pose": {"decode", "pose", "respond"},
    "/finish": {"respond"},
    "/inspect": {"inspect"},
    **{f"/{engine.onboard_stage}": {engine.onboard_stage} for engine in registry.by_effort()},
}
_MOSEC_TIMEOUT_MS = 3_600_000  # never ends a call: the deadlines are ours
_CAPACITY = 4096
_MAX_BODY = 1 << 30
_SCAN_S = 0.1
_AWAY_S = 0.3
_START_LIMIT_S = 300.0
_BACKOFF_S = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


class BackendError(Exception):
    """A call into the backend failed."""


class Interrupted(BackendError):
    """The process that the call was in is gone. `held`: it died while holding this very call."""

    def __init__(self, *, held: bool) -> None:
        super().__init__("a worker died")
        self.held = held


class Refused(BackendError):
    """The backend answered with something other than 200."""


class _Call:
    def __init__(self, call_id: str, stages: set[str]) -> None:
        self.call_id = call_id
        self.stages = stages
        self.interrupted: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    def interrupt(self, *, held: bool) -> None:
        if not self.interrupted.done():
            self.interrupted.set_result(held)


State = Literal["starting", "ready", "restarting", "stopped"]


class Backend:
    """Starts Mosec, keeps it alive, and sends messages through its routes."""

    def __init__(
        self,
        stages: Stages,
        run_dir: Path,
        *,
        name: str = "production",
        on_ready: Callable[[], Awaitable[None]] | None = None,
        on_worker_death: Callable[[WorkerState], None] | None = None,
    ) -> None:
        self.name = name
        self.stages = stages
        self.run_dir = run_dir
        self.state: State = "starting"
        self.restarts = 0  # restarts of the whole backend
        self.worker_restarts = 0  # restarts of single workers
        self.workers: dict[int, WorkerState] = {}
        self.on_ready = on_ready
        self.on_worker_death = on_worker_death
        self.on_fatal: Callable[[], None] = lambda: None  # a task that looks after it has itself failed
        self.on_hopeless: Callable[[str], None] = lambda _: None  # a worker cannot start; the text is its reason
        self.on_line: Callable[[bytes], None] = lambda _: None  # a line that its processes wrote to standard error
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0
        self._session: aiohttp.ClientSession | None = None
        self._calls: dict[str, _Call] = {}
        self._pidfds: dict[int, int] = {}
        self._busy: dict[int, tuple[float | None, float]] = {}  # pid -> its batch's mark, and since when on our clock
        self._staffed = False  # every stage of a pose request has a ready worker
        self._told_ready = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._stopping = False
        self._ready = asyncio.Event()
        self._down_since: float | None = time.monotonic()

    # ------------------------------------------------------------------------------------------------------ life

    async def start(self) -> None:
        """Start it and the tasks that look after it; return at once (see `wait_ready`)."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=aiohttp.ClientTimeout(total=None),
            auto_decompress=False,
        )
        self._tasks = [
            watched(self._supervise(), "backend supervisor", self._fatal),
            watched(self._watch(), "worker watch", self._fatal),
        ]

    async def wait_ready(self) -> None:
        """Wait until every stage has a worker and every pose worker is warm."""
        await self._ready.wait()

    @property
    def is_ready(self) -> bool:
        """Return True if pose calls can be sent now: it is up, and every stage of theirs has a worker."""
        return self._ready.is_set() and self._staffed

    def _fatal(self) -> None:
        self.on_fatal()

    @property
    def down_s(self) -> float:
        """Return how long it has not been ready, in seconds."""
        return 0.0 if self._down_since is None else time.monotonic() - self._down_since

    async def stop(self, grace_s: float) -> None:
        """Send SIGTERM, and after `grace_s` SIGKILL to the whole group. Nothing of it is left behind."""
        self._stopping = True
        self._ready.clear()
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), max(grace_s, 0.1))
            self._kill_group()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5.0)
        self.state = "stopped"
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for pid in list(self._pidfds):
            self._forget(pid)
        if self._session is not None:
            await self._session.close()

    async def _supervise(self) -> None:
        failures = 0
        while not self._stopping:
            started = time.monotonic()
            try:
                await self._launch()
                readiness = watched(self._become_ready(), "backend start", self._fatal)
                assert self._process is not None
                returncode = await self._process.wait()
                readiness.cancel()
                if self._is_stopping():
                    return
                log.error("backend_died", track=self.name, returncode=returncode, calls=len(self._calls))
            except (OSError, subprocess.SubprocessError) as error:
                log.error("backend_start_failed", track=self.name, error=str(error))
            was_ready = self._ready.is_set()
            self._ready.clear()
            self._told_ready = False
            self.state = "restarting" if was_ready or self.state == "restarting" else "starting"
            self._kill_group()
            self._everything_is_gone()
            failures = 0 if time.monotonic() - started > 60 else failures + 1
            self.restarts += 1
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])

    def _is_stopping(self) -> bool:
        return self._stopping  # a method, because it changes while `_supervise` waits

    async def _launch(self) -> None:
        self._port = free_port()
        mosec_dir = self.run_dir / "mosec"
        shutil.rmtree(mosec_dir, ignore_errors=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MOSEC_")}
        environment |= to_environment(self.stages) | {"PEM_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        options = {
            "path": mosec_dir,
            "address": "127.0.0.1",
            "port": self._port,
            "timeout": _MOSEC_TIMEOUT_MS,
            "capacity": _CAPACITY,
            "max-request-size": _MAX_BODY,
            "log-level": "warning",
        }
        arguments = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "serve.app",
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_die_with_this_process(os.getpid()),
            limit=2**20,
        )
        asyncio.create_task(self._forward_log(self._process)).add_done_callback(lambda _: None)
        log.debug("backend_started", track=self.name, pid=self._process.pid, port=self._port)

    async def _forward_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # a line over the limit; the reader has dropped it
                continue
            if not line:
                return
            try:
                self.on_line(line)
            except Exception:  # a line that cannot be told must not stop those that follow: the pipe would fill up
                log.exception("backend_line_not_told", track=self.name)

    async def _become_ready(self) -> None:
        begun = time.monotonic()
        while True:
            warm = sum(w.ready for w in self.workers.values() if w.stage == "pose" and w.alive)
            if warm >= len(self.stages.devices) and await self._port_is_open():
                break
            if time.monotonic() - begun > _START_LIMIT_S:
                log.error("backend_not_ready", track=self.name, seconds=round(time.monotonic() - begun))
                self._kill_group()
                return
            await asyncio.sleep(0.05)
        self.state = "ready"
        self._ready.set()
        self._take_stock()
        log.info(
            "backend_ready", track=self.name, seconds=round(time.monotonic() - begun, 2), workers=self.worker_counts()
        )
        if self.on_ready is not None:
            await self.on_ready()
        self._told_ready = True

    async def _port_is_open(self) -> bool:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            return False
        writer.close()
        return True

    def _kill_group(self) -> None:
        """Send SIGKILL to the backend's main process and to all that it has started: it leads their group.

        Multiprocessing's resource tracker is spared: it ends by itself when all others have, after removing their
        semaphores from shared memory.
        """
        if self._process is None:
            return
        for pid in sorted(_group(self._process.pid)):  # the main process first, so that it starts no new ones
            with contextlib.suppress(OSError):
                if b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    # --------------------------------------------------------------------------------------------------- workers

    def worker_counts(self) -> dict[str, int]:
        """Return the number of ready workers by stage."""
        counts = dict.fromkeys(("decode", "pose", "respond", "inspect", "onboard"), 0)
        for worker in self.workers.values():
            counts[worker.stage] = counts.get(worker.stage, 0) + worker.ready
        return counts

    def pose_info(self) -> dict[str, Any]:
        """Return the `info` of the first pose worker."""
        for worker in self.workers.values():
            if worker.stage == "pose" and worker.ready:
                return worker.info
        return {}

    def lost(self) -> dict[str, str]:
        """Return engine -> why a worker could not start it; the worker runs without it."""
        found: dict[str, str] = {}
        for worker in self.workers.values():
            found |= worker.info.get("lost", {})
        return found

    async def _watch(self) -> None:
        """Find new workers, and kill those stuck in one batch beyond the limit."""
        while True:
            try:
                for state in read_states(self.run_dir):
                    if state.pid not in self._pidfds:
                        self._adopt(state)
                    else:
                        self.workers[state.pid] = state
                    self._kill_if_stuck(state)
                if self._take_stock() and self._told_ready and self.on_ready is not None:
                    await self.on_ready()
            except OSError as error:  # out of file descriptors, for example: they will be free again
                log.error("worker_watch_failed", error=str(error))
                await asyncio.sleep(1.0)
            await asyncio.sleep(_SCAN_S)

    def _take_stock(self) -> bool:
        """Record if every stage of a pose request has a worker; return True when one has just come back."""
        ready = {worker.stage for worker in self.workers.values() if worker.ready}
        before, self._staffed = self._staffed, ready >= ROUTE_STAGES["/pose"]
        if self.is_ready:
            self._down_since = None
        elif self._down_since is None:
            self._down_since = time.monotonic()
        return self._staffed and not before

    def _adopt(self, state: WorkerState) -> None:
        self.workers[state.pid] = state
        try:
            pidfd = os.pidfd_open(state.pid)
        except ProcessLookupError:
            self._worker_died(state.pid)
            return
        self._pidfds[state.pid] = pidfd
        asyncio.get_running_loop().add_reader(pidfd, self._worker_died, state.pid)

    def _kill_if_stuck(self, state: WorkerState) -> None:
        """Kill a worker stuck in one batch; seconds are counted here, on a clock that nobody sets."""
        if state.busy_since_unix is None:
            self._busy.pop(state.pid, None)
            return
        batch, since = self._busy.get(state.pid, (None, 0.0))
        if batch != state.busy_since_unix:
            batch, since = self._busy[state.pid] = (state.busy_since_unix, time.monotonic())
        busy_s = time.monotonic() - since
        limit_s = (self.stages.pose if state.stage in ROUTE_STAGES["/pose"] else self.stages.onboard).max_seconds
        if busy_s > limit_s and state.pid in self._pidfds:
            log.error("worker_stuck", stage=state.stage, pid=state.pid, seconds=round(busy_s), held=len(state.holding))
            self._busy.pop(state.pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(state.pid, signal.SIGKILL)

    def _worker_died(self, pid: int) -> None:
        self._close_pidfd(pid)  # whatever happens below, this must not be called again
        states = read_states(self.run_dir)
        last = {state.pid: state for state in states}.get(pid) or self.workers.get(pid)
        self._forget(pid)
        if last is None or self._stopping:
            return
        if "fatal" in last.info:
            self.on_hopeless(last.info["fatal"])
        held_by_others = {i for s in states if s.pid != pid and s.alive for i in s.holding}
        for call in list(self._calls.values()):
            if call.call_id in last.holding:
                call.interrupt(held=True)
            elif last.stage in call.stages and call.call_id not in held_by_others:
                call.interrupt(held=False)  # perhaps on its way into the dead one: nothing else would ever report it
        self.worker_restarts += 1
        self._take_stock()
        log.error("worker_died", stage=last.stage, pid=pid, held=len(last.holding))
        if self.on_worker_death is not None:
            self.on_worker_death(last)

    def _everything_is_gone(self) -> None:
        try:
            states = read_states(self.run_dir)
        except OSError:  # out of file descriptors: all of it counts as never having arrived
            states = []
        held = {i for state in states for i in state.holding}
        last = self.workers | {state.pid: state for state in states if state.pid in self.workers}
        for pid in last:
            self._forget(pid)
        self._take_stock()
        for call in list(self._calls.values()):
            call.interrupt(held=call.call_id in held)
        if self.on_worker_death is not None and not self._stopping:
            for worker in last.values():  # those that the watch has not found yet will be found dead
                self.on_worker_death(worker)

    def _forget(self, pid: int) -> None:
        self.workers.pop(pid, None)
        self._busy.pop(pid, None)
        self._close_pidfd(pid)
        remove_state(self.run_dir, pid)

    def _close_pidfd(self, pid: int) -> None:
        pidfd = self._pidfds.pop(pid, None)
        if pidfd is not None:
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)

    # ----------------------------------------------------------------------------------------------------- calls

    async def call(self, route: str, call_id: str, payload: bytes) -> bytes:
        """Send one message through `route` and wait for its answer, however long it takes.

        Raises Interrupted when a worker died with it, Refused for anything but 200. Cancelling drops the connection.
        """
        assert self._session is not None
        call = _Call(call_id, ROUTE_STAGES[route])
        self._calls[call_id] = call
        exchange = asyncio.ensure_future(self._post(route, payload))
        try:
            await asyncio.wait((exchange, call.interrupted), return_when=asyncio.FIRST_COMPLETED)
            if exchange.done():
                return exchange.result()
            raise Interrupted(held=call.interrupted.result())
        finally:
            if self._calls.get(call_id) is call:
                del self._calls[call_id]
            if not exchange.done():
                exchange.cancel()
                with contextlib.suppress(asyncio.CancelledError, BackendError):
                    await exchange

    async def _post(self, route: str, payload: bytes) -> bytes:
        assert self._session is not None
        try:
            async with self._session.post(f"http://127.0.0.1:{self._port}{route}", data=payload) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError):
            await asyncio.sleep(_AWAY_S)  # Mosec's front is gone; first its main process notices, then this one
            raise Interrupted(held=False) from None
        if response.status in (408, 429, 503):
            await asyncio.sleep(_AWAY_S)
            raise Interrupted(held=False)
        if response.status != 200:
            raise Refused(f"{route} answered {response.status}: {body[:200]!r}")
        return body

    async def metrics_text(self) -> str | None:
        """Return Mosec's own metrics page; None if it does not answer at once."""
        if self._session is None or not self.is_ready:
            return None
        try:
            url = f"http://127.0.0.1:{self._port}/metrics"
            async with self._session.get(url, timeout=aiohttp.ClientTimeout(total=2.0)) as response:
                return await response.text() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def call_with_retries(self, route: str, call_id: str, payload: bytes, *, retries: int) -> bytes:
        """Send a message, and again if a worker died with it; at most `retries` times if the dead worker held it."""
        attempt = 0
        while True:
            await self.wait_ready()
            try:
                return await self.call(route, call_id, payload)
            except Interrupted as interruption:
                attempt += interruption.held
                if attempt > retries:
                    raise
                await asyncio.sleep(0.1)


def _group(leader_pid: int) -> list[int]:
    """Return the processes of a group."""
    pids = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[2]) == leader_pid:
                    pids.append(int(entry.name))
    return pids


_PR_SET_PDEATHSIG = 1


def _die_with_this_process(parent_pid: int) -> Callable[[], None]:
    """Return a function for the child to call before exec: the kernel kills the child when the parent's thread ends.

    That is the thread that started it, the only one of this process.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def in_child() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)

    return in_child
