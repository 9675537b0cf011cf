"""The data set of the accuracy benchmark: objects, scenes of them, and masks of three qualities; cached on disk.

    python -m benchmarks.accuracy.set --seed 0 --scenes 6 --preview build/scenes.png

This draws a contact sheet, one row per scene: the masks of each quality, the true poses, and the depth.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import uuid
import zipfile
import zlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from benchmarks.accuracy.objects import objects as make_objects
from posekit.engine import Bool, UInt8
from posekit.overlay import OverlayItem, draw_overlay, item_color
from posekit.synthetic.scenes import MaskQuality, Scene, SceneInstance, degrade_mask, make_scene
from posekit.synthetic.shapes import Shape

QUALITIES: tuple[MaskQuality, ...] = ("exact", "noisy", "under")
CANDIDATES = 8  # a scene is chosen from so many arrangements
ROOT = Path(__file__).parents[2]
DEFAULT = ROOT / "data" / "benchmarks"
SOURCES = (
    "benchmarks/accuracy/set.py",
    "benchmarks/accuracy/objects.py",
    "posekit/render.py",
    "posekit/synthetic/scenes.py",
    "posekit/synthetic/shapes.py",
)
LIBRARIES = ("numpy", "scipy", "opencv-python", "open3d")
BROKEN = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)  # raised by a damaged file


@dataclass(frozen=True, kw_only=True)
class AccuracySet:
    """Objects, scenes of them, and every instance's mask in every quality."""

    name: str
    shapes: dict[str, Shape]
    scenes: list[Scene]
    masks: dict[str, list[list[Bool]]]  # quality -> scene -> instance -> (H, W)


def load(seed: int = 0, scenes: int = 40, objects: int = 24, cache: Path | None = DEFAULT) -> AccuracySet:
    """Load the set of a seed: 3 to 6 of `objects` objects in each of `scenes` scenes.

    It is made once and kept under `cache` (None: not kept) as long as everything that determines it stays the same: the
    arguments, the generator's source files and the libraries it uses. A file that cannot be read is made anew.
    """
    shapes = {shape.name: shape for shape in make_objects(seed, objects)}
    name = f"accuracy-{seed}-{scenes}x{objects}"
    path = None if cache is None else cache / f"{name}-{_fingerprint()}.npz"
    if path is not None and path.exists():
        try:
            return _unpacked(name, shapes, path.read_bytes())
        except BROKEN as error:
            print(f"{path.name} cannot be read ({error}); it is made anew", file=sys.stderr)
    made = _made(name, shapes, seed, scenes)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        for outdated in path.parent.glob(f"{name}-*.npz"):
            outdated.unlink(missing_ok=True)
        partial = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
        partial.write_bytes(_packed(made))
        os.replace(partial, path)
    return made


def _fingerprint() -> str:
    digest = hashlib.sha256()
    for source in SOURCES:
        digest.update((ROOT / source).read_bytes())
    digest.update(" ".join(f"{library} {version(library)}" for library in LIBRARIES).encode())
    return digest.hexdigest()[:16]


def _made(name: str, shapes: dict[str, Shape], seed: int, count: int) -> AccuracySet:
    rng = np.random.default_rng([seed, 1])
    uses = dict.fromkeys(shapes, 0)
    scenes = []
    masks: dict[str, list[list[Bool]]] = {quality: [] for quality in QUALITIES}
    for index in range(count):
        rarest_first = sorted(shapes, key=lambda item: (uses[item], rng.random()))
        chosen = rarest_first[: int(rng.integers(3, 7))]
        for item in chosen:
            uses[item] += 1
        scene = _crowded([shapes[item] for item in chosen], rng.integers(2**31, size=CANDIDATES).tolist())
        scenes.append(scene)
        for quality in QUALITIES:
            masks[quality].append(_degraded(scene, quality, [seed, 2, index]))
        print(f"\rmaking {name}: scene {index + 1} of {count}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return AccuracySet(name=name, shapes=shapes, scenes=scenes, masks=masks)


def _crowded(shapes: list[Shape], seeds: list[int]) -> Scene:
    """Return the arrangement in which most objects are partly hidden, judged in small pictures."""

    def occluded(seed: int) -> int:
        small = make_scene(seed, shapes, count=len(shapes), width=320, height=240, noise=False)
        return sum(item.visibility < 0.8 for item in small.instances)

    return make_scene(max(seeds, key=occluded), shapes, count=len(shapes))


def _degraded(scene: Scene, quality: MaskQuality, seed: list[int]) -> list[Bool]:
    exact = [item.mask for item in scene.instances]
    rng = np.random.default_rng(seed)
    return [degrade_mask(mask, quality, rng, exact[:at] + exact[at + 1 :]) for at, mask in enumerate(exact)]


# The cache: one file of plain arrays; the scenes' words and numbers as JSON.


def _packed(made: AccuracySet) -> bytes:
    arrays: dict[str, Any] = {}
    told = []
    for index, scene in enumerate(made.scenes):
        arrays[f"rgb{index}"], arrays[f"depth{index}"] = scene.rgb, scene.depth_raw
        masks = [made.masks[quality][index] for quality in QUALITIES]
        arrays[f"masks{index}"] = np.packbits(np.asarray(masks, dtype=np.bool_), axis=None)
        instances = [
            {"shape": item.shape.name, "T_cam_obj": item.T_cam_obj.tolist(), "visibility": item.visibility}
            for item in scene.instances
        ]
        told.append({"K": scene.K.tolist(), "depth_scale_mm": scene.depth_scale_mm, "instances": instances})
    arrays["told"] = np.frombuffer(json.dumps(told).encode(), dtype=np.uint8)
    data = io.BytesIO()
    np.savez_compressed(data, **arrays)
    return data.getvalue()


def _unpacked(name: str, shapes: dict[str, Shape], data: bytes) -> AccuracySet:
    scenes = []
    masks: dict[str, list[list[Bool]]] = {quality: [] for quality in QUALITIES}
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        for index, told in enumerate(json.loads(arrays["told"].tobytes())):
            rgb = arrays[f"rgb{index}"]
            size = (len(QUALITIES), len(told["instances"]), *rgb.shape[:2])
            bits = np.unpackbits(arrays[f"masks{index}"], count=int(np.prod(size)))
            stacks = bits.reshape(size).astype(np.bool_)
            for quality, stack in zip(QUALITIES, stacks, strict=True):
                masks[quality].append(list(stack))
            instances = [
                SceneInstance(
                    shape=shapes[item["shape"]],
                    T_cam_obj=np.array(item["T_cam_obj"]),
                    mask=mask,
                    visibility=item["visibility"],
                )
                for item, mask in zip(told["instances"], stacks[0], strict=True)
            ]
            scene = Scene(
                rgb=rgb,
                depth_raw=arrays[f"depth{index}"],
                depth_scale_mm=told["depth_scale_mm"],
                K=np.array(told["K"]),
                instances=instances,
            )
            scenes.append(scene)
    return AccuracySet(name=name, shapes=shapes, scenes=scenes, masks=masks)


# Previews.


def contact_sheet(made: AccuracySet) -> UInt8:
    """Draw one row per scene: the masks of each quality as outlines, the true poses, and the depth."""
    rows = []
    for index, scene in enumerate(made.scenes):
        tiles = [_outlined(scene.rgb, made.masks[quality][index]) for quality in QUALITIES]
        items = [
            OverlayItem(label=item.shape.name, mesh=item.shape.mesh, T_cam_obj=item.T_cam_obj, score=item.visibility)
            for item in scene.instances
        ]
        rows.append(np.hstack([*tiles, draw_overlay(scene.rgb, scene.K, items), _depth_colors(scene)]))
    return np.vstack(rows)


def _outlined(rgb: UInt8, masks: list[Bool]) -> UInt8:
    picture = rgb.copy()
    for index, mask in enumerate(masks):
        outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(picture, outlines, -1, item_color(index), 1)
    return picture


def _depth_colors(scene: Scene) -> UInt8:
    read = scene.depth_raw > 0
    near, far = np.percentile(scene.depth_raw[read], [1, 97]) if read.any() else (0.0, 1.0)
    grey = (255 * np.clip((scene.depth_raw - near) / max(far - near, 1e-6), 0, 1)).astype(np.uint8)
    colors = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return np.where(read[..., None], colors, 0).astype(np.uint8)


def main() -> None:
    """Parse the command line, make or load the set, report what is in it, and draw the sheet if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=40)
    parser.add_argument("--objects", type=int, default=24)
    parser.add_argument("--preview", type=Path, metavar="FILE", help="picture to draw the scenes into")
    options = parser.parse_args()

    made = load(options.seed, options.scenes, options.objects)
    occlusion = np.array([1 - item.visibility for scene in made.scenes for item in scene.instances])
    shares = np.histogram(occlusion, [0, 0.05, 0.2, 0.4, 0.7])[0] / len(occlusion)
    print(f"{made.name}: {len(made.shapes)} objects, {len(made.scenes)} scenes, {len(occlusion)} instances")
    for label, share in zip(("under 5", "5 to 20", "20 to 40", "40 to 70"), shares, strict=True):
        print(f"{label:>9} % occluded: {100 * share:3.0f} % of the instances")
    if options.preview:
        options.preview.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(options.preview), contact_sheet(made)[..., ::-1]):
            raise SystemExit(f"cannot write {options.preview}; give a path that ends in .png")
        print(f"wrote {options.preview}")


if __name__ == "__main__":
    main()
