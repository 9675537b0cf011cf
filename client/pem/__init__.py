"""The client of PEM Server: arrays and files in, typed poses out. Millimetres throughout; see `help(pem.Client)`.

    import pem

    with pem.Client("http://127.0.0.1:8003") as server:
        server.objects.add("mug.ply", name="mug")
        result = server.estimate(rgb, depth, K, [mask], object_id="mug")
        for pose in result.poses:
            print(pose.T_cam_obj_mm if pose.ok else pose.error)

Names are imported on first use: the server's workers read the contract from here, and need no HTTP client.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pem.client import (
        DEFAULT_URL as DEFAULT_URL,
    )
    from pem.client import (
        AsyncClient as AsyncClient,
    )
    from pem.client import (
        BadInput as BadInput,
    )
    from pem.client import (
        Client as Client,
    )
    from pem.client import (
        ClientOptions as ClientOptions,
    )
    from pem.client import (
        ConnectionFailed as ConnectionFailed,
    )
    from pem.client import (
        DeadlinePassed as DeadlinePassed,
    )
    from pem.client import (
        DetectionOptions as DetectionOptions,
    )
    from pem.client import (
        Hypothesis as Hypothesis,
    )
    from pem.client import (
        KeyRefused as KeyRefused,
    )
    from pem.client import (
        NoPose as NoPose,
    )
    from pem.client import (
        NotFound as NotFound,
    )
    from pem.client import (
        ObjectOptions as ObjectOptions,
    )
    from pem.client import (
        OnboardingFailed as OnboardingFailed,
    )
    from pem.client import (
        Overloaded as Overloaded,
    )
    from pem.client import (
        PemError as PemError,
    )
    from pem.client import (
        Pose as Pose,
    )
    from pem.client import (
        PoseOptions as PoseOptions,
    )
    from pem.client import (
        PoseResult as PoseResult,
    )
    from pem.client import (
        RequestRefused as RequestRefused,
    )
    from pem.client import (
        ServerFailed as ServerFailed,
    )
    from pem.client import (
        TimedOut as TimedOut,
    )

__version__ = "0.1.0"

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


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pem' has no attribute {name!r}")
    from pem import client

    return getattr(client, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
