"""What is asked: requests of a chosen mix, encoded once, and the CAD of the objects in them.

The pictures are rendered, so the pose of everything in them is known. Rendering needs the server extra; `read_request`
takes a request that is there already, and needs nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from pem.bench.sample import Format, Question, Truth
from pem.rle import encode_rle
from pem.wire import JSON, MSGPACK
from posekit.engine import Symmetries

if TYPE_CHECKING:  # at run time OpenCV comes with it, which the base install leaves out
    from posekit.synthetic.scenes import Scene

FORMATS: Final[tuple[Format, ...]] = ("msgpack", "json", "multipart")
MOST_MASKS: Final = 1000
_INSTANCES: Final = 6  # put on the table of a scene; some of them may hide others
_BOUNDARY: Final = "pem-bench-0f1e2d3c4b5a69788796a5b4c3d2e1f0"
_TRIES: Final = 20  # seeds that may show nothing before this gives up


@dataclass(frozen=True, kw_only=True)
class Mix:
    """What to ask; of several numbers, sizes and formats each combination is asked equally often."""

    masks: tuple[int, ...] = (3,)  # detections of a request; a scene with fewer objects sends its masks repeatedly
    sizes: tuple[tuple[int, int], ...] = ((640, 480),)  # width, height of the pictures
    formats: tuple[Format, ...] = ("msgpack",)
    engine: str = "auto"
    deadline_ms: int | None = None  # None: the server's own
    scenes: int = 4  # pictures of each size
    objects: int | None = None  # different CAD models to choose from; None: all that there are (13)
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError for what cannot be asked."""
        if not (self.masks and self.sizes and self.formats and self.scenes > 0):
            raise ValueError("a mix needs at least one number of masks, one size, one format and one scene")
        if not all(0 < count <= MOST_MASKS for count in self.masks):
            raise ValueError(f"masks of a request must be 1 to {MOST_MASKS}, not {', '.join(map(str, self.masks))}")
        if not all(64 <= side <= 8192 for size in self.sizes for side in size):
            raise ValueError("pictures must be 64 to 8192 pixels wide and high")
        if unknown := set(self.formats) - set(FORMATS):
            raise ValueError(f"no format {', '.join(sorted(unknown))}; there are {', '.join(FORMATS)}")
        if self.objects is not None and self.objects < 1:
            raise ValueError("a mix needs at least one object")


@dataclass(frozen=True, kw_only=True)
class Load:
    """Questions ready to be sent, and the CAD that the server has to know for them."""

    questions: list[Question]
    objects: dict[str, bytes]  # name (bench-..., so that it is nobody else's) -> PLY file, millimetres


def prepare(mix: Mix) -> Load:
    """Render the scenes of a mix and encode its requests; ImportError without the server extra.

    Neighbours in the list differ in everything that the mix varies, so that a client that goes through it meets all.
    """
    from posekit.synthetic.shapes import SHAPES, mesh_to_ply

    shapes = [replace(shape, name=f"bench-{shape.name}") for shape in (make() for make in SHAPES.values())]
    if mix.objects is not None:
        chosen = np.random.default_rng(mix.seed).permutation(len(shapes))[: mix.objects]
        shapes = [shapes[index] for index in sorted(chosen)]
    pictures = {size: [_Picture.of(scene) for scene in _scenes(mix, size, shapes)] for size in mix.sizes}
    questions = [
        pictures[size][number].question(mix, masks, format_, first=number)
        for number in range(mix.scenes)
        for size, masks, format_ in itertools.product(mix.sizes, mix.masks, mix.formats)
    ]
    used = {truth.object_name for question in questions for truth in question.truths}
    objects = {shape.name: mesh_to_ply(shape.mesh) for shape in shapes if shape.name in used}
    return Load(questions=questions, objects=objects)


def read_request(path: Path) -> Question:
    """A request that is there already: the body of a pose request, its kind by the file's ending.

    Nothing is known of its poses. ValueError for another ending, and for a file that does not decode.
    """
    kinds: dict[str, tuple[str, Callable[[bytes], Any]]] = {
        ".json": (JSON, msgspec.json.decode),
        ".msgpack": (MSGPACK, msgspec.msgpack.decode),
    }
    if path.suffix.lower() not in kinds:
        raise ValueError(f"a request is a .json or a .msgpack file, not {path.name}")
    content_type, decode = kinds[path.suffix.lower()]
    body = path.read_bytes()
    try:
        tree = decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not decode: {error}") from None
    count = _masks_in(tree)
    unknown = Truth(object_name="", T_cam_obj=None, symmetries=Symmetries())
    return Question(
        name=f"{path.name}, {_masks(count)}",
        body=body,
        content_type=content_type,
        truths=(unknown,) * count,
        headers={"Accept": content_type},
    )


def _masks_in(tree: Any) -> int:
    """How many detections a request has, in either of their two forms; ValueError where it has none of the two."""
    detections = tree.get("detections") if isinstance(tree, dict) else None
    masks = detections.get("masks") if isinstance(detections, dict) else detections
    if not isinstance(masks, list):
        raise ValueError("the request is no pose request: it has no detections with masks")
    return len(masks)


def _masks(count: int) -> str:
    return f"{count} mask{'' if count == 1 else 's'}"


def _scenes(mix: Mix, size: tuple[int, int], shapes: list[Any]) -> list[Scene]:
    """As many scenes as the mix wants, each with something to see; objects stand apart, so that poses are certain."""
    from posekit.synthetic.scenes import make_scene

    found: list[Scene] = []
    for seed in range(mix.seed, mix.seed + mix.scenes + _TRIES):
        scene = make_scene(seed, shapes, count=_INSTANCES, width=size[0], height=size[1], occlusion=False)
        if scene.instances:
            found.append(scene)
        if len(found) == mix.scenes:
            return found
    raise ValueError(f"pictures of {size[0]}x{size[1]} are too small to show the objects")


@dataclass(frozen=True, kw_only=True)
class _Picture:
    """A scene whose pictures and masks were encoded once, for all the requests about it."""

    scene: Scene
    rgb: bytes  # PNG
    depth: bytes  # PNG
    masks: list[dict[str, Any]]  # RLE of each instance

    @classmethod
    def of(cls, scene: Scene) -> _Picture:
        from posekit.io.images import encode_png

        masks = [dict(encode_rle(instance.mask)) for instance in scene.instances]
        return cls(scene=scene, rgb=encode_png(scene.rgb), depth=encode_png(scene.depth_raw), masks=masks)

    def question(self, mix: Mix, count: int, format_: Format, *, first: int) -> Question:
        """A request for `count` detections, from instance `first` on, around and around."""
        indices = [(first + step) % len(self.masks) for step in range(count)]
        instances = [self.scene.instances[index] for index in indices]
        names = [instance.shape.name for instance in instances]
        tree: dict[str, Any] = {
            "cam_params": {"cam_K": self.scene.K.ravel().tolist(), "depth_scale": self.scene.depth_scale_mm},
            "detections": {"masks": [self.masks[index] for index in indices], "object_ids": names},
            "objects": {name: {"object_id": name} for name in sorted(set(names))},
        }
        if mix.engine != "auto":
            tree["engine"] = mix.engine
        if mix.deadline_ms is not None:
            tree["deadline_ms"] = mix.deadline_ms
        height, width = self.scene.rgb.shape[:2]
        body, content_type = _encode(tree, self.rgb, self.depth, format_)
        return Question(
            name=f"{_masks(count)}, {width}x{height}, {format_}",
            body=body,
            content_type=content_type,
            truths=tuple(
                Truth(object_name=one.shape.name, T_cam_obj=one.T_cam_obj, symmetries=one.shape.symmetries)
                for one in instances
            ),
            headers={"Accept": MSGPACK if format_ == "msgpack" else JSON},
        )


def _encode(tree: dict[str, Any], rgb: bytes, depth: bytes, format_: Format) -> tuple[bytes, str]:
    """(body, content type); pictures are raw in MessagePack, base64 in JSON, files in a form."""
    if format_ == "multipart":
        parts = {
            'name="rgb"; filename="rgb.png"': rgb,
            'name="depth"; filename="depth.png"': depth,
            'name="request"': msgspec.json.encode(tree),
        }
        pieces = [
            f"--{_BOUNDARY}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + content + b"\r\n"
            for head, content in parts.items()
        ]
        return b"".join(pieces) + f"--{_BOUNDARY}--\r\n".encode(), f"multipart/form-data; boundary={_BOUNDARY}"
    whole = {"rgb_image": rgb, "depth_image": depth, **tree}
    if format_ == "json":
        return msgspec.json.encode(whole), JSON
    return msgspec.msgpack.encode(whole), MSGPACK
