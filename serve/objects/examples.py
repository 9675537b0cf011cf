"""Examples of registering a CAD object, and of the answers about objects."""

from __future__ import annotations

from typing import Any, Final

_ID: Final = "9f2c" * 16
_OBJECT: Final[dict[str, Any]] = {
    "object_id": _ID,
    "name": "mug",
    "names": ["cup", "mug"],
    "status": "ready",
    "progress": 1.0,
    "model_unit": "mm",
    "health": {
        "faces": 5104,
        "watertight": True,
        "extents_mm": [80.0, 80.0, 95.0],
        "diameter_mm": 131.2,
        "warnings": [],
    },
    "symmetries": {"symmetries_discrete": [], "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]},
    "created": 1750000000.0,
    "onboard_seconds": 2.3,
    "engines": {"geometric": {"status": "ready", "progress": 1.0, "seconds": 2.3, "threads": 1, "bytes": 2404549}},
}

#: schema -> name -> an example that its struct accepts
EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "ObjectRequest": {
        "named": {"name": "mug"},
        "in metres": {"name": "mug", "model_unit": "m"},
        "replacing": {"name": "mug", "replace": True},
    },
    "ObjectAnswer": {"ready": _OBJECT},
    "ObjectList": {"default": {"objects": [_OBJECT]}},
}
