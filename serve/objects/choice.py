"""The CAD that a request names or brings, as its client wrote it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CadChoice:
    """The source of one object's CAD: exactly one of `cad_path`, `object_id` and `cad`."""

    field: str  # the client's name for the field
    cad_path: str | None = None
    object_id: str | None = None
    cad: bytes | None = None
    cad_format: str | None = None
