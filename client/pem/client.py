"""The two clients, a blocking one and an async one: arrays, files and meshes in, typed poses out.

All lengths are millimetres. Rotations are object to camera in the OpenCV camera frame: `p_cam = R p_obj + t`.

Every verb is written once, in `client/pem/steps.py`; the two clients differ only in how they send and sleep.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import httpx

from pem.contract import ObjectAnswer, Status, Version
from pem.errors import (
    BadInput,
    ConnectionFailed,
    DeadlinePassed,
    KeyRefused,
    NoPose,
    NotFound,
    NotReady,
    OnboardingFailed,
    Overloaded,
    PemError,
    RequestRefused,
    ServerFailed,
    TimedOut,
)
from pem.meshfiles import Mesh
from pem.options import (
    Camera,
    ClientOptions,
    DetectionOptions,
    Mask,
    ObjectOptions,
    Picture,
    PoseOptions,
    merged,
    takes,
)
from pem.poses import Hypothesis, Pose, PoseResult
from pem.steps import DEFAULT_URL, Steps, Verbs, object_path

__all__ = [
    "DEFAULT_URL",
    "AsyncClient",
    "BadInput",
    "Client",
    "ClientOptions",
    "ConnectionFailed",
    "DeadlinePassed",
    "DetectionOptions",
    "Hypothesis",
    "KeyRefused",
    "NoPose",
    "NotFound",
    "NotReady",
    "ObjectOptions",
    "OnboardingFailed",
    "Overloaded",
    "PemError",
    "Pose",
    "PoseOptions",
    "PoseResult",
    "RequestRefused",
    "ServerFailed",
    "TimedOut",
]

T = TypeVar("T")


class Client(Verbs):
    """A connection to a PEM server; `with Client(url) as pem:` closes it. Safe to share between threads.

    A call is retried if the server refuses with 429 or 503 and Retry-After (Overloaded, NotReady, a lost worker; the
    server names the pause) or if the connection breaks (pauses of 0.2, 0.4, 0.8 s). Retries end after `retries` (3) of
    them, after `retry_budget_s` (30 s) of pauses in total, or at `deadline_s`, whichever comes first. Then the last
    error is raised. An answer that does not come within `timeout_s` (60 s) raises TimedOut and is not retried. Every
    other refusal is raised at once.

    A server that has just been started needs longer than these retries: `wait_ready` waits for it, by default 120 s.
    """

    @takes(ClientOptions)
    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, options: ClientOptions | None = None, **more: Any
    ) -> None:
        """Make a client of `url`. The key is `api_key`, by default the variable PEM_API_KEY; "" means no key."""
        chosen = merged(type(self).__name__, ClientOptions, options, more, "url", "api_key", "options")
        super().__init__(url, api_key, ClientOptions(**chosen))
        self._http = httpx.Client(**self._http_arguments)
        self.objects = Objects(self)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    @takes(DetectionOptions)
    def estimate(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        masks: Sequence[Mask] | None = None,
        options: DetectionOptions | PoseOptions | None = None,
        **more: Any,
    ) -> PoseResult:
        """Return the pose of each detection, in the order given.

        rgb: (H, W, 3) uint8, or a PNG or JPEG.
        depth: (H, W) uint16 as the sensor gave it, or floats with `depth_scale` or `depth_unit="m"`, or a 16-bit PNG or
        float TIFF. 0 and NaN mean no reading.
        K: (3, 3) in pixels, whose centres have integer coordinates as in OpenCV; or a loaded camera.json, a dict with
        `cam_K`. Options win over its `depth_scale` and `depth_unit`.
        masks: each (H, W) bool, a PNG, a COCO RLE, or a list of polygons. An empty list is valid.
        Give image files by path (str or Path) or as bytes.
        """
        return self._run(self._estimate(rgb, depth, K, masks, options, more))

    @takes(PoseOptions)
    def full_pipeline(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        *,
        template_dir: str,
        ism_cad_path: str | None = None,
        options: PoseOptions | None = None,
        **more: Any,
    ) -> PoseResult:
        """Run `estimate` with the ISM server's detections; `template_dir` and `ism_cad_path` are its paths."""
        paths = {"template_dir": template_dir, "ism_cad_path": ism_cad_path}
        return self._run(self._full_pipeline(rgb, depth, K, paths, options, more))

    def status(self) -> Status:
        """Return the server's status."""
        return self._run(self._get("/api/v1/status", Status))

    def version(self) -> Version:
        """Return the versions of the server, its engine and its weights."""
        return self._run(self._get("/api/v1/version", Version))

    def openapi(self) -> dict[str, Any]:
        """Return the server's OpenAPI document."""
        return self._run(self._get("/openapi.json", dict[str, Any]))

    def ready(self) -> bool:
        """Return True if the server takes pose requests now; False also if no server answers at all."""
        return self._run(self._ready()) is None

    def wait_ready(self, timeout_s: float = 120.0, on_wait: Callable[[str], None] | None = None) -> None:
        """Wait until the server is ready, even if it does not answer yet; ask five times a second.

        Each time, `on_wait` gets the reason why the server is not ready. Raises TimedOut after `timeout_s`.
        """
        self._run(self._wait_ready(timeout_s, on_wait))

    def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, float):
                    time.sleep(step)
                    step = next(steps)
                    continue
                try:
                    with step.arguments() as arguments:
                        response = self._http.request(**arguments)
                except httpx.RequestError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


class Objects:
    """The CAD objects of a server: `client.objects`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @takes(ObjectOptions)
    def add(self, cad: str | Path | bytes | Mesh, options: ObjectOptions | None = None, **more: Any) -> ObjectAnswer:
        """Register a CAD model and wait until it is ready.

        cad: the path of a file, its bytes with `cad_format`, a `trimesh.Trimesh` or another mesh with vertices and
        faces, or the pair `(vertices, faces)`: (n, 3) lengths in `model_unit` and (m, 3) indices. Adding a model that
        the server already has is quick. With `replace` the name moves to this object from the one that has it, once
        this one is ready. Raises OnboardingFailed; the name then stays with the other object.
        """
        chosen = ObjectOptions(**merged("add", ObjectOptions, options, more, "cad", "options"))
        return self._client._run(self._client._add(cad, chosen))

    def list(self) -> list[ObjectAnswer]:
        """Return all registered objects."""
        return self._client._run(self._client._list())

    def get(self, object_id: str) -> ObjectAnswer:
        """Return one object by its id or name."""
        return self._client._run(self._client._get(object_path(object_id), ObjectAnswer))

    def remove(self, object_id: str) -> None:
        """Remove a name, and the object with its last name; given an id, remove the object with all its names."""
        self._client._run(self._client._remove(object_id))


class AsyncClient(Verbs):
    """The async client, with the verbs of Client: `async with AsyncClient(url) as pem:`."""

    @takes(ClientOptions)
    def __init__(
        self, url: str = DEFAULT_URL, api_key: str | None = None, options: ClientOptions | None = None, **more: Any
    ) -> None:
        """Make a client of `url`. The key is `api_key`, by default the variable PEM_API_KEY; "" means no key."""
        chosen = merged(type(self).__name__, ClientOptions, options, more, "url", "api_key", "options")
        super().__init__(url, api_key, ClientOptions(**chosen))
        self._http = httpx.AsyncClient(**self._http_arguments)
        self.objects = AsyncObjects(self)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @takes(DetectionOptions)
    async def estimate(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        masks: Sequence[Mask] | None = None,
        options: DetectionOptions | PoseOptions | None = None,
        **more: Any,
    ) -> PoseResult:
        """See Client.estimate."""
        return await self._run(self._estimate(rgb, depth, K, masks, options, more))

    @takes(PoseOptions)
    async def full_pipeline(
        self,
        rgb: Picture,
        depth: Picture,
        K: Camera,
        *,
        template_dir: str,
        ism_cad_path: str | None = None,
        options: PoseOptions | None = None,
        **more: Any,
    ) -> PoseResult:
        """See Client.full_pipeline."""
        paths = {"template_dir": template_dir, "ism_cad_path": ism_cad_path}
        return await self._run(self._full_pipeline(rgb, depth, K, paths, options, more))

    async def status(self) -> Status:
        """See Client.status."""
        return await self._run(self._get("/api/v1/status", Status))

    async def version(self) -> Version:
        """See Client.version."""
        return await self._run(self._get("/api/v1/version", Version))

    async def openapi(self) -> dict[str, Any]:
        """See Client.openapi."""
        return await self._run(self._get("/openapi.json", dict[str, Any]))

    async def ready(self) -> bool:
        """See Client.ready."""
        return await self._run(self._ready()) is None

    async def wait_ready(self, timeout_s: float = 120.0, on_wait: Callable[[str], None] | None = None) -> None:
        """See Client.wait_ready."""
        await self._run(self._wait_ready(timeout_s, on_wait))

    async def _run(self, steps: Steps[T]) -> T:
        try:
            step = next(steps)
            while True:
                if isinstance(step, float):
                    await asyncio.sleep(step)
                    step = next(steps)
                    continue
                try:
                    with step.arguments() as arguments:
                        response = await self._http.request(**arguments)
                except httpx.RequestError as error:
                    step = steps.throw(error)
                else:
                    step = steps.send(response)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]


class AsyncObjects:
    """The CAD objects of a server, async: `client.objects`."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    @takes(ObjectOptions)
    async def add(
        self, cad: str | Path | bytes | Mesh, options: ObjectOptions | None = None, **more: Any
    ) -> ObjectAnswer:
        """See Objects.add."""
        chosen = ObjectOptions(**merged("add", ObjectOptions, options, more, "cad", "options"))
        return await self._client._run(self._client._add(cad, chosen))

    async def list(self) -> list[ObjectAnswer]:
        """See Objects.list."""
        return await self._client._run(self._client._list())

    async def get(self, object_id: str) -> ObjectAnswer:
        """See Objects.get."""
        return await self._client._run(self._client._get(object_path(object_id), ObjectAnswer))

    async def remove(self, object_id: str) -> None:
        """See Objects.remove."""
        await self._client._run(self._client._remove(object_id))
