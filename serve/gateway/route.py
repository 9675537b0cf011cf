"""The type of a row in the table of routes (routes.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec

from pem import contract
from serve.gateway.exchange import Answer, Call
from serve.gateway.service import Service
from serve.telemetry.logs import Quiet

Handler = Callable[[Service, Call], Awaitable[Answer]]
Failure = type[contract.PoseAnswer] | type[contract.SegDataAnswer]
Json = dict[str, Any]

DOOR: Final = ("key_missing", "key_wrong", "rate_limited", "internal")  # failures of every route with a key


@dataclass(frozen=True, kw_only=True)
class Route:
    """One operation: its handler, its request and answer, its failures, its labels and its documentation."""

    method: Literal["GET", "POST", "DELETE"]
    path: str  # a trailing `{id}` matches any text
    handler: Handler
    who: Literal["anyone", "key", "as the settings say"] = "key"  # who may call it, if the server has keys
    # for metrics, logs and traces
    label: str = ""  # in metrics and traces; default: the path
    quiet: Quiet = None
    timed: bool = False  # a pose request: its seconds are measured, and metrics show all its statuses from the start
    counted: tuple[int, ...] = (200,)  # statuses that metrics show from the start
    # for the OpenAPI document, which leaves out routes without a summary
    tag: str = ""
    summary: str = ""
    text: str = ""
    request: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    failure: Failure = contract.PoseAnswer  # the struct of its failures
    statuses: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})
    codes: Iterable[str] = DOOR
    curl: str = ""
    parameters: tuple[str, ...] = ()
    plain: tuple[str, Json] | None = None  # media type and example of an answer that is not a struct
