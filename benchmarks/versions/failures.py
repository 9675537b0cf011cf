"""The questions that no server may answer with a pose: wrong bodies, fields, masks and files."""

from __future__ import annotations

import base64
import gzip
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks.versions.material import (
    HEIGHT,
    JSON,
    MSGPACK,
    WIDTH,
    Step,
    Tree,
    ascii_ply,
    columns,
    ply,
    png,
    png_by_hand,
    pose,
    project,
    send,
    small,
    tetrahedron,
    upload,
    written,
    zipped,
)


def failures() -> Iterator[Step]:
    """Yield all steps that must fail."""
    for group in (_fields, _masks, _bodies, _pictures, _meshes, _paths, _units):
        yield from group()


def _fields() -> Iterator[Step]:
    group, K, mask = "422: fields", small().K, small().rle()

    def camera(**changes: Any) -> Tree:
        return {"cam_params": {"cam_K": K, "depth_scale": 0.1} | changes}

    def start(R: Any, t: Any = (0, 0, 400)) -> Tree:
        return {"init_poses": [{"rotation": R, "translation": list(t)}]}

    for key, value in {
        **{"rgb_image": 5, "depth_image": [], "cam_params": 7, "cad_path": 5, "object_id": 5, "cad": 5, "objects": []},
        **{"cad_format": 1, "model_unit": 1, "engine": 1, "refine": 1, "hypotheses": "x", "units": 1},
        **{"min_score": "x", "seed": "x", "deadline_ms": "x", "visualize": 1, "output_dir": 1, "detections": 5},
        **{"box_format": 1, "init_poses": {}},
    }.items():
        yield pose(group, f"mistyped {key}", small().one(**{key: value}))
    for key in ("rgb_image", "depth_image", "cam_params", "detections"):
        yield pose(group, f"missing {key}", small().one(**{key: ..., "init_poses": ...}))
    wrong: dict[str, Tree] = {
        "a typo": {"hypothesis": 3},
        "a typo inside the camera": camera(depth_scal=1.0),
        "a typo inside the columns": {"detections": {"masks": [], "box": []}, "init_poses": ...},
        "a typo inside an object": {"objects": {"wedge": {"cad": "x"}}},
        "no camera matrix": {"cam_params": {"depth_scale": 1.0}},
        "no masks": {"detections": {"scores": []}, "init_poses": ...},
        "text for a number": camera(depth_scale="one"),
        "a depth scale of zero": camera(depth_scale=0.0),
        "another depth unit": camera(depth_unit="cm"),
        "eight numbers": camera(cam_K=K[:8]),
        "two rows": camera(cam_K=[K[:3], K[3:6]]),
        "a matrix of text": camera(cam_K=["170"] * 9),
        "no focal length": camera(cam_K=[0, 0, 79.5, 0, 170, 59.5, 0, 0, 1]),
        "a singular matrix": camera(cam_K=[1.0] * 9),
        "a matrix by columns": camera(cam_K=[170, 0, 0, 0, 170, 0, 79.5, 59.5, 1]),
        "a focal length of no camera": camera(cam_K=[1e200, 0, 79.5, 0, 1e200, 59.5, 0, 0, 1]),
        "a depth scale beyond all": camera(depth_scale=1e300),
        "an unknown engine": {"engine": "magic"},
        "an engine that is not configured": {"engine": "sam6d"},
        "an unknown refinement": {"refine": "more"},
        "too many runners-up": {"hypotheses": 1000},
        "a negative number of runners-up": {"hypotheses": -1},
        "a score above one": {"min_score": 1.5},
        "another judge of units": {"units": "maybe"},
        "a negative seed": {"seed": -1},
        "a seed of 70 bits": {"seed": 2**70},
        "a deadline of nothing": {"deadline_ms": 0},
        "a deadline beyond the longest": {"deadline_ms": 10**9},
        "a box format of one's own": {"box_format": "cxcywh"},
        "another model unit": {"model_unit": "inch"},
        "an empty path": {"objects": ..., "cad_path": ""},
        "no CAD": {"objects": ...},
        "two CADs": {"object_id": "wedge"},
        "a CAD without its format": {"objects": ..., "cad": ply()},
        "a format without its CAD": {"cad_format": "ply"},
        "another CAD format": {"objects": ..., "cad": ply(), "cad_format": "step"},
        "a CAD of no kind in the map": {"objects": {"wedge": {}}},
        "a CAD of two kinds in the map": {"objects": {"wedge": {"object_id": "wedge", "cad_path": "x.ply"}}},
        "a unit for a registered object": {"objects": ..., "object_id": "wedge", "model_unit": "mm"},
        "a unit for registered objects": {"model_unit": "m"},
        "too few scores": {"detections": columns(mask, scores=[])},
        "too many boxes": {"detections": columns(mask, boxes=[[0, 0, 1, 1]] * 2)},
        "too few ids": {"detections": {"masks": [mask], "object_ids": []}},
        "a box of three numbers": {"detections": columns(mask, boxes=[[0, 0, 1]])},
        "a box beyond all numbers": {
            "detections": columns(mask, boxes=[[-1.7e308, 0, 1.7e308, 1]]),
            "box_format": "xyxy",
        },
        "a score of text": {"detections": columns(mask, scores=["high"])},
        "a category that is a list": {"detections": {"masks": [mask], "object_ids": [[]]}},
        "detections that are text": {"detections": "all", "init_poses": ...},
        "too few starting poses": {"init_poses": []},
        "a start that is no rotation": start([[2, 0, 0], [0, 1, 0], [0, 0, 1]]),
        "a start that is a mirror": start([[-1, 0, 0], [0, 1, 0], [0, 0, 1]]),
        "a start in two dimensions": start([[1, 0], [0, 1], [0, 0]]),
        "a start beyond the horizon": start(np.eye(3).tolist(), (0, 0, 1e300)),
        "a start without its place": {"init_poses": [{"rotation": np.eye(3).tolist()}]},
        "more detections than allowed": {"detections": columns(*[mask] * 201), "init_poses": ...},
    }
    for name, changes in wrong.items():
        yield pose(group, name, small().one(**changes))
    for name in (
        "a typo",
        "no camera matrix",
        "two CADs",
        "too few scores",
        "a box of three numbers",
        "a typo inside an object",
    ):
        yield pose(group, f"{name}, MessagePack", small().one(**wrong[name]), form="msgpack")
    nan = float("nan")
    numbers: dict[str, Tree] = {
        "cam_K": camera(cam_K=[nan, *K[1:]]),
        "depth_scale": camera(depth_scale=float("inf")),
        "boxes": {"detections": columns(mask, boxes=[[0, 0, nan, 1]])},
        "scores": {"detections": columns(mask, scores=[nan])},
        "min_score": {"min_score": nan},
        "init_poses": start(np.eye(3).tolist(), (0, 0, nan)),
    }
    for name, changes in numbers.items():
        yield pose(group, f"{name} not finite, MessagePack", small().one(**changes), form="msgpack")
    text = msgspec.json.encode(small().one(**camera(cam_K=[123456, *K[1:]])))
    yield send(group, "an integer of 400 digits", text.replace(b"123456", b"9" * 400))
    found = {"masks": [mask], "object_ids": [123456]}
    text = msgspec.json.encode(small().one(detections=found, objects=..., object_id="wedge"))
    yield send(group, "a category of 30 digits", text.replace(b"123456", b"9" * 30))


def _masks() -> Iterator[Step]:
    group, size, encode = "422: masks", [HEIGHT, WIDTH], project()[2]

    def of(height: int, width: int) -> Tree:
        return dict(encode(np.zeros((height, width), dtype=bool)))

    wrong: Tree = {
        "a number": 7,
        "null": None,
        "a nested list of 0 and 255": [[255] * WIDTH] * HEIGHT,
        "an RLE of another size": of(HEIGHT // 2, WIDTH),
        "an RLE with its size turned": of(WIDTH, HEIGHT),
        "an RLE of no size": {"size": [0, 0], "counts": ""},
        "an RLE of negative size": {"size": [-HEIGHT, WIDTH], "counts": [1]},
        "an RLE whose counts are too many": {"size": size, "counts": [HEIGHT * WIDTH, 5]},
        "an RLE whose counts are too few": {"size": size, "counts": [10, 10]},
        "an RLE with a negative count": {"size": size, "counts": [-5, HEIGHT * WIDTH + 5]},
        "an RLE whose counts overflow": {"size": size, "counts": [2**63 - 1, 2**63 - 1, 2]},
        "an RLE whose counts are not whole": {"size": size, "counts": [1.5, 2]},
        "a string whose counts overflow": {"size": size, "counts": "oooooooo0" * 4},
        "a string of other characters": {"size": size, "counts": "\u00e4\u00f6 ~~"},
        "a string that ends in the middle": {"size": size, "counts": "oo"},
        "an object that is no RLE": {"mask": [1, 2]},
        "a list of another size": [[0, 1], [1, 0]],
        "a list with uneven rows": [[0] * WIDTH] * (HEIGHT - 1) + [[0]],
        "an empty row": [[]],
        "a polygon of two points": [[1, 1, 5, 5]],
        "a polygon of an odd number": [[1, 1, 5, 5, 9, 1, 4]],
        "a polygon of text": [["a"] * 6],
        "a PNG of another size": base64.b64encode(png(np.ones((4, 4), dtype=bool))).decode(),
        "a PNG of no size": base64.b64encode(png_by_hand(0, 0, b"")).decode(),
        "no base64": "%%%",
        "base64 of no PNG": base64.b64encode(b"hello there").decode(),
        "a PNG cut short": base64.b64encode(png(small().mask())[:-30]).decode(),
        "a PNG that claims to be huge": base64.b64encode(png_by_hand(40_000, 40_000, b"\0" * 100, kind=0)).decode(),
    }
    for name, mask in wrong.items():
        yield pose(group, name, small().one(detections=columns(small().rle(), mask), init_poses=...))
    items = [{"segmentation": small().rle()}, {"segmentation": "%%%"}]
    yield pose(group, "a broken one in a list", small().one(detections=items, init_poses=...))
    tree = small().one(detections=columns(b"no PNG"), init_poses=...)
    yield pose(group, "bytes that are no PNG, MessagePack", tree, form="msgpack")


def _bodies() -> Iterator[Step]:
    group, tree = "400: bodies", small().one()
    text, packed = msgspec.json.encode(tree), msgspec.msgpack.encode(tree)
    form = "multipart/form-data; boundary=x"
    part = b'--x\r\nContent-Disposition: form-data; name="rgb"\r\n\r\n1\r\n'
    for name, media, body in (
        ("empty", JSON, b""),
        ("empty MessagePack", MSGPACK, b""),
        ("no JSON", JSON, b"hello"),
        ("a list", JSON, b"[]"),
        ("a number", MSGPACK, b"\x05"),
        ("JSON cut short", JSON, text[:-30]),
        ("JSON with something behind it", JSON, text + b"x"),
        ("invalid UTF-8", JSON, b'{"object_id": "\xff\xfe"}'),
        ("very deep JSON", JSON, b'{"detections": ' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
        ("no MessagePack", MSGPACK, b"\xc1\xc1\xc1"),
        ("MessagePack cut short", MSGPACK, packed[:-3]),
        ("no multipart", form, b"hello"),
        ("multipart cut short", form, b'--x\r\nContent-Disposition: form-data; name="request"\r\n\r\n{"a"'),
        ("a part twice", form, part * 2 + b"--x--\r\n"),
        ("a part without a name", form, b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n"),
        ("too many parts", form, part * 20 + b"--x--\r\n"),
        *((word, JSON, f'{{"object_id": "wedge", "min_score": {word}}}'.encode()) for word in ("NaN", "-Infinity")),
    ):
        yield send(group, name, body, media)
    zip_header = {"Content-Encoding": "gzip"}
    yield send(group, "no gzip", b"hello", headers=zip_header)
    yield send(group, "gzip cut short", gzip.compress(text, mtime=0)[:-20], headers=zip_header)
    yield send(group, "something behind the gzip", gzip.compress(text, mtime=0) + b"more", headers=zip_header)
    deep = msgspec.Raw(b"\x91" * 50_000 + b"\x90")
    yield pose(group, "very deep MessagePack", small().one(detections=deep, init_poses=...), form="msgpack")
    for key in ("rgb_image", "depth_image", "cad"):
        broken = msgspec.json.decode(msgspec.json.encode(small().one(objects=..., cad=ply(), cad_format="ply")))
        yield pose(group, f"broken base64 in {key}", broken | {key: "%%% no base64 %%%"})


def _pictures() -> Iterator[Step]:
    group = "400: pictures"

    def flipped(data: bytes, at: int, bit: int = 3) -> bytes:
        broken = bytearray(data)
        broken[at] ^= 1 << bit
        return bytes(broken)

    for key, good in (("rgb_image", small().rgb), ("depth_image", small().depth)):
        for name, data in {
            "empty": b"",
            "text": b"this is no picture",
            "cut short": good[: len(good) // 2],
            "without its end": good[:-12],
            "a bit of its pixels flipped": flipped(good, len(good) // 2),
            "a bit of a checksum flipped": flipped(good, len(good) - 14),
            "a bit of its size flipped": flipped(good, 19),
            "only a signature": good[:8],
        }.items():
            yield pose(group, f"{key}: {name}", small().one(**{key: data}))
    jpeg = written(".jpg", np.ascontiguousarray(small().scene.rgb[..., ::-1]))
    yield pose(group, "half a JPEG", small().one(rgb_image=jpeg[: len(jpeg) // 2]))
    tiff = written(".tiff", small().scene.depth_m)
    yield pose(group, "the beginning of a TIFF", small().one(depth_image=tiff[:200]))
    group = "422: pictures"
    narrow = png(np.ascontiguousarray(small().scene.depth_raw[:, :-1]))
    yield pose(group, "depth and colour of different sizes", small().one(depth_image=narrow))
    eight = (small().scene.depth_m * 100).astype(np.uint8)
    yield pose(group, "depth of 8 bits", small().one(depth_image=png(eight)))
    yield pose(group, "depth in three channels", small().one(depth_image=png(np.dstack([eight] * 3))))
    yield pose(group, "depth as JPEG", small().one(depth_image=written(".jpg", eight)))
    yield pose(group, "colour that is depth", small().one(rgb_image=small().depth))
    group = "413"
    for key, bits, kind in (("rgb_image", 8, 2), ("depth_image", 16, 0)):
        bomb = png_by_hand(30_000, 30_000, b"\0" * 2**20, bits=bits, kind=kind)
        yield pose(group, f"{key} that decodes to too much", small().one(**{key: bomb}))
        long = png_by_hand(2_000_000, 2, b"\0" * 9, bits=bits, kind=kind)
        yield pose(group, f"{key} that is too wide", small().one(**{key: long}))
    yield send(group, "a body over the limit", b" " * (21 * 2**20))
    yield send(group, "a chunked body over the limit", b" " * (21 * 2**20), chunk=2**20)
    packed = gzip.compress(b" " * (64 * 2**20), 6, mtime=0)
    yield send(group, "a gzip bomb", packed, headers={"Content-Encoding": "gzip"})


def _meshes() -> Iterator[Step]:
    group = "400: meshes"
    for name, (cad_format, data) in {
        "no bytes": ("ply", b""),
        "no mesh": ("ply", b"hello"),
        "cut short": ("ply", ply()[:5000]),
        "an index out of range": ("ply", ascii_ply(tetrahedron(), [(0, 1, 9)])),
        "the wrong format": ("stl", ply()),
        "a broken zip": ("zip", b"PK\x03\x04 nothing"),
        "a zip that climbs": ("zip", zipped({"../../part.ply": ply()})),
        "a zip without a mesh": ("zip", zipped({"notes.txt": b"nothing"})),
        "a GLB of another kind": ("glb", b"glTF" + struct.pack("<II", 2, 12)),
        "an OBJ of nonsense": ("obj", b"f 1 2 3\n"),
        "without faces": ("ply", ascii_ply(tetrahedron(), [])),
        "with NaN": ("ply", ascii_ply([[0, 0, 0], [60, 0, 0], [0, 60, 0], ["nan", 0, 60]])),
        "with infinity": ("ply", ascii_ply([[0, 0, 0], [60, 0, 0], [0, 60, 0], ["inf", 0, 60]])),
        "without area": ("ply", ascii_ply([[0, 0, 0], [60, 0, 0], [30, 0, 0], [10, 0, 0]])),
        "too many faces": ("ply", ply().replace(b"element face", b"element face 300000000\ncomment", 1)),
        "an STL of too many": ("stl", b"\0" * 80 + struct.pack("<I", 50_000_000) + b"\0" * 500),
    }.items():
        yield pose(group, f"inline: {name}", small().one(objects=..., cad=data, cad_format=cad_format))
        yield upload(group, f"uploaded: {name}", data, f"part.{cad_format}")


def _paths() -> Iterator[Step]:
    group = "422: paths"
    for path in ("../objects", "/etc/passwd", "a/../../../b.ply", "..", "/", "wedge.ply\0.ply", "//etc/x.ply"):
        yield pose(group, f"cad_path {path!r}", small().one(objects=..., cad_path=path))
        yield pose(group, f"output_dir {path!r}", small().one(output_dir=path))
    yield pose(group, "cad_path from home", small().one(objects=..., cad_path="~/x.ply"))
    yield pose(group, "a path by category", small().one(objects={"wedge": {"cad_path": "../x.ply"}}))
    yield pose(group, "an absolute output_dir", small().one(output_dir="@DATA@/outputs/here"))

    def links(data: Path) -> None:
        outside = data.parent / f"{data.name}-outside"
        outside.mkdir(exist_ok=True)
        (outside / "secret.ply").write_bytes(ply())
        (data / "outputs" / "a-file").write_text("in the way")
        for link, target in (
            *((data / "cad" / "link.ply", outside / "secret.ply"), (data / "cad" / "folder", outside)),
            *((data / "outputs" / "away", outside), (data / "cad" / "loop.ply", data / "cad" / "loop.ply")),
        ):
            link.unlink(missing_ok=True)
            link.symlink_to(target)

    def no_links(data: Path) -> None:
        for link in ("cad/link.ply", "cad/folder", "outputs/away", "cad/loop.ply"):
            (data / link).unlink(missing_ok=True)

    for path in ("link.ply", "folder/secret.ply", "loop.ply"):
        yield pose(group, f"a link out: {path}", small().one(objects=..., cad_path=path), before=links)
    for path in ("away", "away/deeper", "a-file", "a-file/below", "x" * 300):
        yield pose(group, f"output_dir {path[:20]}", small().one(output_dir=path), before=links)
    for path in ("x" * 300 + ".ply", "x/" * 2500, "."):
        yield pose(group, f"cad_path {path[:10]}", small().one(objects=..., cad_path=path), before=no_links)


def _units() -> Iterator[Step]:
    group, K, scale = "422: units", small().K, small().scene.depth_scale_mm
    for factor in (0.001, 1000, 10, 0.1, 25.4):
        camera = {"cam_K": K, "depth_scale": scale * factor}
        yield pose(group, f"depth x {factor}", small().every(cam_params=camera))
    told = {"cam_K": K, "depth_scale": scale / 1000, "depth_unit": "m"}
    yield pose(group, "metres that are told", small().every(cam_params=told))
    tree = small().one(objects=..., cad=ply(unit="m"), cad_format="ply", init_poses=...)
    yield pose(group, "a model in metres", tree)
    yield pose(group, "a model in inches", tree | {"cad": ascii_ply(tetrahedron(100 / 25.4))})
    telescope = {"cam_K": [26 * K[0], 0, K[2], 0, 26 * K[4], K[5], 0, 0, 1], "depth_scale": 26 * scale}
    yield pose(group, "merely odd", small().one(cam_params=telescope, init_poses=...))
    yield pose(group, "merely odd, strict", small().one(cam_params=telescope, units="strict"))
    depth = small().scene.depth_raw.copy()
    odd = np.zeros((HEIGHT, WIDTH), dtype=bool)
    odd[200:212, 280:292] = True
    depth[odd] = 15  # 1.5 mm from the camera
    masks = columns(*[small().rle()] * 3, dict(project()[2](odd)))
    starts = [*[small().truth()] * 3, None]
    yield pose(
        group, "one odd mask among good ones", small().one(depth_image=png(depth), detections=masks, init_poses=starts)
    )
