"""Accuracy and speed of the geometric engine on a few seeded scenes, in seconds: a compass while working on it.

    python -m benchmarks.engine_quick --scenes 20 --masks exact --threads 2

Recall is the share of instances whose largest vertex error, modulo the shape's symmetries, is under a tenth of the
diameter. «Sure» are answers with a confidence over 0.8.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posekit.engine import Bool, Estimate, Float64, Instance, ObjectModel, Symmetries
from posekit.geometric.engine import GeometricEngine
from posekit.geometric.symmetry import pose_difference
from posekit.scenes import Scene, degrade_mask, make_scene
from posekit.shapes import SHAPES

MARGIN = 0.25  # of the mask's box, on every side
ROUND_STEPS = 60  # turns that stand for a continuous symmetry


def main() -> None:
    """Parse the command line, run, print, and write the JSON that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--masks", choices=("exact", "noisy", "under"), default="exact")
    parser.add_argument("--wrong-cad", action="store_true", help="ask for another object than the mask shows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--verbose", action="store_true", help="one line per failure")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, - for standard output")
    options = parser.parse_args()

    engine = GeometricEngine(options.device, options.threads)
    models: dict[str, ObjectModel] = {}
    onboarding = []
    for name, make in SHAPES.items():
        start = time.perf_counter()
        models[name] = engine.onboard(name, make().mesh, None, lambda share: None)
        onboarding.append(time.perf_counter() - start)
        engine.prepare(models[name])

    rows: list[dict[str, Any]] = []
    for seed in range(options.first_seed, options.first_seed + options.scenes):
        rows += run_scene(engine, models, seed, options.masks, options.wrong_cad)
    figures = summary(rows, onboarding)
    if options.verbose:
        for row in rows:
            if not row["right"]:
                print(" ".join(f"{key}={value}" for key, value in row.items()))
    title = f"{options.device}, {options.threads} threads, torch {torch.__version__}, {options.masks} masks"
    print(title + (", wrong CAD" if options.wrong_cad else ""))
    print("\n".join(f"{key:>28} {value}" for key, value in figures.items()))
    if options.json:
        text = json.dumps({"title": title, **figures, "rows": rows})
        if options.json == "-":
            sys.stdout.write(text + "\n")
        else:
            Path(options.json).write_text(text)


def run_scene(
    engine: GeometricEngine, models: dict[str, ObjectModel], seed: int, quality: Any, wrong_cad: bool
) -> list[dict[str, Any]]:
    """One row of measurements per instance of the scene."""
    scene = make_scene(seed)
    rng = np.random.default_rng(seed)
    names = list(models)
    rows = []
    for index, truth in enumerate(scene.instances):
        others = [other.mask for other in scene.instances if other is not truth]
        mask = degrade_mask(truth.mask, quality, rng, others)
        name = truth.shape.name
        if wrong_cad:
            name = names[(names.index(name) + 1 + int(rng.integers(len(names) - 1))) % len(names)]
        instance = cut(scene, mask, name, seed=seed)
        start = time.perf_counter()
        outcome = engine.estimate([instance], models)[0]
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"seed": seed, "index": index, "shape": name, "visible": round(truth.visibility, 2)}
        row["seconds"] = round(seconds, 4)
        if isinstance(outcome, Estimate):
            angle_deg, _ = pose_difference(outcome.T_cam_obj, truth.T_cam_obj, truth.shape.symmetries)
            error_m = mssd_m(outcome.T_cam_obj, truth.T_cam_obj, truth.shape.mesh.vertices_m, truth.shape.symmetries)
            row |= {
                "confidence": round(outcome.confidence, 3),
                "right": not wrong_cad and error_m < 0.1 * models[name].diameter_m,
                "mssd_mm": round(error_m * 1000, 2),
                "angle_deg": round(angle_deg, 2),
                "ambiguous": outcome.ambiguous,
                "inliers": round(outcome.evidence.inlier_fraction, 3),
                "overlap": round(outcome.evidence.visible_overlap, 3),
            }
        else:
            row |= {"confidence": 0.0, "right": False, "code": outcome.code}
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]], onboarding: list[float]) -> dict[str, Any]:
    """Figures over all instances; errors over the right ones."""
    right = [row for row in rows if row["right"]]
    sure = [row for row in rows if row["confidence"] > 0.8]
    return {
        "instances": len(rows),
        "recall": round(len(right) / max(len(rows), 1), 4),
        "median error, mm (MSSD)": _median([row["mssd_mm"] for row in right]),
        "median angle, deg": _median([row["angle_deg"] for row in right]),
        "sure": round(len(sure) / max(len(rows), 1), 4),
        "right among the sure": round(sum(row["right"] for row in sure) / max(len(sure), 1), 4),
        "ambiguous": sum(bool(row.get("ambiguous")) for row in rows),
        "rejected": sum("code" in row for row in rows),
        "median seconds an instance": _median([row["seconds"] for row in rows]),
        "slowest onboarding, s": round(max(onboarding), 2),
        "median onboarding, s": _median(onboarding),
    }


def cut(scene: Scene, mask: Bool, object_id: str, seed: int = 0) -> Instance:
    """The crop of a mask (H, W) with its margin, as the decode stage makes it."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    pad = int(MARGIN * max(rows[-1] - rows[0], columns[-1] - columns[0])) + 4
    top, left = max(rows[0] - pad, 0), max(columns[0] - pad, 0)
    window = (slice(top, rows[-1] + pad + 1), slice(left, columns[-1] + pad + 1))
    K = scene.K.copy()
    K[0, 2] -= left
    K[1, 2] -= top
    return Instance(
        object_id=object_id, rgb=scene.rgb[window], depth_m=scene.depth_m[window], mask=mask[window], K=K, seed=seed
    )


def mssd_m(T_est: Float64, T_gt: Float64, vertices_m: Any, symmetries: Symmetries) -> float:
    """Maximum symmetry-aware surface distance in metres: of the symmetric readings of the truth, the nearest counts."""
    vertices = np.asarray(vertices_m, dtype=np.float64)[:: max(1, len(vertices_m) // 1000)]
    estimated = vertices @ T_est[:3, :3].T + T_est[:3, 3]
    best = np.inf
    for S in _readings(symmetries):
        T = T_gt @ S
        best = min(best, float(np.linalg.norm(vertices @ T[:3, :3].T + T[:3, 3] - estimated, axis=1).max()))
    return best


def _readings(symmetries: Symmetries) -> list[Float64]:
    readings = [np.eye(4), *symmetries.discrete]
    for axis, offset in symmetries.continuous:
        x, y, z = axis / np.linalg.norm(axis)
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        turns = []
        for angle in np.arange(ROUND_STEPS) * (2 * np.pi / ROUND_STEPS):
            T = np.eye(4)
            T[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
            T[:3, 3] = offset - T[:3, :3] @ offset
            turns.append(T)
        readings = [S @ T for S in readings for T in turns]
    return readings


def _median(values: list[float]) -> float:
    return round(float(np.median(values)), 4) if values else float("nan")


if __name__ == "__main__":
    main()
