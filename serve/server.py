"""`pem serve`: start everything in order, watch over it, and stop it in order.

A start takes these steps: settings, data directory and its lock, the public port (it answers 503 at once), the backend,
the registered objects, ready. A stop takes these: readyz answers 503, requests in flight finish, the port closes, the
backend stops, temporary files are removed. A stop stays inside the drain limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog
import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware

from serve import __version__
from serve.backend.mosec import Backend
from serve.backend.run_dir import RunDir
from serve.backend.watched import watched
from serve.engine_choice import CannotStart, Offer, choose
from serve.errors import ApiError
from serve.gateway import routes
from serve.gateway.app import Gateway
from serve.gateway.service import Service
from serve.settings import Settings, SettingsError, unknown_variables
from serve.telemetry import logs
from serve.telemetry.tracing import Tracing
from workers.engines import with_fixed_versions

log = structlog.get_logger()

_BACKEND_GRACE_S = 0.3  # short: the backend is empty by then, and its workers need 2 s to notice a stop
_CLOSING_S = 1.0  # share of the drain limit that is kept for closing the port and stopping the backend


def serve(settings: Settings) -> int:
    """Run the server until SIGTERM or SIGINT; return the exit code. Raises CannotStart with words for the operator."""
    offer = choose(settings)
    devices = resolve_devices(settings)
    data = settings.data_path
    try:
        for folder in (data, settings.objects_path, settings.cad_path, settings.output_path):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"cannot create {error.filename}: {error.strerror}") from None
    _allow_many_files()
    with _locked(data), contextlib.closing(_listen(settings)) as listener:
        logs.configure(settings.log, data)
        try:
            return uvloop.run(_main(settings, offer, devices, listener))
        finally:
            logs.shutdown()


async def _main(
    settings: Settings,
    offer: Offer,
    devices: tuple[str, ...],
    listener: socket.socket,
) -> int:
    for name in unknown_variables(os.environ):
        log.warning("unknown_variable", name=name, hint="it looks like a setting and is none: a typo?")
    host, port = listener.getsockname()[:2]
    run_dir = RunDir(Path(settings.spool_dir))
    stages = with_fixed_versions(settings.stages(run_dir=run_dir.path, devices=devices, engines=offer.engines))
    backend = Backend(stages, run_dir.path)
    service = Service(
        settings,
        backend,
        run_dir,
        offer=offer,
        device=",".join(devices),
        tracing=Tracing.start(os.environ),
        routes=routes.counted(),
    )
    backend.on_ready, backend.on_worker_death = service.backend_ready, service.worker_died
    backend.on_line = logs.forward_line
    _warn_if_open(settings, service)
    service.objects.load()

    server = _Uvicorn(
        uvicorn.Config(
            _with_cors(Gateway(service), settings),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,  # else a client could claim the address of another and take its turns
            timeout_keep_alive=30,
        )
    )
    stop = _StopSignals()
    backend.on_fatal = stop.failed
    backend.on_hopeless = lambda why: None if service.warm else stop.cannot_start(why)
    serving = watched(server.serve(sockets=[listener]), "http server", stop.failed)
    serving.add_done_callback(lambda _: stop.asked.set())
    log.info(
        "listening",
        url=f"http://{host}:{port}",
        version=__version__,
        engine=service.engines.engine,
        device=service.device,
    )
    await backend.start()
    chores = [
        watched(service.queue.keep_order(), "queue", stop.failed),
        watched(service.pose.outputs.sweep_for_ever(), "output retention", stop.failed),
    ]
    await stop.asked.wait()
    if serving.done():
        stop.exit_code = 1  # the HTTP server ended without being asked to
    await _drain(settings, service, server, serving, stop)
    for chore in chores:
        chore.cancel()
    await asyncio.gather(*chores, return_exceptions=True)
    await service.close()
    run_dir.remove()
    log.info("stopped", exit_code=stop.exit_code)
    if stop.reason is not None:
        raise CannotStart(stop.reason)
    return stop.exit_code


async def _drain(
    settings: Settings, service: Service, server: uvicorn.Server, serving: asyncio.Task[None], stop: _StopSignals
) -> None:
    """Refuse new requests, let those in flight finish until the limit, then stop everything."""
    deadline = time.monotonic() + settings.drain_s
    service.draining = True
    log.info("draining", requests=service.in_flight, limit_s=settings.drain_s)
    while service.in_flight and not stop.insisted.is_set() and time.monotonic() < deadline - _CLOSING_S:
        await asyncio.sleep(0.02)
    if service.in_flight:
        log.warning("drain_limit", requests=service.in_flight)
        service.queue.fail_all(ApiError("draining", "the server is shutting down", retry_after_s=5))
        await asyncio.sleep(0.2)
    server.should_exit = True
    server.force_exit = service.in_flight > 0
    stopping = asyncio.create_task(service.backend.stop(_BACKEND_GRACE_S))
    await asyncio.wait({serving}, timeout=max(deadline - time.monotonic(), 0.5))
    await asyncio.gather(stopping, service.tracing.close(max(deadline - time.monotonic(), 0.5)))


def _with_cors(gateway: Gateway, settings: Settings) -> Any:
    if not settings.cors_origins:
        return gateway
    app: Any = gateway
    return CORSMiddleware(
        app,
        allow_origins=list(settings.cors_origins),
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=["X-Request-Id", "Server-Timing", "Retry-After", "traceparent"],
    )


class _Uvicorn(uvicorn.Server):
    """uvicorn without signal handlers: its own would close the port at once, and we drain first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _StopSignals:
    """The stop that SIGTERM, SIGINT or SIGHUP ask for. A second Ctrl-C insists; a second SIGTERM changes nothing."""

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.insisted = asyncio.Event()
        self.exit_code = 0
        self.reason: str | None = None  # why the server cannot start
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored under nohup: keep it so
                loop.add_signal_handler(number, self._signalled, number)

    def failed(self) -> None:
        """Stop with exit code 1: a part that the server cannot run without has failed."""
        self.exit_code = 1
        self.asked.set()

    def cannot_start(self, reason: str) -> None:
        """Stop for good: the settings ask for something that is not available, and another try would not help."""
        self.reason = reason
        self.failed()

    def _signalled(self, number: int) -> None:
        if self.asked.is_set() and number == signal.SIGINT:
            self.insisted.set()
        self.asked.set()


# ------------------------------------------------------------------------------------------------------------ the start


def resolve_devices(settings: Settings) -> tuple[str, ...]:
    """Return the devices to compute on: `cpu`, or a `cuda:N` per GPU. `auto`: all usable GPUs, else the CPU."""
    wanted = settings.device.strip().lower()
    if wanted == "cpu":
        return ("cpu",)
    count = _gpus()
    if wanted == "auto":
        return tuple(f"cuda:{index}" for index in range(count)) or ("cpu",)
    kind, _, indices = wanted.partition(":")
    if kind != "cuda" or not all(part.strip().isdigit() for part in indices.split(",") if indices):
        raise SettingsError(f"device {settings.device!r} is none of auto, cpu, cuda, cuda:0 or cuda:0,1")
    chosen = sorted({int(part) for part in indices.split(",")}) if indices else list(range(count))
    if not count or not chosen or max(chosen) >= count:
        raise CannotStart(
            f"device {settings.device!r}: this machine offers {count} GPU(s) to torch; use --device cpu or auto"
        )
    return tuple(f"cuda:{index}" for index in chosen)


def _allow_many_files() -> None:
    """Raise the limit on open files to what the system allows: each connection is one, and shells set a low limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _gpus() -> int:
    """Count the GPUs that the driver shows, without importing torch; 0 if torch is a CPU build."""
    try:
        if "+cpu" in importlib.metadata.version("torch"):
            return 0
        driver = ctypes.CDLL("libcuda.so.1")
    except (OSError, importlib.metadata.PackageNotFoundError):
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _listen(settings: Settings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with contextlib.ExitStack() as unless_bound:
            listener = unless_bound.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            unless_bound.pop_all()
    except OSError as error:
        raise CannotStart(f"cannot listen on {settings.host} port {settings.port}: {error.strerror or error}") from None
    listener.set_inheritable(False)
    return listener


@contextlib.contextmanager
def _locked(data: Path) -> Iterator[None]:
    """Hold the lock of a data directory: two servers on it would delete each other's work. Raises CannotStart."""
    lock = os.open(data / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise CannotStart(
            f"another server uses the data directory {data}; stop it, or give this one --data-dir"
        ) from None
    try:
        yield
    finally:
        os.close(lock)


def _warn_if_open(settings: Settings, service: Service) -> None:
    loopback = settings.host in ("127.0.0.1", "::1", "localhost")
    with contextlib.suppress(Exception):  # broken keys refuse every request, and each refusal is logged
        if not loopback and not service.keys:
            log.warning("open_to_everyone", host=settings.host, hint="no API keys: `pem keys add NAME` makes one")
