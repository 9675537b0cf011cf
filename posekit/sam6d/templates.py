"""Template views of an object: rendered here, or read from a folder that another renderer wrote."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from posekit.engine import Bool, Float32, Float64, Mesh, Progress, UInt8
from posekit.errors import BadData, InvalidInput, PoseError
from posekit.io import images
from posekit.render import Caster, Rendered, pixel_rays

VIEWS = 42  # corners of an icosahedron, and the middles of its edges
SIDE_PX = 512
FOV_RAD = 0.691111
DISTANCE = 4.0  # distance of the camera from the CAD's origin, as a multiple of the CAD's largest coordinate
LIGHT = 2.5  # distance of the light, as a multiple of the camera's
AMBIENT = 0.05
GAMMA = 2.2
LEAST_PX = 4  # a view with fewer pixels shows nothing
MAX_MEGAPIXELS = 50.0
MARGIN = 0.1  # share of the CAD's longest side: how far outside its box a template's point may lie
COVERED = 0.5  # share of the CAD's longest side that the templates' points must span


class View(NamedTuple):
    """An object seen from one side."""

    rgb: UInt8  # (h, w, 3), red first
    mask: Bool  # (h, w), the object's pixels
    xyz_m: Float32  # (h, w, 3), place of each of these pixels in the CAD's frame; 0 elsewhere


# ------------------------------------------------------------------------------------------------------ rendering them


def render_views(mesh: Mesh, progress: Progress, count: int = VIEWS) -> Iterator[View]:
    """Render `count` of the 42 views, one at a time; `progress` is told of each once the caller asks for the next.

    As in the original's templates: 512 x 512 pixels, a field of view of 0.691 rad, and the principal point in the
    middle of the picture; cameras all around the CAD's origin, 2 away from an object that is scaled so that its largest
    coordinate is 0.5 (a CAD far from its origin is small in its views); one point light behind each camera, 2.5 times
    as far away; the CAD's own colours, or grey.

    Unlike the original, which used a path tracer: the surface is Lambertian under a little ambient light, so nothing
    shines, casts shadows or lights another surface, and no film curve flattens the contrast. There is one ray a pixel,
    so edges are not smoothed. The cameras' order, roll and turn about z are ours. Coordinates are float32: the
    original's float16 millimetres only round them, by up to 0.03 mm within 128 mm of the origin.

    The largest coordinate is the mesh's, not that of random samples of it: the same in every run, never too small. A
    view of fewer than 4 pixels (a sheet seen edge-on) is left out. Raises InvalidInput if all views are.
    """
    distance_m = DISTANCE * float(np.abs(mesh.vertices_m[mesh.faces]).max())
    caster = Caster([mesh])
    directions = camera_directions()
    shown = 0
    for done, index in enumerate(_chosen(VIEWS, count), start=1):
        view = _render(caster, looking_from(directions[index], distance_m))
        if view.mask.sum() >= LEAST_PX:
            shown += 1
            yield view
        progress(done / count)
    if not shown:
        raise InvalidInput(
            f"the CAD model fills fewer than {LEAST_PX} pixels in each of {count} views around its origin: it is too "
            "far from its origin, or has no surface"
        )


def camera_directions() -> Float64:
    """Return the directions from the object to its 42 cameras: (42, 3), unit.

    First the 12 corners of an icosahedron, then the middles of its 30 edges. A corner is on +z and one on -z.
    """
    fifth = np.arange(5) * 2 * np.pi / 5
    rings = [(np.cos(a), np.sin(a), 0.5) for a in fifth] + [(np.cos(a), np.sin(a), -0.5) for a in fifth + np.pi / 5]
    corners = np.array([(0, 0, np.sqrt(1.25)), *rings, (0, 0, -np.sqrt(1.25))]) / np.sqrt(1.25)
    edges = [a + b for a, b in itertools.combinations(corners, 2) if a @ b > 0]  # neighbours: 63 degrees apart
    middles = np.array(edges) / np.linalg.norm(edges, axis=1, keepdims=True)
    return np.concatenate((corners, middles))


def looking_from(direction: Float64, distance_m: float) -> Float64:
    """Return T_cam_obj (4, 4) of a camera that looks at the CAD's origin from `direction` (unit, object frame).

    The object's z axis points up in the picture; seen along that axis, its y axis does.
    """
    z = -direction
    up = np.array([0.0, 1.0, 0.0] if abs(direction[2]) > 1 - 1e-9 else [0.0, 0.0, 1.0])
    x = np.cross(z, up)
    x /= np.linalg.norm(x)
    T_cam_obj = np.eye(4)
    T_cam_obj[:3, :3] = x, np.cross(z, x), z
    T_cam_obj[2, 3] = distance_m
    return T_cam_obj


def camera_matrix() -> Float64:
    """Return K of the views. Pixel centres are whole numbers, so the middle of the picture lies between two of them."""
    focal_px = SIDE_PX / 2 / np.tan(FOV_RAD / 2)
    middle = (SIDE_PX - 1) / 2
    return np.array([[focal_px, 0, middle], [0, focal_px, middle], [0, 0, 1]])


def _render(caster: Caster, T_cam_obj: Float64) -> View:
    K = camera_matrix()
    seen = caster.render(T_cam_obj, K, SIDE_PX, SIDE_PX)
    mask = seen.instance >= 0
    points_cam = pixel_rays(K, SIDE_PX, SIDE_PX)[mask] * seen.depth_m[mask][:, None]
    rgb = np.zeros_like(seen.rgb)
    rgb[mask] = _lit(seen, mask, points_cam, T_cam_obj[2, 3])
    xyz_m = np.zeros((*mask.shape, 3), dtype=np.float32)
    xyz_m[mask] = (points_cam - T_cam_obj[:3, 3]) @ T_cam_obj[:3, :3]
    return View(rgb=rgb, mask=mask, xyz_m=xyz_m)


def _lit(seen: Rendered, mask: Bool, points_cam: Float64, distance_m: float) -> UInt8:
    """Return the colours (n, 3) of the mask's pixels under the light, which stands behind the camera."""
    to_light = np.array([0, 0, (1 - LIGHT) * distance_m]) - points_cam
    facing = np.einsum("nc,nc->n", to_light, seen.normals_cam[mask]) / np.linalg.norm(to_light, axis=1)
    shade = AMBIENT + (1 - AMBIENT) * np.clip(facing, 0, 1)
    # A picture's values are light to the power of 1 / gamma, so a factor of the light is raised to that power too.
    return np.asarray(np.rint(seen.rgb[mask] * (shade ** (1 / GAMMA))[:, None]), dtype=np.uint8)


def _chosen(total: int, count: int) -> list[int]:
    """Return the indices of `count` out of `total` views."""
    return [int(total / count * view) for view in range(count)]


# --------------------------------------------------------------------------------------------------- reading a folder


def read_folder(folder: Path, count: int = VIEWS, mesh: Mesh | None = None) -> Iterator[View]:
    """Read views that another renderer made: rgb_i.png, mask_i.png, xyz_i.npy, i from 0. Of more, `count` are taken.

    Colours may have any 8-bit mode (alpha is dropped, grey repeated). Masks are 255 on the object. xyz is the place of
    each pixel in the CAD's frame, (h, w, 3) floats in millimetres. `mesh`: the object they should show; a folder of
    another object, in another frame or in metres is refused.

    The whole folder is read and checked before the first view is returned, and then read again view by view: the
    network takes far longer, and all views at once would take memory. Raises BadData for files that do not parse and
    InvalidInput for files that are missing or do not fit, each with the file's name. A view of fewer than 4 pixels is
    left out; if all are, InvalidInput.
    """
    indices = _numbers(folder, count)
    boxes = []
    for index in indices:
        view = _read(folder, index)
        if view.mask.sum() >= LEAST_PX:
            points_m = view.xyz_m[view.mask]
            boxes.append((points_m.min(axis=0), points_m.max(axis=0)))
    if not boxes:
        raise InvalidInput(f"none of {count} masks marks {LEAST_PX} pixels of the object with 255")
    if mesh is not None:
        _check_same_object(boxes, mesh)
    views = (_read(folder, index) for index in indices)
    return (view for view in views if view.mask.sum() >= LEAST_PX)


def _numbers(folder: Path, count: int) -> list[int]:
    """Return the numbers of the views to take, after checking that all of their files exist."""
    found = [re.fullmatch(r"rgb_(0|[1-9]\d{0,5})\.png", path.name) for path in folder.glob("rgb_*.png")]
    total = max([count, *(int(name[1]) + 1 for name in found if name)])
    indices = _chosen(total, count)
    missing = [name for index in indices for name in _names(index) if not (folder / name).is_file()]
    if missing:
        raise InvalidInput(
            f"{missing[0]} is missing{f', with {len(missing) - 1} more' * (len(missing) > 1)}: a folder of templates "
            f"holds rgb_i.png (colours), mask_i.png (255 on the object) and xyz_i.npy (the object's coordinates in "
            f"millimetres, height x width x 3) for every i from 0 to {count - 1} or farther"
        )
    return indices


def _names(index: int) -> tuple[str, str, str]:
    return f"rgb_{index}.png", f"mask_{index}.png", f"xyz_{index}.npy"


def _read(folder: Path, index: int) -> View:
    rgb_name, mask_name, xyz_name = _names(index)
    rgb = _read_png(folder / rgb_name)
    mask = (_read_png(folder / mask_name) == 255).all(axis=-1)
    height, width = mask.shape
    if rgb.shape[:2] != mask.shape:
        raise InvalidInput(
            f"{mask_name} is {width} x {height} pixels, {rgb_name} {rgb.shape[1]} x {rgb.shape[0]}: a view has one size"
        )
    xyz = _read_npy(folder / xyz_name)
    if xyz.shape != (height, width, 3) or xyz.dtype.kind != "f":
        raise InvalidInput(
            f"{xyz_name} holds {xyz.dtype} of shape {xyz.shape}; floats of shape ({height}, {width}, 3) are needed"
        )
    xyz_m = np.zeros((height, width, 3), dtype=np.float32)
    with np.errstate(over="ignore"):  # checked below
        xyz_m[mask] = xyz[mask].astype(np.float32) / np.float32(1000)
    if not np.isfinite(xyz_m).all():
        raise InvalidInput(f"{xyz_name} holds values that are no number under {mask_name}")
    return View(rgb=rgb, mask=mask, xyz_m=xyz_m)


def _read_png(path: Path) -> UInt8:
    try:
        return images.decode_color(path.read_bytes(), MAX_MEGAPIXELS)
    except PoseError as error:
        raise type(error)(f"{path.name}: {error.detail}") from error
    except OSError as error:
        _unreadable(path, error)


def _read_npy(path: Path) -> npt.NDArray[Any]:
    """Map an array file: its header may claim any size. Objects, which could hold code, cannot be mapped."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        _unreadable(path, error)
    except Exception as error:  # a broken header gives a TypeError, an OverflowError, a RecursionError and more
        raise BadData(f"{path.name} is no array file of numpy, or is cut short") from error


def _unreadable(path: Path, error: OSError) -> NoReturn:
    raise InvalidInput(f"{path.name} cannot be read: {error.strerror}") from error


def _check_same_object(boxes: Sequence[tuple[Float32, Float32]], mesh: Mesh) -> None:
    """Raise InvalidInput unless the templates' points lie where the CAD has its surface, judged by boxes."""
    low, high = np.min([box[0] for box in boxes], axis=0), np.max([box[1] for box in boxes], axis=0)
    corners = mesh.vertices_m[mesh.faces]
    mesh_low, mesh_high = corners.min(axis=(0, 1)), corners.max(axis=(0, 1))
    size = float((mesh_high - mesh_low).max())
    span = float((high - low).max())
    if (low > mesh_low - MARGIN * size).all() and (high < mesh_high + MARGIN * size).all() and span > COVERED * size:
        return
    advice = "they are of another object, or of one with another origin"
    if 0.5 < 1000 * span / size < 2:
        advice = "they look like metres, where xyz_i.npy holds millimetres"
    raise InvalidInput(
        f"the templates' points lie between {_mm(low)} and {_mm(high)} mm, the CAD model between {_mm(mesh_low)} and "
        f"{_mm(mesh_high)} mm: {advice}"
    )


def _mm(point_m: Float32) -> str:
    return "(" + ", ".join(f"{1000 * x:.4g}" for x in point_m) + ")"
