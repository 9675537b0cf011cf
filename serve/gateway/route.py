"""A row of the table of routes (routes.py), for those that read it."""

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

DOOR: Final = ("key_missing", "key_wrong", "rate_limited", "internal")  # codes of whatever asks for a key


@dataclass(frozen=True, kw_only=True)
class Route:
    """One operation: who answers it, what it takes and answers, how it fails, and what others say of it."""

    method: Literal["GET", "POST", "DELETE"]
    path: str  # `{id}` at its end stands for whatever comes there
    handler: Handler
    who: Literal["anyone", "key", "as the settings say"] = "key"  # may call it, where there are keys
    # for metrics, logs and traces
    label: str = ""  # in metrics and traces; its path unless given
    quiet: Quiet = None
    timed: bool = False  # a pose request: its seconds are measured, and all its statuses are there from the start
    counted: tuple[int, ...] = (200,)  # statuses that are there from the start
    # for the OpenAPI document; without a summary it is left out of it
    tag: str = ""
    summary: str = ""
    text: str = ""
    request: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    failure: Failure = contract.PoseAnswer  # the form of its failures
    statuses: Mapping[int, str] = field(default_factory=lambda: {200: "The answer."})
    codes: Iterable[str] = DOOR
    curl: str = ""
    parameters: tuple[str, ...] = ()
    plain: tuple[str, Json] | None = None  # media type and example of an answer that is no struct
