"""Building blocks of the questions in `questions.py`: rendered scenes, hand-made meshes and pictures, short forms.

Every scene comes with its masks and poses, so that most questions have an answer with a pose.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import cv2
import msgspec
import numpy as np

Tree = dict[str, Any]
Form = Literal["json", "msgpack", "multipart"]

POSE, FULL, SEG, OBJECTS = (
    "/api/v1/pose_estimation",
    "/api/v1/full_pipeline",
    "/api/v1/pose-estimation",
    "/api/v1/objects",
)
JSON, MSGPACK = "application/json", "application/msgpack"
WIDTH, HEIGHT = 320, 240
NAMES: Final = ("wedge", "stepped", "housing", "bottle")
BODY_IDLE_S: Final = 2.0  # a limit of the server with tight limits
DETECTIONS: Final = 20  # a limit of the server with tight limits
IN_FLIGHT: Final = 4  # a limit of the server with tight limits
_BOUNDARY: Final = "a-boundary-that-no-part-holds"

#: Settings of the server of `questions`; {ism} is the address of the ISM server.
QUESTIONS_SETTINGS: Final = {
    "ISM_URL": "{ism}",
    "ISM_TIMEOUT_S": "3",
    "METRICS_OBJECTS": "wedge,bottle",
    "CORS_ORIGINS": "https://lab.example",
}
#: Settings of the server of `limits`.
LIMITS_SETTINGS: Final = {
    "LIMITS_BODY_MB": "2",
    "LIMITS_OBJECT_BODY_MB": "2",
    "LIMITS_INLINE_CAD_MB": "1",
    "LIMITS_IMAGE_MEGAPIXELS": "0.5",
    "LIMITS_MASK_MEGAPIXELS": "1.6",
    "LIMITS_DETECTIONS": str(DETECTIONS),
    "LIMITS_BODY_IDLE_S": f"{BODY_IDLE_S:g}",
    "LIMITS_IN_FLIGHT_REQUESTS": str(IN_FLIGHT),
    "LIMITS_IN_FLIGHT_MB": "5",
    "QUEUE_DEADLINE_MAX_MS": "100000",
    "POSE_PASS_DETECTIONS": "2",
    "METRICS_OPEN": "false",
}


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One request. In the texts of `tree`, `path` and `headers`, @NAME@ stands for a value of the side asked."""

    group: str
    name: str
    method: str = "GET"
    path: str = "/"
    headers: Mapping[str, str] = field(default_factory=dict)
    tree: Any = None  # encoded as `form` when it is asked
    form: Form = "json"
    body: bytes | None = None  # sent instead of a tree
    gzipped: bool = False
    chunk: int = 0  # bytes per piece of a chunked body; 0: not chunked
    raw: bytes | None = None  # sent instead of everything above, unchanged, on a connection of its own
    held: bytes | None = None  # heads of requests that stay unfinished meanwhile, at most IN_FLIGHT of them
    held_count: int = 0
    until: int = 0  # a status that may take several attempts, since it depends on what is held
    times: int = 1  # number of repeats; every answer is compared
    ism: str = "good"  # behaviour of the ISM server
    asks_ism: bool = False  # compare what the ISM server was asked
    files: str = ""  # a folder in the output root to compare afterwards
    remember: str = ""  # keep the answer's object_id under this name
    before: Callable[[Path], None] | None = None  # called on the data directory first
    open_keys: frozenset[str] = frozenset()  # keys whose values depend on the moment


@dataclass(frozen=True, kw_only=True)
class Command:
    """One call of the command line beside the running server, with `--data-dir` added."""

    group: str
    name: str
    arguments: tuple[str, ...]
    remember: str = ""  # keep the output's `key` under this name


Step = Ask | Command


# ----------------------------------------------------------------------------------------------------------- the scene


def project() -> tuple[Any, Any, Callable[[Any], Any]]:
    """Return (scenes, shapes, encode_rle) of the project that this script belongs to, wherever its modules are."""
    try:
        scenes, shapes = (importlib.import_module(f"posekit.synthetic.{name}") for name in ("scenes", "shapes"))
    except ImportError:
        scenes, shapes = (importlib.import_module(f"posekit.{name}") for name in ("scenes", "shapes"))
    try:
        rle = importlib.import_module("pem.rle")
    except ImportError:
        rle = importlib.import_module("posekit.rle")
    return scenes, shapes, rle.encode_rle


def png(picture: Any) -> bytes:
    """Encode a picture as PNG: grey, RGB or RGBA, 8 or 16 bits."""
    array = np.asarray(picture)
    array = array.astype(np.uint8) * 255 if array.dtype == np.bool_ else array
    if array.ndim == 3:
        array = np.ascontiguousarray(array[..., [2, 1, 0, 3][: array.shape[2]]])
    return written(".png", array)


def written(suffix: str, array: Any, *options: int) -> bytes:
    """Encode a picture with OpenCV."""
    done, data = cv2.imencode(suffix, array, list(options))
    if not done:
        raise ValueError(f"OpenCV cannot write {suffix}")
    return data.tobytes()


class Material:
    """A scene as the fields of a request."""

    def __init__(self, scene: Any) -> None:
        encode = project()[2]
        self.scene = scene
        self.rgb, self.depth = png(scene.rgb), png(scene.depth_raw)
        self.K = [float(x) for x in scene.K.ravel()]
        self.cam_params: Tree = {"cam_K": self.K, "depth_scale": scene.depth_scale_mm}
        self.names = [str(one.shape.name) for one in scene.instances]
        self.masks: list[Tree] = [dict(encode(one.mask)) for one in scene.instances]
        self.truths: list[Tree] = [
            {"rotation": one.T_cam_obj[:3, :3].tolist(), "translation": (one.T_cam_obj[:3, 3] * 1000).tolist()}
            for one in scene.instances
        ]

    def every(self, **changes: Any) -> Tree:
        """Return a request for all instances, to be searched for."""
        found = {"masks": self.masks, "object_ids": self.names}
        return self._with(found, {name: {"object_id": name} for name in sorted(set(self.names))}, changes)

    def one(self, name: str = "wedge", /, **changes: Any) -> Tree:
        """Return a request for one instance, with its pose given as a start; `...` removes a field."""
        index = self.names.index(name)
        found = {"masks": [self.masks[index]], "object_ids": [name]}
        changes = {"init_poses": [self.truths[index]], **changes}
        return self._with(found, {name: {"object_id": name}}, changes)

    def mask(self, name: str = "wedge") -> Any:
        """Return an instance's mask, (H, W)."""
        return self.scene.instances[self.names.index(name)].mask

    def rle(self, name: str = "wedge") -> Tree:
        """Return an instance's mask as compressed RLE."""
        return self.masks[self.names.index(name)]

    def truth(self, name: str = "wedge") -> Tree:
        """Return an instance's true pose, millimetres."""
        return self.truths[self.names.index(name)]

    def _with(self, detections: Tree, objects: Tree, changes: Tree) -> Tree:
        tree: Tree = {"rgb_image": self.rgb, "depth_image": self.depth, "cam_params": self.cam_params}
        tree |= {"detections": detections, "objects": objects} | changes
        return {key: value for key, value in tree.items() if value is not ...}


@functools.cache
def small() -> Material:
    """Return four parts in a small picture without noise."""
    scenes, shapes, _ = project()
    made = [shapes.SHAPES[name]() for name in NAMES]
    size = {"width": WIDTH, "height": HEIGHT}
    return Material(scenes.make_scene(5, made, 4, noise=False, occlusion=False, depth_scale_mm=0.1, **size))


@functools.cache
def demo() -> Material:
    """Return seven parts in a picture of 640 x 480, with a sensor's noise."""
    return Material(project()[0].demo_scene())


@functools.cache
def ply(name: str = "wedge", unit: str = "mm") -> bytes:
    """Return a part's CAD file."""
    shapes = project()[1]
    data: bytes = shapes.mesh_to_ply(shapes.SHAPES[name]().mesh, unit)
    return data


# -------------------------------------------------------------------------------------------------- files made by hand

FACES: Final = ((0, 2, 1), (0, 1, 3), (1, 2, 3), (0, 3, 2))


def tetrahedron(size_mm: float = 60.0) -> list[list[Any]]:
    """Return the corners of a small lopsided mesh; its faces are FACES."""
    corners: list[list[Any]] = (np.array([[0.0, 0, 0], [1, 0, 0], [0, 0.8, 0], [0.1, 0.2, 0.6]]) * size_mm).tolist()
    return corners


def ascii_ply(vertices: Any, faces: Any = FACES) -> bytes:
    """Write a PLY with any numbers."""
    lines = ["ply", "format ascii 1.0", f"element vertex {len(vertices)}"]
    lines += [f"property float {axis}" for axis in "xyz"]
    lines += [f"element face {len(faces)}", "property list uchar int vertex_indices", "end_header"]
    lines += [" ".join(str(x) for x in vertex) for vertex in vertices]
    lines += [" ".join(str(x) for x in (len(face), *face)) for face in faces]
    return ("\n".join(lines) + "\n").encode()


def stl(vertices: Any) -> bytes:
    """Write a binary STL."""
    corners = np.asarray(vertices, dtype="<f4")[np.array(FACES)]
    facets = [b"\0" * 12 + triangle.tobytes() + b"\0\0" for triangle in corners]
    return b"\0" * 80 + struct.pack("<I", len(facets)) + b"".join(facets)


def off(vertices: Any) -> bytes:
    """Write an OFF."""
    lines = ["OFF", f"{len(vertices)} {len(FACES)} 0", *(" ".join(map(str, v)) for v in vertices)]
    return ("\n".join([*lines, *("3 " + " ".join(map(str, face)) for face in FACES)]) + "\n").encode()


def obj(vertices: Any, material: str | None = None) -> bytes:
    """Write an OBJ, with texture coordinates."""
    lines = [] if material is None else [f"mtllib {material}", "usemtl paint"]
    lines += [f"v {x} {y} {z}" for x, y, z in vertices] + ["vt 0 0", "vt 1 0", "vt 0 1", "vt 1 1"]
    return ("\n".join([*lines, *("f " + " ".join(f"{i + 1}/{i + 1}" for i in f) for f in FACES)]) + "\n").encode()


def glb(vertices: Any) -> bytes:
    """Write a GLB with one mesh and nothing else."""
    points = np.asarray(vertices, dtype="<f4")
    faces = np.array(FACES, dtype="<u4")
    data = points.tobytes() + faces.tobytes()
    views = [{"buffer": 0, "byteOffset": 0, "byteLength": points.nbytes}]
    views.append({"buffer": 0, "byteOffset": points.nbytes, "byteLength": faces.nbytes})
    accessors: list[Tree] = [
        {"bufferView": 0, "componentType": 5126, "count": len(points), "type": "VEC3"},
        {"bufferView": 1, "componentType": 5125, "count": faces.size, "type": "SCALAR"},
    ]
    accessors[0] |= {"min": points.min(axis=0).tolist(), "max": points.max(axis=0).tolist()}
    document = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}, "indices": 1}]}],
        "buffers": [{"byteLength": len(data)}],
        "bufferViews": views,
        "accessors": accessors,
    }
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text + struct.pack("<II", len(data), 0x004E4942) + data
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def zipped(files: Mapping[str, bytes], folder: str = "") -> bytes:
    """Write a zip of these files, with the same bytes every time."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(folder + name), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def png_by_hand(width: int, height: int, pixels: bytes, *, bits: int = 8, kind: int = 2) -> bytes:
    """Write a PNG whose header may claim anything."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(pixels, 1)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def multipart(parts: Mapping[str, tuple[str | None, bytes]]) -> tuple[str, bytes]:
    """Return (content type, body) of a form: part -> (file name or None, content)."""
    body = b""
    for name, (file_name, content) in parts.items():
        named = f'; filename="{file_name}"' if file_name is not None else ""
        body += f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'.encode()
        body += content + b"\r\n"
    return f"multipart/form-data; boundary={_BOUNDARY}", body + f"--{_BOUNDARY}--\r\n".encode()


def encoded(tree: Any, form: Form) -> tuple[str, bytes]:
    """Return (content type, body) of a request tree."""
    if form == "json":
        return JSON, msgspec.json.encode(tree)
    if form == "msgpack":
        return MSGPACK, msgspec.msgpack.encode(tree)
    files = {"rgb_image": ("rgb", "rgb.png"), "depth_image": ("depth", "depth.png"), "cad": ("cad", "part.ply")}
    parts: dict[str, tuple[str | None, bytes]] = {
        part: (file_name, tree[key]) for key, (part, file_name) in files.items() if key in tree
    }
    rest = {key: value for key, value in tree.items() if key not in files}
    return multipart({**parts, "request": (None, msgspec.json.encode(rest))})


# ------------------------------------------------------------------------------------------------------ short forms


def pose(group: str, name: str, tree: Any, **more: Any) -> Ask:
    """Make a pose request, in JSON by default."""
    return Ask(group=group, name=name, **{"method": "POST", "path": POSE, "tree": tree, **more})


def columns(*masks: Any, **more: Any) -> Tree:
    """Make detections of the wedge with these masks."""
    return {"masks": list(masks), "object_ids": ["wedge"] * len(masks), **more}


def upload(group: str, name: str, data: bytes | None, file_name: str = "part.ply", /, **request: Any) -> Ask:
    """Make an upload that waits until the object is ready. `ask` in `request`: fields of the Ask."""
    more: Tree = request.pop("ask", {})
    parts: dict[str, tuple[str | None, bytes]] = {} if data is None else {"file": (file_name, data)}
    if request:
        parts["request"] = (None, msgspec.json.encode(request))
    media, body = multipart(parts)
    headers = {"Content-Type": media, **more.pop("headers", {})}
    path = more.pop("path", f"{OBJECTS}?wait=120")
    return Ask(group=group, name=name, method="POST", path=path, headers=headers, body=body, **more)


def send(group: str, name: str, body: bytes, media: str = JSON, **more: Any) -> Ask:
    """Send a body unchanged."""
    headers = {"Content-Type": media} if media else {}
    headers |= more.pop("headers", {})
    return Ask(group=group, name=name, **{"method": "POST", "path": POSE, "headers": headers, "body": body, **more})


def get(group: str, path: str, **more: Any) -> Ask:
    """Make a GET request, or another `method`."""
    name = more.pop("name", f"{more.get('method', 'GET')} {path[:60]}")
    return Ask(group=group, name=name, path=path, **more)


def seg(*items: Tree, **changes: Any) -> Tree:
    """Make a request in the second dialect, for the wedge."""
    changes = {"seg_data": list(items), "object_id": "wedge", **changes}
    return small().one(**{"detections": ..., "init_poses": ..., "objects": ..., **changes})


def pipeline(**changes: Any) -> Tree:
    """Make a request of the full pipeline, for the wedge."""
    changes = {"object_id": "wedge", "refine": "none", "template_dir": "/ism/templates", **changes}
    return small().one(**{"detections": ..., "init_poses": ..., "objects": ..., **changes})


def ism_detections() -> Tree:
    """Return the ISM server's detections in the small scene: RLE masks, boxes as xyxy."""
    masks = [one.mask for one in small().scene.instances]
    spans = [[np.flatnonzero(mask.any(axis=axis)) for axis in (0, 1)] for mask in masks]
    count = len(spans)
    return {
        "masks": small().masks,
        "boxes": [[float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)] for x, y in spans],
        "scores": [round(0.9 - 0.01 * index, 3) for index in range(count)],
        "object_ids": [1] * count,
    }


def ism_answer(mode: str, attempt: int) -> tuple[int, bytes]:
    """Return (status, body) of the ISM server for a question's `attempt`-th request; status 0 hangs up, -1 hangs."""
    found = ism_detections()
    failing: dict[str, tuple[int, bytes]] = {
        "500": (500, b'{"detail": "CUDA out of memory at /opt/ism/model.py"}'),
        "422": (422, b'{"detail": "template_dir does not exist"}'),
        "drop": (0, b""),
        "hang": (-1, b""),
        "garbage": (200, b"<html>502 Bad Gateway</html>"),
        "wrong types": (200, b'{"success": true, "detections": {"masks": [], "scores": ["high"]}}'),
        "error in 200": (200, b'{"success": true, "detections": {"masks": [], "error": "no templates in /srv/t"}}'),
        "unsuccessful": (200, b'{"success": false, "detections": null, "error_message": "model not loaded"}'),
        "no masks": (200, b'{"success": true, "detections": {}}'),
        "no detections": (200, b'{"success": true, "detections": {"masks": [], "boxes": [], "scores": []}}'),
    }
    if mode in failing:
        return failing[mode]
    if mode.endswith(" once") and attempt == 1:
        return failing[mode.removesuffix(" once")]
    if mode == "nested":
        found["masks"] = [one.mask.astype(int).tolist() for one in small().scene.instances]
    if mode == "only masks":
        found = {"masks": found["masks"]}
    if mode == "unequal":
        found["scores"].append(0.5)
    if mode == "a box that is none":
        found["boxes"][0] = [0, 0, -1, -1]
    if mode == "a wrong mask":
        found["masks"] = [*found["masks"][:-1], {"size": [1, 1], "counts": "1"}]
    return 200, msgspec.json.encode(
        {"success": True, "detections": found, "inference_time": 0.5, "error_message": None}
    )
