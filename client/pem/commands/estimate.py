"""`pem estimate`: files in, a table, an overlay and JSON out."""

from __future__ import annotations

from json import JSONDecodeError, loads
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec
import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from pem.client import Client
from pem.commands import common
from pem.contract import CadFormat, Unit
from pem.options import ObjectOptions
from pem.poses import Float64, Pose, PoseResult, rotation_vector_deg


def estimate(
    rgb: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="The colour image: PNG or JPEG.")],
    depth: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Depth: 16-bit PNG or float TIFF.")],
    camera: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, help="JSON with cam_K and depth_scale, as SAM-6D or BOP have it."),
    ],
    cad: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="The CAD model: PLY, OBJ, STL, GLB, OFF or zip.")
    ] = None,
    objects: Annotated[
        list[str] | None,
        typer.Option(
            "--object",
            metavar="NAME",
            help="A registered object in place of --cad. Repeated where detections differ: NAME where that is their "
            "category, or CATEGORY=NAME.",
        ),
    ] = None,
    mask: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="A mask as PNG, not zero inside; repeatable.")
    ] = None,
    detections: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Detections as SAM-6D's detection_ism.json, in place of masks."),
    ] = None,
    depth_scale: Annotated[
        float | None, typer.Option(help="Raw depth x this = millimetres; wins over the camera file.")
    ] = None,
    depth_unit: Annotated[
        Literal["mm", "m"] | None, typer.Option(help="m: raw depth x depth scale is metres (RealSense, ROS).")
    ] = None,
    model_unit: Annotated[Unit | None, typer.Option(help="Unit of --cad.", show_default=common.MODEL_UNIT)] = None,
    cad_format: Annotated[
        CadFormat | None, typer.Option(help="What --cad is.", show_default="its name's ending")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="Which engine, of those that the server has.")] = None,
    refine: Annotated[Literal["auto", "icp", "none"] | None, typer.Option(help="How to refine.")] = None,
    min_score: Annotated[float | None, typer.Option(help="Reject poses of lower confidence.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the search.")] = None,
    deadline_ms: Annotated[int | None, typer.Option(help="Give up after so many milliseconds.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the overlay, a PNG, here.")] = None,
    json: common.Json = None,
    url: common.Url = common.URL_DEFAULT,
    api_key: common.ApiKey = None,
) -> None:
    """Estimate poses from files: where is the object in this picture?

    Exits 0 when the request was answered, also where some detections were rejected: the table says why.

    Examples:

      pem estimate --rgb rgb.png --depth depth.png --camera camera.json --cad mug.ply --mask mask.png --out overlay.png

      pem estimate --rgb rgb.png --depth depth.png --camera camera.json --object mug --mask 1.png --mask 2.png --json -

      pem estimate --rgb rgb.png --depth depth.png --camera camera.json --detections detection_ism.json --object 5=can
    """
    if (cad is None) == (not objects):
        common.fail("say which object it is: by --cad FILE or by --object NAME (one of them)", 2)
    if (detections is None) == (not mask):
        common.fail("say where the object is: by --mask FILE (repeatable) or by --detections FILE (one of them)", 2)
    common.check_folder(out, json)
    K, scale, unit = read_camera(camera)
    chosen: dict[str, Any] = {
        "depth_scale": depth_scale if depth_scale is not None else scale,
        "depth_unit": depth_unit if depth_unit is not None else unit,
        "engine": engine,
        "refine": refine,
        "min_score": min_score,
        "seed": seed,
        "deadline_ms": deadline_ms,
        "visualize": True if out is not None else None,
    }
    if detections is not None:
        chosen |= _objects_of_detections(objects or [])
        chosen["detections"] = _read_detections(detections)
    else:
        chosen |= _object_of_masks(objects or [], cad, len(mask or ()))
    masks = [common.read_file(path) for path in mask] if mask else None
    with common.connect(url, api_key) as client:
        if cad is not None:
            chosen["object_id"] = _register(client, cad, model_unit, cad_format)
        elif model_unit is not None:
            common.fail("--model-unit belongs to --cad: a registered object already has its unit", 2)
        elif cad_format is not None:
            common.fail("--cad-format belongs to --cad", 2)
        with common.spinner("estimating"):
            result = client.estimate(common.read_file(rgb), common.read_file(depth), K, masks, **chosen)
    for text in result.warnings:
        common.warn(text)
    if out is not None and result.visualization is not None:
        common.write_file(out, result.visualization)
        common.note(f"overlay: {out}")
    common.write_json(json, msgspec.structs.replace(result.answer, visualization=msgspec.UNSET))
    if json != "-":
        common.stdout().print(table(result))
        common.stdout().print(receipt(result))


def table(result: PoseResult) -> Table:
    """Return a table of one row per detection."""
    rows = Table(title=None, header_style="bold")
    for column in ("#", "object", "status", "confidence", "t (mm)", "rotation vector (deg)", "evidence"):
        rows.add_column(column, justify="right" if column in ("#", "confidence") else "left")
    for pose in result.poses:
        rows.add_row(*_cells(pose))
    return rows


def receipt(result: PoseResult) -> str:
    """Return one line about the time that each step took."""
    count = len(result.poses)
    words = [
        f"{count} detection{'s' if count != 1 else ''} in {result.inference_time_s * 1000:.0f} ms",
        f"engine {result.engine}",
    ]
    if result.timing is not None:
        timing = result.timing
        words.append(
            f"decode {timing.decode_ms:.0f} ms, queue {timing.queue_ms:.0f} ms, pose {timing.pose_ms:.0f} ms "
            f"(in a pass of {timing.batch_detections}, shared by {timing.batch_requests})"
        )
    return escape("; ".join(words) + (" - degraded: the geometric engine stood in" if result.degraded else ""))


def _cells(pose: Pose) -> list[str]:
    name = "-" if pose.object_id is None else escape(str(pose.object_id))
    if not pose.ok:
        code = pose.error.code if pose.error else "rejected"
        detail = pose.error.detail if pose.error else ""
        return [str(pose.index), name, f"[red]{escape(code)}[/]", f"{pose.confidence:.2f}", "-", "-", escape(detail)]
    evidence = ""
    if pose.evidence is not None:
        e = pose.evidence
        evidence = (
            f"{e.inlier_fraction:.0%} inliers, {e.residual_mm:.2f} mm residual, "
            f"{e.visible_overlap:.0%} of surface seen, {e.free_space_violation:.0%} seen through"
        )
    status = "[green]ok[/]" + (" (ambiguous)" if pose.ambiguous else "")
    t = " ".join(f"{value:.1f}" for value in pose.t_mm)
    turn = " ".join(f"{value:.1f}" for value in rotation_vector_deg(pose.R))
    return [str(pose.index), name, status, f"{pose.confidence:.2f}", t, turn, evidence]


def _register(client: Client, cad: Path, model_unit: Unit | None, cad_format: CadFormat | None) -> str:
    """Register the model and return its id, with a progress bar; quick if the server has the model already."""
    with common.phases(cad.name) as show:
        options = ObjectOptions(model_unit=model_unit, cad_format=cad_format, on_progress=show)
        return client.objects.add(cad, options).object_id


def _objects_of_detections(names: list[str]) -> dict[str, Any]:
    """Return the option for the object of all detections, or for one per category; {} with --cad."""
    if not names:
        return {}
    if len(names) == 1 and "=" not in names[0]:
        return {"object_id": names[0]}
    pairs = (name.partition("=") for name in names)
    return {"objects": {category: name or category for category, _, name in pairs}}


def _object_of_masks(names: list[str], cad: Path | None, count: int) -> dict[str, Any]:
    """Return the options for the one object of all masks. Their category is CATEGORY, the name or the stem of --cad."""
    if len(names) > 1:
        common.fail(
            "masks are all of one object; several are told apart by --detections and --object CATEGORY=NAME for each", 2
        )
    if not names:
        return {} if cad is None else {"object_ids": [cad.stem] * count}
    category, _, name = names[0].rpartition("=")
    return {"object_id": name, "object_ids": [category or name] * count}


def read_camera(path: Path) -> tuple[Float64, float | None, str | None]:
    """Read (K, depth_scale, depth_unit) from SAM-6D's or BOP's camera.json, or a scene_camera.json of one image."""
    try:
        content = loads(common.read_file(path))
    except JSONDecodeError as error:
        _no_camera(path, f"it is broken JSON, at line {error.lineno}, column {error.colno}: {error.msg}")
    except UnicodeDecodeError:
        _no_camera(path, "it is no text")
    if not isinstance(content, dict):
        _no_camera(path, "it holds no {...}")
    if content and all(isinstance(entry, dict) for entry in content.values()):
        if len(content) > 1:
            _no_camera(path, f"it holds {len(content)} cameras, and one image has one: keep only its entry")
        (content,) = content.values()
    if "cam_K" in content:
        numbers = content["cam_K"]
    else:
        missing = [name for name in ("fx", "fy", "cx", "cy") if name not in content]
        if len(missing) == 4:
            _no_camera(path, "it has no cam_K")
        if missing:
            _no_camera(path, f"it has no {' and no '.join(missing)} (nor a cam_K)")
        fx, fy, cx, cy = (content[name] for name in ("fx", "fy", "cx", "cy"))
        numbers = [fx, 0, cx, 0, fy, cy, 0, 0, 1]
    try:
        K = np.array(numbers, dtype=np.float64).reshape(3, 3)
    except (TypeError, ValueError):
        _no_camera(path, "its cam_K is not 9 numbers" if "cam_K" in content else "fx, fy, cx and cy must be numbers")
    return K, content.get("depth_scale"), content.get("depth_unit")


def _no_camera(path: Path, why: str) -> NoReturn:
    example = '{"cam_K": [fx, 0, cx, 0, fy, cy, 0, 0, 1], "depth_scale": 1.0}'
    common.fail(f"{path} is no camera file: {why}; one looks like {example}", 2)


def _read_detections(path: Path) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(common.read_file(path), type=list[dict[str, Any]])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        common.fail(f"{path} is no list of detections as SAM-6D writes it: {error}", 2)
