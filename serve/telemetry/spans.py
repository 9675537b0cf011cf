"""What a trace is made of: spans, and the context of each as W3C Trace Context writes it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final, Literal

SAMPLED: Final = 0x01  # flag of a context: its spans are recorded

Value = str | int | float
Kind = Literal["internal", "server", "client"]


@dataclass(frozen=True, slots=True)
class Context:
    """A span's place: what travels in the headers `traceparent` and `tracestate`."""

    trace_id: str  # 32 hexadecimal digits
    span_id: str  # 16
    flags: int = 0
    state: str = ""  # as it came: for the systems behind us

    @property
    def traceparent(self) -> str:
        """The header of this name, version 00."""
        return f"00-{self.trace_id}-{self.span_id}-{self.flags:02x}"

    @property
    def headers(self) -> dict[str, str]:
        """What a request to another server carries so that its spans become children of this one."""
        return {"traceparent": self.traceparent} | ({"tracestate": self.state} if self.state else {})

    def child(self) -> Context:
        """A new span of the same trace."""
        return replace(self, span_id=secrets.token_hex(8))


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Something that happened, for export."""

    name: str
    context: Context
    parent: Context | None = None
    parent_is_remote: bool = False
    kind: Kind = "internal"
    begun_unix: float
    ended_unix: float
    attributes: Mapping[str, Value]
    links: tuple[Context, ...] = ()
    failed: bool = False

    def within(self, begun_unix: float, ended_unix: float) -> Span:
        """The same inside other bounds: the system's clock may be set while a request is on its way."""
        begun = min(max(self.begun_unix, begun_unix), ended_unix)
        return replace(self, begun_unix=begun, ended_unix=min(max(self.ended_unix, begun), ended_unix))
