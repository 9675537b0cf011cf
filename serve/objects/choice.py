"""Which CAD a request means, as its client wrote it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CadChoice:
    """Where one object's CAD comes from: exactly one of the three."""

    field: str  # as the client calls it
    cad_path: str | None = None
    object_id: str | None = None
    cad: bytes | None = None
    cad_format: str | None = None
