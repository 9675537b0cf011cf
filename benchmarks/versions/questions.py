"""The questions for two versions of the server: every form of a request, and every failure that is cheap to cause.

There are three lists. `questions` is for a server with an instance-segmentation (ISM) server behind it. `limits` is for
one with tight limits, without ISM server, and at last with keys. `stored` is for one that starts on a data directory
that an earlier version left.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from benchmarks.versions.diff import SENT_TRACE
from benchmarks.versions.failures import failures
from benchmarks.versions.material import (
    DETECTIONS,
    FACES,
    FULL,
    HEIGHT,
    IN_FLIGHT,
    JSON,
    MSGPACK,
    NAMES,
    OBJECTS,
    POSE,
    SEG,
    WIDTH,
    Ask,
    Command,
    Step,
    Tree,
    ascii_ply,
    columns,
    demo,
    get,
    glb,
    multipart,
    obj,
    off,
    pipeline,
    ply,
    png,
    pose,
    project,
    seg,
    send,
    small,
    stl,
    tetrahedron,
    upload,
    written,
    zipped,
)


def questions() -> list[Step]:
    """Return all steps for a server with generous limits and an ISM server."""
    groups = (
        *(_routes(), _objects(), _forms(), _cad(), _masks(), _pictures(), _options(), _searches(), _outputs()),
        *(_dialect(), _pipeline(), failures(), _headers(), _late()),
    )
    return [step for group in groups for step in group]


def _routes() -> Iterator[Step]:
    group = "routes"
    paths = (
        *("/", "/livez", "/readyz", "/docs", "/openapi.json", "/api/v1/status", "/api/v1/version", "/api/v1/health"),
        *("/v2/health/live", "/v2/health/ready", "/v2/models/pem", "/v2/models/pem/ready", "/metrics", OBJECTS),
    )
    for path in paths:
        yield get(group, path)
    for path in paths:
        yield get(group, path, method="HEAD")
    yield get(group, "/", headers={"Accept": "text/html"}, name="GET / as a browser")
    for path in ("/api/v1/status", "/api/v1/version", "/v2/models/pem", OBJECTS):
        yield get(group, path, headers={"Accept": MSGPACK}, name=f"GET {path} in MessagePack")
    group = "404 and 405"
    for path in ("/api/v1/nothing", "/api", "/inference", "/v2/models/other", "/livez/", "/static/docs.js", "//livez"):
        yield get(group, path)
    for method, path in (
        *(("GET", POSE), ("GET", SEG), ("GET", FULL), ("PUT", OBJECTS), ("POST", "/livez"), ("DELETE", OBJECTS)),
        *(("PATCH", f"{OBJECTS}/wedge"), ("DELETE", "/api/v1/status"), ("POST", "/metrics"), ("OPTIONS", "/readyz")),
    ):
        yield get(group, path, method=method)


def _objects() -> Iterator[Step]:
    group = "objects"
    for name in NAMES:
        remember = {"remember": f"ID:{name}"}
        yield upload(group, f"add {name}", ply(name), f"{name}.ply", name=name, ask=remember)
    yield upload(group, "add the wedge again", ply(), "Other (final) v2.PLY")
    for name in ("wedge", "@ID:wedge@", "nobody", "f" * 64, "..%2f..%2fetc", "x" * 3000, ""):
        yield get(group, f"{OBJECTS}/{name}")
    yield get(group, f"{OBJECTS}/wedge", method="HEAD")
    yield get(group, f"{OBJECTS}/wedge", headers={"Accept": MSGPACK}, name="one object in MessagePack")
    corners = tetrahedron(70)
    texture = png(np.full((4, 4, 3), (200, 40, 40), np.uint8))
    material = b"newmtl paint\nKd 1 1 1\nmap_Kd skin.png\n"
    textured = {"part.obj": obj(corners, "part.mtl"), "part.mtl": material, "skin.png": texture}
    for file_name, data in (
        *(("part.ply", ascii_ply(corners)), ("part.stl", stl(corners)), ("part.off", off(corners))),
        *(("part.obj", obj(corners)), ("part.glb", glb(corners)), ("part.zip", zipped(textured))),
        *(("repacked.ZIP", zipped(dict(reversed(textured.items())), "folder/")),),
        ("bare.zip", zipped({"part.obj": textured["part.obj"]})),
    ):
        yield upload(group, f"add {file_name}", data, file_name, ask={"remember": f"ID:{file_name}"})
    for file_name in ("part.stl", "part.off", "part.obj", "bare.zip"):
        yield get(group, f"{OBJECTS}/@ID:{file_name}@", method="DELETE", name=f"remove {file_name}")
    yield get(group, f"{OBJECTS}/@ID:part.stl@", method="DELETE", name="remove part.stl again")
    mesh = ascii_ply(tetrahedron(73))
    yield upload(group, "a name that another has", mesh, name="wedge")
    yield upload(group, "a new object with a name", mesh, name="first")
    yield upload(group, "a second name", mesh, name="second")
    yield get(group, f"{OBJECTS}/first", name="by its first name")
    yield upload(group, "an old name is still taken", ascii_ply(tetrahedron(75)), name="first")
    yield get(group, f"{OBJECTS}/second", method="DELETE", name="remove by a name")
    yield get(group, f"{OBJECTS}/first", name="and what became of the other name")
    yield upload(group, "replace", mesh, name="wedge", replace=True)
    for name in ("", "a b", "../x", ".hidden", "x" * 129, "f" * 64):
        yield upload(group, f"the name {name[:10]!r}", ply(), name=name)
    half_turn = [-1.0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0]
    axis = {"axis": [0, 0, 2.0], "offset": [1.0, 2.0, 0]}
    mesh = ascii_ply(tetrahedron(79))
    yield upload(group, "found symmetries", mesh)
    yield upload(group, "declared discrete symmetries", mesh, symmetries_discrete=[half_turn])
    declared: Tree = {"symmetries_discrete": [], "symmetries_continuous": [axis]}
    yield upload(group, "declared continuous symmetries", mesh, name="turning", **declared)
    for name, request in (
        ("a matrix of 12", {"symmetries_discrete": [half_turn[:12]]}),
        ("a matrix that is no rotation", {"symmetries_discrete": [[2.0, *half_turn[1:]]]}),
        ("an axis of nothing", {"symmetries_continuous": [{"axis": [0, 0, 0], "offset": [0, 0, 0]}]}),
        ("an axis without offset", {"symmetries_continuous": [{"axis": [0, 0, 1]}]}),
        ("a typo", {"symetries": []}),
        ("a unit of one's own", {"model_unit": "cm"}),
        ("a format of one's own", {"cad_format": "step"}),
        ("a name that is a number", {"name": 5}),
    ):
        yield upload(group, name, ply(), **request)
    yield upload(group, "in metres, told", ply("stepped", "m"), model_unit="m")
    yield upload(group, "in metres, guessed", ply("stepped", "m"), model_unit="auto")
    yield upload(group, "in millimetres, guessed", ascii_ply(tetrahedron(80)), model_unit="auto")
    yield upload(group, "told by cad_format", ply(), "wedge.bin", cad_format="ply")
    for words, data in {
        "too small": ascii_ply(tetrahedron(0.07)),
        "too large": ascii_ply(tetrahedron(9000)),
        "open, degenerate, far from its origin": ascii_ply(
            (np.array(tetrahedron(77)) + np.array([2000.0, 0, 0])).tolist(), [*FACES[:3], (0, 0, 1)]
        ),
    }.items():
        yield upload(group, f"health: {words}", data)
    yield upload(group, "no file name", ply(), "wedge")
    yield upload(group, "another suffix", ply(), "wedge.bin")
    yield upload(group, "without the file", None, name="x")
    for wait in ("long", "-1", "601"):
        yield upload(group, f"wait={wait}", ply(), ask={"path": f"{OBJECTS}?wait={wait}"})
    media, body = multipart({"file": ("a.ply", ply()), "mesh": ("b.ply", b"x")})
    yield send(group, "an unknown part", body, media, path=OBJECTS)
    media, body = multipart({"file": ("a.ply", ply()), "request": (None, b"{")})
    yield send(group, "a request that is no JSON", body, media, path=OBJECTS)
    yield send(group, "an empty form", b"", media, path=OBJECTS)
    yield send(group, "JSON in place of a form", b"{}", JSON, path=OBJECTS)
    yield get(group, OBJECTS, name="the list afterwards")


def _forms() -> Iterator[Step]:
    group, ask = "forms", small().one()
    yield pose(group, "JSON", ask)
    yield pose(group, "MessagePack", ask, form="msgpack")
    yield pose(group, "multipart", ask, form="multipart")
    inline = small().one(objects=..., cad=ply(), cad_format="ply")
    yield pose(group, "multipart with the CAD as a file", inline, form="multipart")
    yield pose(group, "gzip of JSON", ask, gzipped=True)
    yield pose(group, "gzip of MessagePack", ask, form="msgpack", gzipped=True)
    yield pose(group, "x-gzip", ask, gzipped=True, headers={"Content-Encoding": "x-gzip"})
    yield pose(group, "chunked", ask, chunk=1000)
    for media, form in (
        *(("application/json; charset=utf-8", "json"), ("Application/JSON", "json")),
        ("application/x-msgpack", "msgpack"),
    ):
        yield pose(group, media, ask, form=form, headers={"Content-Type": media})
    accept = {"Accept": MSGPACK}
    yield pose(group, "an answer in MessagePack", ask, headers=accept)
    yield pose(group, "a failure in MessagePack", {}, headers=accept)
    yield pose(group, "any answer accepted", ask, headers={"Accept": "*/*"})
    rgb, depth = ("a.png", small().rgb), ("b.png", small().depth)
    rest = msgspec.json.encode({key: value for key, value in ask.items() if not key.endswith("_image")})
    forms: dict[str, dict[str, tuple[str | None, bytes]]] = {
        "parts by their fields' names": {"rgb_image": rgb, "depth_image": depth, "request": (None, rest)},
        "an unknown part": {"rgb": rgb, "depth": depth, "request": (None, rest), "mask": ("c.png", b"1")},
        "without the depth": {"rgb": rgb, "request": (None, rest)},
        "without the request": {"rgb": rgb},
        "a request that is no JSON": {"rgb": rgb, "depth": depth, "request": (None, b"{")},
        "a picture twice": {"rgb": rgb, "depth": depth, "request": (None, msgspec.json.encode(ask))},
    }
    for name, parts in forms.items():
        media, body = multipart(parts)
        yield send(group, f"form: {name}", body, media)
    group = "415"
    text = msgspec.json.encode(ask)
    for media in ("text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/form-data", ""):
        yield send(group, f"content type {media!r}", text, media)
    yield send(group, "multipart/mixed", text, "multipart/mixed; boundary=x")
    for coding in ("br", "gzip, gzip", "deflate"):
        yield send(group, f"content encoding {coding}", text, headers={"Content-Encoding": coding})


def _cad() -> Iterator[Step]:
    group = "cad"
    plain = {"masks": [small().rle()], "object_ids": [5]}

    def store(data: Path) -> None:
        folder = data / "cad" / "line 2"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "wedge.ply").write_bytes(ply())
        (data / "cad" / "notes.txt").write_text("no CAD")
        (data / "cad" / "climbs.obj").write_bytes(b"mtllib ../../secret.mtl\n" + obj(tetrahedron(66)))

    ways: dict[str, Tree] = {
        "by a path": {"cad_path": "line 2/wedge.ply"},
        "by an absolute path": {"cad_path": "@DATA@/cad/line 2/wedge.ply"},
        "by a name": {"object_id": "wedge"},
        "by an id": {"object_id": "@ID:wedge@"},
        "by itself": {"cad": ply(), "cad_format": "ply"},
        "by category": {"objects": {"5": {"object_id": "wedge"}}},
        "by category, one with a path": {
            "objects": {"5": {"cad_path": "line 2/wedge.ply"}, "6": {"object_id": "stepped"}}
        },
        "by category, all the same": {"objects": {"5": {"object_id": "wedge"}, "6": {"object_id": "wedge"}}},
    }
    for name, way in ways.items():
        tree = small().one(detections=plain, **{"objects": ..., **way})
        yield pose(group, name, tree, before=store)
        yield pose(group, f"{name}, MessagePack", tree, form="msgpack")
    tree = small().one(detections=plain, objects={5: {"object_id": "wedge"}})
    yield pose(group, "by category, integer keys", tree, form="msgpack")
    for unit in ("m", "auto"):
        tree = small().one(objects=..., cad=ply(unit="m"), cad_format="ply", model_unit=unit)
        yield pose(group, f"in metres, model_unit {unit}", tree)
    tree = small().every(objects={"wedge": {"object_id": "wedge"}}, init_poses=small().truths)
    yield pose(group, "categories without an entry", tree)
    yield pose(group, "an unknown id", small().one(objects=..., object_id="nobody"))
    yield pose(group, "an unknown id by category", small().one(objects={"wedge": {"object_id": "f" * 64}}))
    yield pose(group, "a path that is not there", small().one(objects=..., cad_path="nothing/here.ply"))
    yield pose(group, "a path that is no CAD file", small().one(objects=..., cad_path="notes.txt"))
    tree = small().one(objects=..., cad_path="climbs.obj", init_poses=...)
    yield pose(group, "an OBJ that asks for a file outside", tree)


def _masks() -> Iterator[Step]:
    group, mask = "masks", small().mask()
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate(([False], flat)))).tolist()
    picture = base64.b64encode(png(mask)).decode()
    forms: Tree = {
        "compressed RLE": small().rle(),
        "RLE with a list of counts": {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, flat.size]).tolist()},
        "nested list": mask.astype(int).tolist(),
        "base64 PNG": picture,
        "PNG as a data URL": f"data:image/png;base64,{picture}",
    }
    for name, form in forms.items():
        yield pose(group, name, small().one(detections=columns(form)))
        yield pose(group, f"{name}, MessagePack", small().one(detections=columns(form)), form="msgpack")
    tree = small().one(detections=columns(png(mask)))
    yield pose(group, "PNG bytes, MessagePack", tree, form="msgpack")
    counts = {"size": [HEIGHT, WIDTH], "counts": small().rle()["counts"].encode()}
    yield pose(group, "counts as bytes, MessagePack", small().one(detections=columns(counts)), form="msgpack")
    left, right = [100, 50, 112, 50, 112, 70, 100, 70], [112, 50, 125, 50, 125, 70, 112, 70]
    yield pose(group, "polygons", small().one(detections=columns([left, right])))
    yield pose(group, "polygons, MessagePack", small().one(detections=columns([left, right])), form="msgpack")
    box = [90, 40, 50, 30.5]
    yield pose(group, "a box as xywh", small().one(detections=columns(small().rle(), boxes=[box])))
    corners = columns(small().rle(), boxes=[[90, 40, 140, 70.5]])
    yield pose(group, "a box as xyxy", small().one(detections=corners, box_format="xyxy"))
    yield pose(group, "scores", small().one(detections=columns(small().rle(), scores=[0.25])))
    for category in (5, "wedge", None, 2**40, "", -1):
        found = {"masks": [small().rle()], "object_ids": [category]}
        yield pose(group, f"category {category!r}", small().one(detections=found, objects=..., object_id="wedge"))
    only = small().one(detections={"masks": [small().rle()]}, objects=..., object_id="wedge")
    yield pose(group, "only masks", only)
    item = {"scene_id": 0, "image_id": 0, "category_id": 1, "bbox": [95, 44, 45, 34], "score": 0.71, "time": 0.0}
    listed = small().one(detections=[item | {"segmentation": small().rle()}], objects=..., object_id="wedge")
    yield pose(group, "SAM-6D's list", listed)
    yield pose(group, "SAM-6D's list, MessagePack", listed, form="msgpack")
    nothings: list[Any] = [[], {"masks": []}, {"masks": [], "boxes": [], "scores": [], "object_ids": []}]
    for nothing in nothings:
        yield pose(group, f"no detections: {nothing}", small().one(detections=nothing, init_poses=...))
    encode = project()[2]
    empty, few, blind = (np.zeros((HEIGHT, WIDTH), dtype=bool) for _ in range(3))
    few[60:64, 110:118] = True  # 32 pixels, one too few
    blind[10:30, 10:30] = True
    depth = small().scene.depth_raw.copy()
    depth[:40, :40] = 0
    sent = [encode(empty), small().rle(), encode(few), small().rle(), encode(blind), small().rle()]
    ids = ["wedge", "wedge", "wedge", "unknown", "wedge", "wedge"]
    tree = small().one(
        depth_image=png(depth),
        detections={"masks": [dict(one) if isinstance(one, dict) else one for one in sent], "object_ids": ids},
        init_poses=[small().truth()] * 6,
    )
    yield pose(group, "every row code of a mask", tree)
    yield pose(group, "every row code of a mask, no init_poses", {**tree, "init_poses": [None] * 6})


def _pictures() -> Iterator[Step]:
    group, scene, K = "pictures", small().scene, small().K
    depth_m = scene.depth_m.copy()
    depth_m[:5] = np.nan  # no reading
    uncompressed = (int(cv2.IMWRITE_TIFF_COMPRESSION), 1)
    for name, array, camera in (
        ("float TIFF in metres", depth_m, {"depth_scale": 1000}),
        ("float TIFF in metres, told by depth_unit", depth_m, {"depth_scale": 1.0, "depth_unit": "m"}),
        ("float TIFF in millimetres", depth_m * 1000, {"depth_scale": 1.0}),
        ("float TIFF without depth_scale", depth_m, {}),
    ):
        image = written(".tiff", array.astype(np.float32), *uncompressed)
        yield pose(group, name, small().one(depth_image=image, cam_params={"cam_K": K, **camera}))
    compressed = written(".tiff", depth_m.astype(np.float32))
    told = {"cam_K": K, "depth_scale": 1000}
    yield pose(group, "compressed float TIFF", small().one(depth_image=compressed, cam_params=told))
    whole = png(np.rint(scene.depth_m * 1000).astype(np.uint16))
    cameras: list[Tree] = [{}, {"depth_scale": 1, "depth_unit": "mm"}, {"depth_scale": 0.001, "depth_unit": "m"}]
    for camera in cameras:
        tree = small().one(depth_image=whole, cam_params={"cam_K": K, **camera})
        yield pose(group, f"16-bit PNG in millimetres, {camera}", tree)
    rgb = scene.rgb
    for name, picture in (
        ("JPEG", written(".jpg", np.ascontiguousarray(rgb[..., ::-1]))),
        ("grey", png(np.ascontiguousarray(rgb[..., 0]))),
        ("RGBA", png(np.dstack([rgb, np.full(rgb.shape[:2], 200, np.uint8)]))),
    ):
        yield pose(group, f"colour as {name}", small().one(rgb_image=picture))
    for name, matrix in (
        ("as three rows", [K[:3], K[3:6], K[6:]]),
        ("of integers", [314, 0, 160, 0, 314, 120, 0, 0, 1]),
        ("with its principal point outside", [K[0], 0, 600, 0, K[4], K[5], 0, 0, 1]),
        ("with skew", [K[0], 0.5, K[2], 0, K[4], K[5], 0, 0, 1]),
    ):
        told = {"cam_K": matrix, "depth_scale": 0.1}
        yield pose(group, f"cam_K {name}", small().one(cam_params=told))
    pixel = {"rgb_image": png(np.zeros((1, 1, 3), np.uint8)), "depth_image": png(np.ones((1, 1), np.uint16))}
    yield pose(group, "a picture of one pixel", small().one(detections=columns([[1]]), **pixel))


def _options() -> Iterator[Step]:
    group = "options"
    for engine in ("auto", "geometric"):
        for refine in ("auto", "icp", "none"):
            yield pose(group, f"engine {engine}, refine {refine}", small().one(engine=engine, refine=refine))
    nearly = {**small().truth(), "translation": [x + 4 for x in small().truth()["translation"]]}
    for refine in ("icp", "none"):
        tree = small().one(init_poses=[nearly, None], refine=refine, detections=columns(*[small().rle()] * 2))
        yield pose(group, f"init_poses and null, refine {refine}", tree)
    for changes in (
        *({"hypotheses": 3}, {"hypotheses": 16}, {"units": "strict"}, {"min_score": 1.0}, {"min_score": 0.1}),
        *({"seed": 7}, {"seed": 2**63 - 1}, {"refine": "none"}, {"hypotheses": 2, "seed": 1, "refine": "none"}),
    ):
        words = ", ".join(f"{key} {value}" for key, value in changes.items())
        yield pose(group, f"a search with {words}", small().one(init_poses=..., **changes))
    yield pose(group, "visualize", small().every(init_poses=small().truths, visualize=True))
    headers = {"Accept": MSGPACK}
    tree = small().one(visualize=True)
    yield pose(group, "visualize in MessagePack", tree, form="msgpack", headers=headers)
    yield pose(group, "visualize nothing", small().one(detections=[], init_poses=..., visualize=True))
    yield pose(group, "deadline_ms", small().one(deadline_ms=60_000))
    yield pose(group, "a deadline in the header", small().one(), headers={"X-Request-Deadline-Ms": "50000"})
    yield pose(group, "both", small().one(deadline_ms=60_000), headers={"X-Request-Deadline-Ms": "50000"})
    yield pose(
        group, "a hopeless deadline", small().one(deadline_ms=1), open_keys=frozenset({"detail", "error_message"})
    )
    for value in ("0", "-5", "soon", "1.5", "", "700000"):
        yield pose(group, f"the deadline header {value!r}", small().one(), headers={"X-Request-Deadline-Ms": value})


def _searches() -> Iterator[Step]:
    group = "searches"
    for name in NAMES:
        yield pose(group, name, small().one(name, init_poses=...))
    yield pose(group, "all together", small().every(hypotheses=1))
    yield pose(group, "all together, refine none", small().every(refine="none"), form="msgpack")
    for name in demo().names:
        if name not in NAMES:
            yield upload(group, f"add {name}", ply(name), f"{name}.ply", name=name)
    yield pose(group, "the demo's seven", demo().every(hypotheses=2), form="msgpack")
    yield pose(group, "the demo's seven, no refinement", demo().every(refine="none"), form="msgpack")
    swapped = [*demo().names[1:], demo().names[0]]
    tree = demo().every(detections={"masks": demo().masks, "object_ids": swapped})
    yield pose(group, "the demo's seven, each with another's mask", tree, form="msgpack")


def _outputs() -> Iterator[Step]:
    group, encode = "outputs", project()[2]
    empty = dict(encode(np.zeros((HEIGHT, WIDTH), dtype=bool)))
    found = columns(small().rle(), empty, scores=[0.5, 0.9], boxes=[[95, 44, 45, 34], [0, 0, 1, 1]])
    tree = small().one(detections=found, init_poses=[small().truth(), None])
    yield pose(group, "two detections", tree | {"output_dir": "line 2/frame-7"}, files="line 2/frame-7")
    tree = small().every(output_dir="all", hypotheses=1, visualize=True)
    yield pose(group, "a whole scene", tree, files="all")
    yield pose(group, "written again", small().one(output_dir="all"), files="all")
    nothing = small().one(detections=[], init_poses=..., output_dir="nothing")
    yield pose(group, "no detections", nothing, files="nothing")
    item = {"category_id": 1, "score": 0.9, "segmentation": small().rle(), "image_id": 3}
    yield pose(group, "the second dialect", seg(item, output_dir="second"), path=SEG, files="second")
    tree = pipeline(output_dir="pipeline")
    yield pose(group, "the full pipeline", tree, path=FULL, files="pipeline")


def _dialect() -> Iterator[Step]:
    group, encode = "second dialect", project()[2]

    def coco(score: float = 0.9, **more: Any) -> Tree:
        return {"category_id": 1, "score": score, "segmentation": small().rle(), **more}

    def ask(name: str, tree: Tree, **more: Any) -> Ask:
        return pose(group, name, tree, path=SEG, **more)

    empty = dict(encode(np.zeros((HEIGHT, WIDTH), dtype=bool)))
    items = [coco(0.2), coco(0.75, image_id=3), {"segmentation": empty, "score": 0.9}, coco(0.1)]
    yield ask("kept and left out", seg(*items, template_dir="templates/wedge"))
    yield ask("MessagePack", seg(*items), form="msgpack", headers={"Accept": MSGPACK})
    yield ask("multipart", seg(*items), form="multipart")
    yield ask("refined", seg(coco(), refine="icp"))
    yield ask("refine auto", seg(coco(), refine="auto"))
    yield ask("with a seed", seg(coco(), seed=3))
    yield ask("a threshold that leaves nothing", seg(coco(0.95), det_score_thresh=0.95))
    yield ask("a threshold below all", seg(coco(0.0), coco(-1.0), det_score_thresh=-2))
    yield ask("nothing", seg())
    yield ask("a row without a mask", seg(coco(segmentation={"size": None, "counts": ""})))
    bare = (small().scene.depth_raw.astype("<f4") * 0.1).tobytes()
    camera = {"cam_K": small().K, "depth_scale": 1.0}
    for form in ("json", "msgpack"):
        yield ask(f"depth as bare floats, {form}", seg(coco(), depth_image=bare, cam_params=camera), form=form)
    yield ask("bare floats too few", seg(coco(), depth_image=bare[:-4], cam_params=camera))
    yield ask("an unknown object", seg(coco(), object_id="nobody"))
    yield ask("detections", seg(coco(), detections=[]))
    yield ask("columns", seg(seg_data={"masks": []}))
    yield ask("an item without a mask", seg({"score": 1.0}))
    yield ask("a wrong mask", seg(coco(0.1), coco(segmentation={"size": [1, 1], "counts": "1"})))
    yield ask("a broken mask", seg(coco(segmentation="%%%")))
    yield ask("a box format", seg(coco(), box_format="xyxy"))
    yield ask("hypotheses", seg(coco(), hypotheses=1))
    yield ask("frame_guess", seg(coco(), frame_guess=False))
    yield ask("mistyped threshold", seg(coco(), det_score_thresh="high"))
    yield ask("mistyped template_dir", seg(coco(), template_dir=5))
    yield ask("an item that is text", seg("all"))  # type: ignore[arg-type]
    yield ask("a category of many bits", seg(coco(category_id=2**70)))
    yield ask("an empty body", {}, headers={"Accept": MSGPACK})


def _pipeline() -> Iterator[Step]:
    group = "full pipeline"

    def ask(name: str, tree: Tree, **more: Any) -> Ask:
        return pose(group, name, tree, path=FULL, asks_ism=True, **more)

    yield ask("good", pipeline(ism_cad_path="/ism/wedge.ply"))
    yield ask("MessagePack", pipeline(), form="msgpack", headers={"Accept": MSGPACK})
    yield ask("multipart", pipeline(), form="multipart")
    yield ask("by category", pipeline(object_id=..., objects={1: {"object_id": "wedge"}}), form="msgpack")
    yield ask("with metres", pipeline(cam_params={"cam_K": small().K, "depth_scale": 0.0001, "depth_unit": "m"}))
    trace = f"00-{SENT_TRACE}-00f067aa0ba902b7-01"
    yield ask("with a trace", pipeline(), headers={"traceparent": trace})
    for mode in (
        *("nested", "only masks", "no detections", "a box that is none", "500 once", "drop once"),
        *("500", "422", "drop", "garbage", "wrong types", "error in 200", "unsuccessful", "no masks", "unequal"),
        *("a wrong mask", "hang"),
    ):
        yield ask(f"ISM: {mode}", pipeline(), ism=mode)
    yield ask("ISM: hang, with a deadline", pipeline(deadline_ms=1200), ism="hang")
    yield ask("an unknown object", pipeline(object_id="nobody"))
    yield ask("with detections", pipeline(detections={"masks": []}))
    yield ask("with init_poses", pipeline(init_poses=[]))
    yield ask("without templates", pipeline(template_dir=...))
    yield ask("mistyped templates", pipeline(template_dir=5))
    yield ask("empty templates", pipeline(template_dir=""))
    yield ask("mistyped ism_cad_path", pipeline(ism_cad_path=5))


def _headers() -> Iterator[Step]:
    group = "headers"
    for name, given in (
        ("plain", "job-7_a.B"),
        ("128", "x" * 128),
        ("129", "x" * 129),
        ("blank", "a b"),
        ("empty", ""),
    ):
        yield get(group, "/livez", headers={"X-Request-Id": given}, name=f"a request id: {name}")
    yield get(group, "/nowhere", headers={"X-Request-Id": "job-8"}, name="a request id on 404")
    traces = {
        "a trace": f"00-{SENT_TRACE}-00f067aa0ba902b7-01",
        "a trace not sampled": f"00-{SENT_TRACE}-00f067aa0ba902b7-00",
        "a trace of a later version": f"cc-{SENT_TRACE}-00f067aa0ba902b7-01-more",
        "a trace that is none": "00-0-0-00",
    }
    for name, value in traces.items():
        yield get(group, "/livez", headers={"traceparent": value}, name=name)
    for origin in ("https://lab.example", "https://elsewhere.example"):
        yield get(group, "/livez", headers={"Origin": origin}, name=f"from {origin}")
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        asked["Access-Control-Request-Headers"] = "Content-Type"
        yield get(group, POSE, method="OPTIONS", headers=asked, name=f"preflight from {origin}")
        yield pose(group, f"a pose from {origin}", small().one(), headers={"Origin": origin})
    yield get(group, "/livez", headers={"Host": "elsewhere.example"}, name="another host")
    for name, raw in {
        "no HTTP": b"HELLO\r\n\r\n",
        "HTTP/1.0": b"GET /livez HTTP/1.0\r\nX-Request-Id: old\r\n\r\n",
        "no host": b"GET /livez HTTP/1.1\r\nX-Request-Id: a\r\nConnection: close\r\n\r\n",
        "two requests on a connection": b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Request-Id: a\r\n\r\n"
        b"GET /readyz HTTP/1.1\r\nHost: x\r\nX-Request-Id: b\r\nConnection: close\r\n\r\n",
        "a length that is none": b"POST /livez HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
    }.items():
        yield Ask(group=group, name=name, raw=raw)
    yield pose(group, "expect 100-continue", {}, headers={"Expect": "100-continue"})


def _late() -> Iterator[Step]:
    """Yield the steps that must come last."""
    group = "afterwards"
    yield pose(group, "an object that is there", small().one(objects=..., object_id="turning", init_poses=...))
    yield get(group, f"{OBJECTS}/turning", method="DELETE")
    yield pose(group, "and is no more", small().one(objects=..., object_id="turning", init_poses=...))
    yield get(group, OBJECTS, name="all objects")
    yield get(group, "/api/v1/status", name="the status")
    yield get(group, "/metrics", name="the metrics")
    yield Command(group=group, name="a key", arguments=("keys", "add", "stored", "--json", "-"), remember="KEY:stored")


# -------------------------------------------------------------------------------------------------------------- limits


def limits() -> list[Step]:
    """Return all steps for a server with tight limits, without an ISM server, and at last with keys."""
    return [*_tight(), *_keys()]


def _head(length: int, more: str = "") -> bytes:
    head = f"POST {POSE} HTTP/1.1\r\nHost: x\r\nX-Request-Id: held\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def _tight() -> Iterator[Step]:
    group, timed = "limits", frozenset({"detail", "error_message"})
    yield upload(group, "add the wedge", ply(), "wedge.ply", name="wedge", ask={"remember": "ID:wedge"})
    many = small().one(detections=columns(*[small().rle()] * DETECTIONS), init_poses=..., hypotheses=8)
    yield pose("504", "work that comes too late", many | {"deadline_ms": 80})
    fresh = small().one(objects=..., cad=ply("housing"), cad_format="ply", init_poses=...)
    late = fresh | {"deadline_ms": 150}
    yield pose("503", "a CAD that takes too long", late, open_keys=timed | {"header retry-after"})
    yield upload(group, "and is there in the end", ply("housing"), "housing.ply")
    found, starts = columns(*[small().rle()] * 7), [small().truth()] * 7
    tree = small().one(detections=found, init_poses=starts, visualize=True, output_dir="parts")
    yield pose(group, "more parts than a pass holds", tree, files="parts")
    yield pose(group, "a search larger than a pass", {**many, "hypotheses": 1})
    yield pose(group, "one detection too many", small().one(detections=columns(*[small().rle()] * 21), init_poses=...))
    tree = many | {"deadline_ms": 9}
    yield pose(group, "a deadline that is too short", tree, open_keys=timed)
    yield pose(group, "a deadline beyond the longest", small().one(deadline_ms=100_001))
    yield pose("503", "no ISM server", pipeline(), path=FULL)
    group = "413"
    yield send(group, "a small body over a small limit", b" " * (2 * 2**20 + 1))
    yield send(group, "the same in chunks", b" " * (3 * 2**20), chunk=2**18)
    yield Ask(group=group, name="a body of a terabyte announced", raw=_head(1 << 40) + b"{", open_keys=timed)
    found = columns(*[demo().rle("wedge")] * 6)
    yield pose(group, "masks that decode to too much", demo().one(detections=found, init_poses=...), form="msgpack")
    big = png(np.zeros((800, 800, 3), np.uint8))
    yield pose(group, "a picture over a small limit", small().one(rgb_image=big))
    padded = ply().replace(b"comment", b"comment " + b"x" * (2**20 + 1), 1)
    tree = small().one(objects=..., cad=padded, cad_format="ply")
    yield pose(group, "an inline CAD over its limit", tree, form="msgpack")
    yield upload(group, "an upload over its limit", ply() + b"x" * (2 * 2**20))
    media, body = multipart({"file": ("a.ply", ply()), "request": (None, b" " * (2**20 + 1))})
    yield send(group, "a request part that is too long", body, media, path=OBJECTS)
    group = "408"
    yield Ask(group=group, name="a body that stops coming", raw=_head(5000) + b'{"rgb_image": "')
    yield Ask(group=group, name="a body that never begins", raw=_head(5000))
    group = "429"
    full: Tree = {"until": 429, "raw": _head(5000)}
    yield Ask(group=group, name="too many requests", held=_head(5000) + b"{", held_count=IN_FLIGHT, **full)
    length = int(1.9 * 2**20)
    full = {"until": 429, "raw": _head(length)}
    yield Ask(group=group, name="too many bytes", held=_head(length) + b"{", held_count=2, **full)
    packed = _head(9000, "Content-Encoding: gzip\r\n")
    yield Ask(group=group, name="too many compressed bytes", held=packed, held_count=2, **full)
    yield pose(group, "and then there is room again", small().one())


def _keys() -> Iterator[Step]:
    group = "keys"

    def command(name: str, *arguments: str, remember: str = "") -> Command:
        return Command(group=group, name=name, arguments=("keys", *arguments), remember=remember)

    def key(name: str) -> dict[str, str]:
        return {"X-API-Key": f"@KEY:{name}@"}

    yield command("none yet", "list", "--json", "-")
    yield command("add one", "add", "robot", "--json", "-", remember="KEY:robot")
    yield command("add a slow one", "add", "slow", "--rate", "0.05", "--json", "-", remember="KEY:slow")
    yield command("add it again", "add", "robot")
    yield command("a name that is none", "add", "a b")
    yield command("list them", "list", "--json", "-")
    for path in ("/api/v1/status", OBJECTS, "/openapi.json", "/metrics", "/v2/models/pem", "/", "/nowhere", POSE):
        yield get(group, path, name=f"without a key: {path}")
        yield get(group, path, headers={"X-API-Key": "pem_guess"}, name=f"a wrong key: {path}")
        yield get(group, path, headers=key("robot"), name=f"the key: {path}")
    for path in ("/livez", "/readyz", "/docs", "/v2/health/live"):
        yield get(group, path, name=f"without a key: {path}")
    tree = small().one()
    yield pose(group, "a pose without a key", tree)
    yield pose(group, "a pose with a wrong key", tree, headers={"Authorization": "Bearer guess"})
    yield pose(group, "a pose with a password", tree, headers={"Authorization": "Basic dXNlcjpwdw=="})
    yield pose(group, "a pose with the key", tree, headers={"Authorization": "Bearer @KEY:robot@"})
    yield pose(group, "a pose with the key, lower case", tree, headers={"authorization": "bearer @KEY:robot@"})
    yield upload(group, "an upload without a key", ply())
    yield get(group, f"{OBJECTS}/wedge", method="DELETE", name="a removal without a key")
    nobody = small().one(objects=..., object_id="nobody")
    yield pose(group, "over the key's rate", nobody, headers=key("slow"), times=3)
    yield get(group, "/api/v1/status", headers=key("slow"), name="its GET is not counted")
    yield pose(group, "another key's rate", nobody, headers=key("robot"))
    yield command("revoke one", "revoke", "slow")
    yield get(group, "/api/v1/status", headers=key("slow"), name="a revoked key")
    yield command("revoke it again", "revoke", "slow")

    def break_them(data: Path) -> None:
        (data / "keys.json").write_text("{ broken")

    def remove_them(data: Path) -> None:
        (data / "keys.json").unlink(missing_ok=True)

    yield get(group, "/api/v1/status", headers=key("robot"), name="a broken file of keys", before=break_them)
    yield get(group, "/livez", name="open even then")
    yield command("list a broken file", "list")
    yield get(group, "/api/v1/status", name="no keys any more", before=remove_them)
    yield get("limits", "/metrics", name="the metrics of a server with tight limits")


# -------------------------------------------------------------------------------------------------------------- stored


def stored(names: list[str], keyed: bool) -> list[Step]:
    """Return all steps for servers that start on copies of one data directory; `names`: its objects, or their ids."""
    group = "stored data"
    key = {"X-API-Key": "@KEY:stored@"} if keyed else {}
    steps: list[Step] = [get(group, OBJECTS, headers=key, name="all objects, ready at once")]
    steps += [get(group, f"{OBJECTS}/{name}", headers=key) for name in names[:20]]
    steps.append(get(group, "/api/v1/status", headers=key))
    if keyed:
        steps += [
            get(group, "/api/v1/status", name="keys are asked for"),
            Command(group=group, name="its keys", arguments=("keys", "list", "--json", "-")),
        ]
    for name in names[:12]:
        tree = small().one(objects=..., object_id=name, init_poses=...)
        steps.append(pose(group, f"a pose of {name[:20]}", tree, headers=key))
    if set(demo().names) <= set(names):
        steps.append(pose(group, "the demo's seven", demo().every(hypotheses=1), form="msgpack", headers=key))
        steps.append(pose(group, "all four", small().every(), headers=key))
        inline = small().one(objects=..., cad=ply(), cad_format="ply")
        steps.append(pose(group, "a CAD that is known", inline, headers=key))
        steps.append(upload(group, "an upload that is known", ply(), "wedge.ply", ask={"headers": key}))
    for name in names[:1]:
        tree = small().one(objects=..., object_id=name, init_poses=..., output_dir="all")
        steps.append(pose(group, "files written anew", tree, headers=key, files="all"))
    return steps
