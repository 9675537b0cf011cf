"""CAD objects: the request to register one, its health and symmetries, and the progress of its onboarding."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from pem.contract.common import CadFormat, Triple, Unit, Wire

ObjectName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Matrix = Annotated[list[float], Meta(min_length=16, max_length=16)]  # 4x4, row-major


class ContinuousSymmetry(Wire, kw_only=True):
    """A rotation axis and a point on it (mm), as BOP writes them."""

    axis: Annotated[Triple, Meta(description="Its direction.")]
    offset: Annotated[Triple, Meta(description="A point on it, millimetres.")]


class ObjectRequest(Wire, kw_only=True):
    """What is known about a CAD file."""

    name: Annotated[
        ObjectName | None,
        Meta(description="Works wherever the id does. An object may have several, each given by one request."),
    ] = None
    replace: Annotated[
        bool,
        Meta(
            description="Take the name from the object that has it, in one step, once this one is ready; until then, "
            "and where onboarding fails, it stays there. Without it a taken name is refused."
        ),
    ] = False
    model_unit: Annotated[
        Unit | None,
        Meta(
            description="Unit of the file's numbers; m for GLB and mm for the others unless given. "
            "auto guesses and says so in the health report."
        ),
    ] = None
    cad_format: Annotated[CadFormat | None, Meta(description="By default the file name's ending.")] = None
    symmetries_discrete: Annotated[
        list[Matrix] | None,
        Meta(
            description="Rotations that leave the object as it is: each a 4x4 in row order, millimetres. "
            "Symmetries given override those found."
        ),
    ] = None
    symmetries_continuous: Annotated[
        list[ContinuousSymmetry] | None, Meta(description="Axes about which any turn leaves the object as it is.")
    ] = None


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What a CAD model looks like."""

    faces: Annotated[int, Meta(description="Triangles.")]
    watertight: Annotated[bool, Meta(description="Whether the surface is closed.")]
    extents_mm: Annotated[tuple[float, float, float], Meta(description="Size of the axis-aligned box.")]
    diameter_mm: Annotated[float, Meta(description="Largest distance between two points.")]
    warnings: Annotated[
        list[str], Meta(description="What may trouble pose estimation: suspicious scale, holes and the like.")
    ] = []


class WireSymmetries(msgspec.Struct, frozen=True, kw_only=True):
    """An object's symmetries as BOP writes them."""

    symmetries_discrete: Annotated[list[list[float]], Meta(description="Each a 4x4 in row order, millimetres.")] = []
    symmetries_continuous: Annotated[
        list[dict[str, list[float]]], Meta(description="Each `{axis, offset}`, millimetres.")
    ] = []


class ObjectModelAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one engine has made of an object."""

    status: Annotated[
        Literal["queued", "onboarding", "ready", "failed"], Meta(description="queued: others are onboarded before it.")
    ]
    progress: Annotated[float, Meta(description="0 to 1.")]
    seconds: Annotated[float | None, Meta(description="How long onboarding took.")] = None
    threads: Annotated[int | None, Meta(description="CPU threads that it took them on.")] = None
    bytes: Annotated[int | None, Meta(description="What it takes on the server's disk.")] = None
    error: Annotated[str | None, Meta(description="Why onboarding failed.")] = None


class ObjectAnswer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One CAD object."""

    object_id: Annotated[str, Meta(description="sha256 over the resolved unit and the files' names and bytes.")]
    name: Annotated[str | None, Meta(description="The latest of its names; works wherever the id does.")]
    names: Annotated[list[str], Meta(description="All that it answers to beside its id, the latest last.")] = (
        msgspec.field(default_factory=lambda: [])  # sent even if empty, unlike a plain []
    )
    pending_names: Annotated[
        list[str], Meta(description="Names that it takes from other objects once it is ready (`replace`).")
    ] = []
    status: Annotated[
        Literal["onboarding", "ready", "failed"], Meta(description="ready: poses can be asked for at once.")
    ]
    progress: Annotated[float, Meta(description="0 to 1.")]
    model_unit: Annotated[Literal["mm", "m"], Meta(description="Resolved; auto never stays.")]
    health: Annotated[Health, Meta(description="What the CAD looks like.")]
    symmetries: Annotated[WireSymmetries | None, Meta(description="Given or found; null while onboarding.")]
    created: Annotated[float | None, Meta(description="Unix seconds.")] = None
    onboard_seconds: Annotated[float | None, Meta(description="How long onboarding took, all engines together.")] = None
    engines: Annotated[
        dict[str, ObjectModelAnswer], Meta(description="By engine: a request only waits for the one that it asks for.")
    ] = {}
    error: Annotated[
        str | None,
        Meta(description="Why onboarding failed. With status ready another engine can be asked all the same."),
    ] = None


class ObjectList(msgspec.Struct, kw_only=True):
    """The registered objects."""

    objects: Annotated[list[ObjectAnswer], Meta(description="All that are registered.")]
