"""The options of each verb as one frozen dataclass, whose fields carry their own descriptions.

Every verb takes its options by keyword or as a struct in `options`; keywords win. None means "not given": the server's
default holds. `takes` puts the options into a verb's signature and docstring, for `help()` and notebooks.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import numpy.typing as npt

from pem.contract import CadFormat, Unit
from pem.rle import Rle

if TYPE_CHECKING:
    from pem.meshfiles import Mesh
    from pem.poses import Pose

T = TypeVar("T")
Function = TypeVar("Function", bound=Callable[..., Any])

Picture = npt.NDArray[Any] | bytes | str | Path  # an array, the bytes of an image file, or its path
Camera = npt.ArrayLike | Mapping[str, Any]  # K (3, 3), or a loaded camera.json
Mask = npt.NDArray[Any] | Rle | Mapping[str, Any] | bytes | str | Path | Sequence[Any]
Progress = Callable[[str, float], None]  # the phase ("upload", "onboarding") and its progress, 0..1
ALREADY_KNOWN: Final = "already known"  # the phase, reported once at 1.0, for an object that the server had already


def _option(words: str, default: Any = None) -> Any:
    """Make a field with the line that help() shows."""
    return field(default=default, metadata={"words": words})


def describe(kind: type[Any]) -> str:
    """Return the options of a struct, two lines each: name, type and default; description."""
    return "\n".join(
        f"    {each.name}: {each.type} = {each.default!r}\n        {each.metadata['words']}" for each in fields(kind)
    )


def _described(kind: type[T]) -> type[T]:
    kind.__doc__ = f"{kind.__doc__}\n\n{describe(kind)}\n"
    return kind


class Options:
    """Base of the structs of options."""

    def said(self) -> dict[str, Any]:
        """Return the options that differ from their defaults."""
        values = ((each, getattr(self, each.name)) for each in fields(self))  # type: ignore[arg-type]
        return {each.name: value for each, value in values if value is not each.default}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.said().items())})"


@_described
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PoseOptions(Options):
    """The options of `estimate` and `full_pipeline`.

    The CAD comes by exactly one of `object_id`, `cad_path`, `cad` and `objects`.
    """

    object_id: str | None = _option("hash or name of a registered object")
    cad_path: str | None = _option("a mesh under the server's CAD root")
    cad: bytes | str | Path | Mesh | None = _option("the mesh itself or its file, at most 10 MB; else objects.add")
    cad_format: CadFormat | None = _option("of `cad`; required with bytes, else taken from the file's name")
    objects: Mapping[int | str, str | Mapping[str, str]] | None = _option(
        'category -> object id or name, or {"cad_path": ...}, where detections are of different objects'
    )
    model_unit: Unit | None = _option('of `cad` and `cad_path`; "m" for GLB and "mm" for the others unless told')
    depth_scale: float | None = _option(
        'raw depth x this = millimetres (metres with depth_unit="m"); 1 unless told, float depth needs one of the two'
    )
    depth_unit: Literal["mm", "m"] | None = _option('what raw depth x depth_scale gives; "mm" unless told')
    engine: str | None = _option('one of those that the server has (Client.status().engines); "auto" unless told')
    refine: Literal["auto", "icp", "none"] | None = _option('how poses are polished; "auto" unless told')
    hypotheses: int | None = _option("runners-up to return with each pose, 0 to 16; 0 unless told")
    units: Literal["check", "strict"] | None = _option('how wrong units are looked for; "check" unless told')
    min_score: float | None = _option("reject poses of lower confidence, 0 to 1; 0 unless told")
    seed: int | None = _option("of the search; follows from the content unless told")
    deadline_ms: int | None = _option("milliseconds for the whole call, retries included; the client's unless told")
    visualize: bool | None = _option("draw the overlay into PoseResult.visualization; False unless told")
    output_dir: str | None = _option(
        "where the server writes results, relative to its output root; nowhere unless told"
    )


@_described
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class DetectionOptions(PoseOptions):
    """The options of `estimate`: PoseOptions, and more about the detections; lists have one entry per mask."""

    boxes: npt.ArrayLike | None = _option("(n, 4) pixels; around the masks unless told")
    box_format: Literal["xywh", "xyxy"] | None = _option('of `boxes`; "xywh" unless told')
    scores: npt.ArrayLike | None = _option("(n,), the detector's confidence; 1 unless told")
    object_ids: Sequence[int | str | None] | None = _option("each detection's category, a key of `objects`")
    init_poses: Sequence[npt.ArrayLike | Pose | Mapping[str, npt.ArrayLike] | None] | None = _option(
        "refined, not searched (None = search): T_cam_obj_mm (4, 4), a Pose, or a dict of rotation and translation (mm)"
    )
    detections: Sequence[Mapping[str, Any]] | None = _option("SAM-6D's list, in place of masks")


@_described
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ObjectOptions(Options):
    """The options of `objects.add`. Symmetries are in BOP's notation, in millimetres."""

    name: str | None = _option("to ask for it by; works wherever the id does")
    replace: bool = _option("take the name from the object that has it, once this one is ready", False)
    model_unit: Unit | None = _option('of the CAD; "m" for GLB and "mm" for the others unless told')
    cad_format: CadFormat | None = _option("required with bytes, else taken from the file's name")
    symmetries_discrete: Sequence[npt.ArrayLike] | None = _option("(4, 4) each; found by the server unless told")
    symmetries_continuous: Sequence[Mapping[str, npt.ArrayLike]] | None = _option(
        '{"axis": (3,), "offset": (3,)} each; found by the server unless told'
    )
    wait: bool = _option("until the object is ready", True)
    wait_timeout_s: float = _option("seconds to wait at most", 600.0)
    on_progress: Progress | None = _option('told of "upload" and "onboarding", 0 to 1, and once of "already known"')


@_described
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ClientOptions(Options):
    """The options of a client."""

    timeout_s: float = _option("seconds to wait for one answer", 60.0)
    retries: int = _option("of what was refused with Retry-After, or whose connection broke", 3)
    retry_budget_s: float = _option("seconds of sleep between retries, altogether", 30.0)
    deadline_s: float | None = _option(
        "seconds for a pose request, retries included; the server starts nothing that would come too late"
    )
    use_json: bool = _option("JSON in place of MessagePack", False)


def merged(verb: str, kind: type[Any], options: Any, more: Mapping[str, Any], *named: str) -> dict[str, Any]:
    """Return the options of a call as a dict: the struct's that differ from its defaults, then the keywords, which win.

    Raises TypeError for an `options` that is not a struct, and for an unknown option as `check_options` does.
    """
    if options is None:
        said: dict[str, Any] = {}
    elif isinstance(options, Options):
        said = options.said()
    else:
        raise TypeError(
            f"{verb}() takes options as pem.{kind.__name__}, not as {type(options).__name__}; "
            "give single ones by keyword, a dict as **options"
        )
    both = {**said, **more}
    check_options(verb, both, kind, *named)
    return both


def check_options(verb: str, given: Mapping[str, Any], kind: type[Any], *named: str) -> None:
    """Raise TypeError for an option that `kind` lacks; name the closest of its fields and of `named`."""
    known = [*named, *(each.name for each in fields(kind))]
    for option in given:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
            raise TypeError(f"{verb}() has no option {option!r}; {hint}")


def takes(kind: type[Any]) -> Callable[[Function], Function]:
    """Decorate a verb: show the options of `kind` in its signature and docstring, in place of `**more`."""

    def shown(verb: Function) -> Function:
        signature = inspect.signature(verb)
        plain = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        options = [
            inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=each.type)
            for each in fields(kind)
        ]
        setattr(verb, "__signature__", signature.replace(parameters=[*plain, *options]))  # noqa: B010
        verb.__doc__ = (
            f"{inspect.cleandoc(verb.__doc__ or '')}\n\n"
            f"Options, by keyword or as {kind.__name__} in `options`; keywords win:\n\n{describe(kind)}\n"
        )
        return verb

    return shown
