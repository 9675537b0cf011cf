"""Prepare the questions: requests of a chosen mix, encoded once, and the CAD of the objects in them.

The pictures are rendered, so the pose of every object in them is known. pem-server renders them (see `here`).
`read_request` reads a ready request, and needs no pem-server.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from pem.bench import here
from pem.bench.here import Here, Picture
from pem.bench.sample import Format, Question, Truth
from pem.rle import encode_rle
from pem.wire import JSON, MSGPACK

FORMATS: Final[tuple[Format, ...]] = ("msgpack", "json", "multipart")
MOST_MASKS: Final = 1000
_INSTANCES: Final = 6  # objects put on the table of a scene; some may hide others
_BOUNDARY: Final = "pem-bench-0f1e2d3c4b5a69788796a5b4c3d2e1f0"
_TRIES: Final = 20  # seeds without a visible object before giving up


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The mix of requests; each combination of numbers, sizes and formats is asked equally often."""

    masks: tuple[int, ...] = (3,)  # detections of a request; a scene with fewer objects repeats its masks
    sizes: tuple[tuple[int, int], ...] = ((640, 480),)  # width, height of the pictures
    formats: tuple[Format, ...] = ("msgpack",)
    engine: str = "auto"
    deadline_ms: int | None = None  # None: the server's own
    scenes: int = 4  # pictures of each size
    objects: int | None = None  # different CAD models to choose from; None: all 13
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible mix."""
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
    """Questions ready to be sent, and the CAD of their objects."""

    questions: list[Question]
    objects: dict[str, bytes]  # name (bench-..., so that it collides with nobody's) -> PLY file, millimetres


def prepare(mix: Mix) -> Load:
    """Render the scenes of a mix and encode its requests; raise NoServerHere if pem-server is not installed.

    Neighbours in the list differ in everything that the mix varies, so that a client that goes through it meets all.
    """
    lent = here.find()
    names = list(lent.object_names())
    if mix.objects is not None:
        chosen = np.random.default_rng(mix.seed).permutation(len(names))[: mix.objects]
        names = [names[index] for index in sorted(chosen)]
    frames = {size: [_Frame.of(picture) for picture in _pictures(lent, mix, size, names)] for size in mix.sizes}
    questions = [
        frames[size][number].question(mix, masks, format_, size, first=number)
        for number in range(mix.scenes)
        for size, masks, format_ in itertools.product(mix.sizes, mix.masks, mix.formats)
    ]
    used = {truth.object_name for question in questions for truth in question.truths}
    return Load(questions=questions, objects={name: lent.ply(name) for name in names if name in used})


def read_request(path: Path) -> Question:
    """Read a ready request: the body of a pose request, whose format is the file's ending.

    Its poses are unknown. Raises ValueError for another ending, and for a file that cannot be decoded.
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
    unknown = Truth(object_name="", T_cam_obj=None)
    return Question(
        name=f"{path.name}, {_masks(count)}",
        body=body,
        content_type=content_type,
        truths=(unknown,) * count,
        headers={"Accept": content_type},
    )


def _masks_in(tree: Any) -> int:
    """Count the detections of a request in either of their two forms; raise ValueError if it has neither."""
    detections = tree.get("detections") if isinstance(tree, dict) else None
    masks = detections.get("masks") if isinstance(detections, dict) else detections
    if not isinstance(masks, list):
        raise ValueError("the request is no pose request: it has no detections with masks")
    return len(masks)


def _masks(count: int) -> str:
    return f"{count} mask{'' if count == 1 else 's'}"


def _pictures(lent: Here, mix: Mix, size: tuple[int, int], names: list[str]) -> list[Picture]:
    """Render as many pictures as the mix wants, each with at least one visible object."""
    found: list[Picture] = []
    for seed in range(mix.seed, mix.seed + mix.scenes + _TRIES):
        picture = lent.picture(seed, names, count=_INSTANCES, width=size[0], height=size[1])
        if picture.instances:
            found.append(picture)
        if len(found) == mix.scenes:
            return found
    raise ValueError(f"pictures of {size[0]}x{size[1]} are too small to show the objects")


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """A picture with masks that are encoded once, for all the requests about it."""

    picture: Picture
    masks: list[dict[str, Any]]  # RLE of each instance

    @classmethod
    def of(cls, picture: Picture) -> _Frame:
        return cls(picture=picture, masks=[dict(encode_rle(instance.mask)) for instance in picture.instances])

    def question(self, mix: Mix, count: int, format_: Format, size: tuple[int, int], *, first: int) -> Question:
        """Make a request for `count` detections, starting at instance `first` and repeating cyclically."""
        picture = self.picture
        indices = [(first + step) % len(self.masks) for step in range(count)]
        instances = [picture.instances[index] for index in indices]
        names = [instance.name for instance in instances]
        tree: dict[str, Any] = {
            "cam_params": {"cam_K": picture.K.ravel().tolist(), "depth_scale": picture.depth_scale_mm},
            "detections": {"masks": [self.masks[index] for index in indices], "object_ids": names},
            "objects": {name: {"object_id": name} for name in sorted(set(names))},
        }
        if mix.engine != "auto":
            tree["engine"] = mix.engine
        if mix.deadline_ms is not None:
            tree["deadline_ms"] = mix.deadline_ms
        body, content_type = _encode(tree, picture.rgb_png, picture.depth_png, format_)
        return Question(
            name=f"{_masks(count)}, {size[0]}x{size[1]}, {format_}",
            body=body,
            content_type=content_type,
            truths=tuple(
                Truth(object_name=one.name, T_cam_obj=one.T_cam_obj, symmetries=one.symmetries) for one in instances
            ),
            headers={"Accept": MSGPACK if format_ == "msgpack" else JSON},
        )


def _encode(tree: dict[str, Any], rgb: bytes, depth: bytes, format_: Format) -> tuple[bytes, str]:
    """Return (body, content type); pictures are raw in MessagePack, base64 in JSON, files in a form."""
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
