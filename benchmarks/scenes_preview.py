"""Write a contact sheet of synthetic scenes with their true poses drawn over them.

Usage: python -m benchmarks.scenes_preview --out build/scenes.png --scenes 8
"""

from __future__ import annotations

import argparse
import functools
import time
from pathlib import Path

import cv2
import numpy as np

from posekit.engine import UInt8
from posekit.overlay import OverlayItem, draw_overlay
from posekit.scenes import Scene, demo_scene, make_scene, many_detections_scene


def drawn(scene: Scene) -> UInt8:
    """The scene's colour image with every true pose, beside its depth."""
    items = [
        OverlayItem(label=item.shape.name, mesh=item.shape.mesh, T_cam_obj=item.T_cam_obj, score=item.visibility)
        for item in scene.instances
    ]
    picture = draw_overlay(scene.rgb, scene.K, items)
    depth = scene.depth_m
    read = depth > 0
    near, far = np.percentile(depth[read], [1, 97]) if read.any() else (0.0, 1.0)
    grey = (255 * np.clip((depth - near) / max(far - near, 1e-6), 0, 1)).astype(np.uint8)
    colors = cv2.applyColorMap(grey, cv2.COLORMAP_VIRIDIS)[..., ::-1]
    return np.hstack([picture, np.where(read[..., None], colors, 0).astype(np.uint8)])


def main() -> None:
    """Parse the command line, draw, write one PNG and say how long each scene took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="PNG to write")
    parser.add_argument("--scenes", type=int, default=6, help="random scenes besides the demo and the crowded one")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first random scene")
    options = parser.parse_args()

    makers = [("demo", demo_scene), ("crowded", lambda: many_detections_scene(options.seed, 40))]
    seeds = range(options.seed, options.seed + options.scenes)
    makers += [(f"seed {seed}", functools.partial(make_scene, seed)) for seed in seeds]
    tiles = []
    for name, make in makers:
        start = time.perf_counter()
        scene = make()
        made = time.perf_counter()
        tiles.append(drawn(scene))
        overlaid = time.perf_counter()
        times = f"scene {made - start:5.2f} s  overlay {overlaid - made:5.2f} s"
        print(f"{name:10} {len(scene.instances):3} objects  {times}")
    if len(tiles) % 2:
        tiles.append(np.zeros_like(tiles[0]))
    sheet = np.vstack([np.hstack(tiles[index : index + 2]) for index in range(0, len(tiles), 2)])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(options.out), sheet[..., ::-1]):
        raise SystemExit(f"cannot write {options.out}; give a path that ends in .png")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
