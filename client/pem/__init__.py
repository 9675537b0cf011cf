"""The client of PEM Server: arrays and files in, typed poses out. Millimetres throughout; see `help(pem.Client)`.

    import pem

    with pem.Client("http://127.0.0.1:8003") as server:
        server.objects.add("mug.ply", name="mug")
        result = server.estimate(rgb, depth, K, [mask], object_id="mug")
        for pose in result.poses:
            print(pose.T_cam_obj_mm if pose.ok else pose.error)

Names are imported on first use, since the server's workers import the contract from here and need no HTTP client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from pem.client import AsyncClient, Client
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
    from pem.options import ClientOptions, DetectionOptions, ObjectOptions, PoseOptions
    from pem.poses import Hypothesis, Pose, PoseResult
    from pem.rle import decode_rle, encode_rle
    from pem.steps import DEFAULT_URL

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
    "decode_rle",
    "encode_rle",
]

#: name -> its module, for the names that `pem.client` lacks
_ELSEWHERE: Final = {"decode_rle": "pem.rle", "encode_rle": "pem.rle"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pem' has no attribute {name!r}")
    return getattr(importlib.import_module(_ELSEWHERE.get(name, "pem.client")), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
