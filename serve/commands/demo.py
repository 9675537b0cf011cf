"""`pem demo`: from nothing to a pose, with the truth beside it.

The demo starts a real server as a separate process, on a free port of this machine, without weights or GPU. It
registers the objects of a rendered scene, asks for their poses as any client would, compares them with the truth, and
stops the server.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pem import imagefiles
from pem.client import Client, PemError, Pose, PoseResult
from pem.commands import common
from pem.commands.estimate import receipt
from pem.host.child import Child, ServerTrouble, ended_by_signals
from pem.rle import encode_rle
from posekit import registry
from posekit.synthetic.scenes import Scene, SceneInstance, demo_scene, pose_errors
from posekit.synthetic.shapes import mesh_to_ply

MAX_ERROR_DEG: Final = 2.0
MAX_ERROR_MM: Final = 2.0
_ONBOARDING_LIMIT_S: Final = 300.0
_ANSWER_LIMIT_S: Final = 180.0


class DemoFailed(Exception):
    """The demo could not finish; the message says where it stopped."""


@dataclass(kw_only=True)
class _Found:
    """One object of the scene: the pose in the answer, and its error; None if there is no pose."""

    name: str
    onboarding_s: float
    pose: Pose
    error_deg: float | None
    error_mm: float | None

    @property
    def right(self) -> bool:
        return (
            self.error_deg is not None
            and self.error_mm is not None
            and self.error_deg <= MAX_ERROR_DEG
            and self.error_mm <= MAX_ERROR_MM
        )

    def public(self) -> dict[str, Any]:
        return {
            "object": self.name,
            "status": self.pose.error.code if self.pose.error else self.pose.status,
            "confidence": self.pose.confidence,
            "rotation_error_deg": self.error_deg,
            "translation_error_mm": self.error_mm,
            "onboarding_seconds": self.onboarding_s,
            "right": self.right,
        }


@dataclass(kw_only=True)
class _Report:
    """What the demo reports at its end: seconds by step, objects, the answer."""

    seconds: dict[str, float] = field(default_factory=dict)
    found: list[_Found] = field(default_factory=list)
    result: PoseResult | None = None

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[what] = round(time.monotonic() - start, 3)


def run(out: Path, *, keep: bool, json: str | None) -> int:
    """Run the demo; write its picture and inputs to `out`. Returns 0 if the pose is right, else 1."""
    people = common.stderr() if json == "-" else common.stdout()
    report = _Report()
    failure: str | None = None
    try:
        with report.timed("total"), ended_by_signals():
            _demo(out, keep, people, report)
        main = report.found[0]
        if not main.right:
            failure = f"the pose of the {main.name} is not within {MAX_ERROR_MM:g} mm and {MAX_ERROR_DEG:g} degrees"
    except (DemoFailed, ServerTrouble, PemError, OSError) as error:
        failure = str(error)
    common.write_json(
        json,
        {
            "ok": failure is None,
            "error": failure,
            "objects": [item.public() for item in report.found],
            "seconds": report.seconds,
            "timing": report.result.timing if report.result else None,
            "overlay": str(out / "overlay.png"),
        },
    )
    if failure is not None:
        common.stderr().print(f"[bold red]the demo failed:[/] {escape(failure)}")
        return 1
    people.print(f"[bold green]right[/], after {report.seconds['total']:.1f} s in all")
    return 0


def _demo(out: Path, keep: bool, people: Console, report: _Report) -> None:
    out.mkdir(parents=True, exist_ok=True)
    data = Path(tempfile.mkdtemp(prefix="data-", dir=out))
    try:
        with report.timed("scene"), common.step("drawing the scene"):
            scene = demo_scene()
        _write_inputs(out, scene)
        with _server(data, report) as url, Client(url, "", timeout_s=_ANSWER_LIMIT_S) as client:
            onboarding_s = _register(client, scene, report)
            report.result = result = _ask(client, scene, report)
        report.found = [
            _compare(instance, pose, onboarding_s[instance.shape.name])
            for instance, pose in zip(scene.instances, result.poses, strict=True)
        ]
        if result.visualization is not None:
            (out / "overlay.png").write_bytes(result.visualization)
        _tell(people, out, report, result)
    finally:
        if keep:
            common.note(f"the demo's data stays in {data}")
        else:
            shutil.rmtree(data, ignore_errors=True)


@contextmanager
def _server(data: Path, report: _Report) -> Iterator[str]:
    """Run a server as a separate process during the block. Raises ServerTrouble if it starts or ends badly."""
    options = ["--engine", registry.needing_nothing(), "--device", "cpu", "--log-format", "console"]
    child = Child.start(data, options)
    try:
        with report.timed("start"), common.step(f"starting a server at {child.url}"):
            child.wait_ready()
        yield child.url
    finally:
        with common.step("stopping the server"):
            child.stop()
    child.check()


def _register(client: Client, scene: Scene, report: _Report) -> dict[str, float]:
    """Register every object of the scene; return object name -> seconds until it was ready."""
    shapes = {instance.shape.name: instance.shape for instance in scene.instances}
    seconds = {}
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with report.timed("onboarding"), Progress(*columns, console=common.stderr(), transient=True) as progress:
        task = progress.add_task("onboarding", total=len(shapes))
        for done, (name, shape) in enumerate(shapes.items()):
            start = time.monotonic()
            progress.update(task, description=f"onboarding the {name}")
            if not progress.console.is_terminal:
                common.note(f"onboarding the {name}, {done + 1} of {len(shapes)}")
            client.objects.add(
                mesh_to_ply(shape.mesh),
                cad_format="ply",
                name=name,
                wait_timeout_s=_ONBOARDING_LIMIT_S,
                on_progress=lambda phase, fraction, done=done: progress.update(
                    task, completed=done + (fraction if phase == "onboarding" else 0.0)
                ),
            )
            seconds[name] = round(time.monotonic() - start, 3)
    return seconds


def _ask(client: Client, scene: Scene, report: _Report) -> PoseResult:
    names = [instance.shape.name for instance in scene.instances]
    with report.timed("answer"), common.step(f"estimating {len(names)} poses"):
        result = client.estimate(
            scene.rgb,
            scene.depth_raw,
            scene.K,
            [instance.mask for instance in scene.instances],
            object_ids=names,
            objects={name: name for name in names},
            depth_scale=scene.depth_scale_mm,
            deadline_ms=int(_ANSWER_LIMIT_S * 1000),
            visualize=True,
        )
    if len(result.poses) != len(names):
        raise DemoFailed(f"{len(names)} detections were sent, {len(result.poses)} answers came")
    return result


def _compare(instance: SceneInstance, pose: Pose, onboarding_s: float) -> _Found:
    error_deg = error_mm = None
    if pose.ok:
        T_cam_obj = pose.T_cam_obj_mm
        T_cam_obj[:3, 3] /= 1000.0
        error_deg, error_mm = pose_errors(T_cam_obj, instance.T_cam_obj, instance.shape.symmetries)
    return _Found(
        name=instance.shape.name, onboarding_s=onboarding_s, pose=pose, error_deg=error_deg, error_mm=error_mm
    )


def _tell(people: Console, out: Path, report: _Report, result: PoseResult) -> None:
    rows = Table(header_style="bold")
    for column in ("object", "status", "confidence", "rotation error", "translation error", "onboarding"):
        rows.add_column(column, justify="left" if column in ("object", "status") else "right")
    for item in report.found:
        mark = "[green]right[/]" if item.right else "[yellow]off[/]" if item.pose.ok else "[red]rejected[/]"
        why = "" if item.pose.error is None else escape(f" ({item.pose.error.code}: {item.pose.error.detail})")
        rows.add_row(
            item.name,
            mark + why,
            f"{item.pose.confidence:.2f}",
            "-" if item.error_deg is None else f"{item.error_deg:.2f} deg",
            "-" if item.error_mm is None else f"{item.error_mm:.2f} mm",
            f"{item.onboarding_s:.1f} s",
        )
    people.print(rows)
    people.print(receipt(result))
    for text in result.warnings:
        people.print(f"[yellow]warning:[/] {escape(text)}")
    seconds = report.seconds
    people.print(
        f"server ready after {seconds['start']:.1f} s, {len(report.found)} objects onboarded in "
        f"{seconds['onboarding']:.1f} s, answered in {seconds['answer']:.2f} s"
    )
    name = report.found[0].name
    overlay = out / "overlay.png"
    people.print(f"overlay: [bold]{escape(str(overlay))}[/]" if overlay.exists() else "no overlay was drawn")
    pem = common.program()
    frame = f"--rgb {out}/rgb.png --depth {out}/depth.png --camera {out}/camera.json"
    every = [item.name for item in report.found]
    people.print(
        f"\nOne of them by hand, once `{pem} serve` runs:\n"
        f"  curl -s http://127.0.0.1:8003/api/v1/pose_estimation -F rgb=@{out}/rgb.png -F depth=@{out}/depth.png \\\n"
        f"    -F cad=@{out}/{name}.ply -F 'request=<{out}/request.json'\n"
        f"  {pem} estimate {frame} \\\n"
        f"    --cad {out}/{name}.ply --mask {out}/mask.png --out {out}/again.png\n"
        "\nAll of them, as in the overlay:\n"
        f"  for part in {' '.join(every)}; do {pem} objects add {out}/$part.ply --name $part; done\n"
        f"  {pem} estimate {frame} \\\n"
        f"    --detections {out}/detections.json {' '.join(f'--object {each}' for each in every)} \\\n"
        f"    --out {out}/again.png\n",
        markup=False,
        soft_wrap=True,
    )


def _write_inputs(out: Path, scene: Scene) -> None:
    """Write the whole scene as files: for a curl, for `pem estimate`, for `pem bench --request`, and to look at.

    `mask.png`, `request.json` and `request.msgpack` ask for the first object alone; `masks/`, a CAD model for each
    object and `detections.json` (as SAM-6D writes detections, the objects' names as categories) for all of them.
    """
    main = scene.instances[0]
    rgb_png = imagefiles.write_png(scene.rgb, compression=6)
    depth_png = imagefiles.write_png(scene.depth_raw, compression=6)
    camera = {"cam_K": scene.K.ravel().tolist(), "depth_scale": scene.depth_scale_mm}
    request = {"cam_params": camera, "cad_format": "ply", "detections": {"masks": [encode_rle(main.mask)]}}
    whole = {**request, "rgb_image": rgb_png, "depth_image": depth_png, "cad": mesh_to_ply(main.shape.mesh)}
    (out / "rgb.png").write_bytes(rgb_png)
    (out / "depth.png").write_bytes(depth_png)
    (out / "camera.json").write_bytes(msgspec.json.encode(camera) + b"\n")
    (out / "request.json").write_bytes(msgspec.json.encode(request) + b"\n")
    (out / "request.msgpack").write_bytes(msgspec.msgpack.encode(whole))
    (out / "masks").mkdir(exist_ok=True)
    for instance in scene.instances:
        mask_png = imagefiles.write_png(np.asarray(instance.mask, dtype=np.bool_))
        (out / "masks" / f"{instance.shape.name}.png").write_bytes(mask_png)
        (out / f"{instance.shape.name}.ply").write_bytes(mesh_to_ply(instance.shape.mesh))
    shutil.copyfile(out / "masks" / f"{main.shape.name}.png", out / "mask.png")
    detections = [
        {"category_id": instance.shape.name, "score": 1.0, "segmentation": encode_rle(instance.mask)}
        for instance in scene.instances
    ]
    (out / "detections.json").write_bytes(msgspec.json.encode(detections) + b"\n")
