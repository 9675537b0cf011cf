"""Compare the network, stage by stage, with numbers of the original.

    python -m benchmarks.network.parity FILE.npz [--salt TEXT] [--setting exact|fast|both] [--device cuda]
        [--weights FILE]

FILE has the form of `golden.npz` in `../shared/sam6d`: inputs, and the original's results with generated weights. Every
stage is computed from the inputs, and compared if the file stores its result. A table shows the largest difference,
the tolerance and the verdict. Exit code 1 after any failure.

`exact` is held to the tolerances that the original's own rounding suggests (its float32 against its float64). `fast` is
held to the same, and its poses to 0.1 degrees and 0.1 mm of those of `exact`. If the file also stores a stage in
float64, the nearer of the two counts: the original's float32 can choose another nearest neighbour than its own float64.
A hint is no failure: it depends on single draws from a nearly flat distribution.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.network import generated_weights
from pem.bench.report import Table, write_json
from posekit.geometry import rotation_angle_deg
from posekit.sam6d.network.coarse import Pose, Tokens
from posekit.sam6d.network.features import normalize
from posekit.sam6d.network.fine import start_at
from posekit.sam6d.network.whole import Cloud, Model, Network, Scene, take
from posekit.sam6d.quick.cpu import FastNetwork
from posekit.sam6d.quick.gpu import GpuNetwork, keep_float32

Array = npt.NDArray[Any]

DEGREES_EXACT, RADII_EXACT = 1e-3, 2e-5  # limits of the pose cases
DEGREES_FAST, MM_FAST = 0.1, 0.1
SIGMA = 0.03  # of the pose cases' logits, in radii, if the file does not say


class Check(NamedTuple):
    """One line of the table."""

    stage: str
    error: float
    tolerance: float
    hint: bool = False  # a difference here is no failure
    unit: str = ""

    @property
    def verdict(self) -> str:
        """Return the verdict in one word."""
        if self.error <= self.tolerance:
            return "pass"
        return "hint" if self.hint else "FAIL"


class Golden:
    """The file of reference numbers: arrays by name, some of them slices of the original's."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        """`device`: where to put the tensors."""
        self.device = device
        self._arrays = np.load(path, allow_pickle=False)
        self.meta = json.loads(str(self._arrays["meta_json"]))

    def __contains__(self, name: str) -> bool:
        return name in self._arrays.files

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self._arrays[name])

    def tensor(self, name: str) -> Tensor:
        """Return an array as a tensor; indices as int64."""
        array = self[name]
        return torch.from_numpy(array.astype(np.int64) if array.dtype == np.int32 else array).to(self.device)

    def cases(self, kind: str) -> list[str]:
        """Return the names of the pose cases: "coarse" -> ["coarseA", "coarseB"]."""
        return sorted(name[:-2] for name in self._arrays.files if re.fullmatch(rf"{kind}[A-Z]+_R", name))

    def error(self, name: str, full: Tensor) -> float:
        """Return the largest difference to the stored numbers, float32 or float64, whichever are nearer."""
        slices = _slices(self.meta["stats"].get(name, {}).get("slice", "full"))
        mine = full.double().cpu().numpy()[slices]
        errors = [_largest(mine, self[name])]
        if f"{name}_f64" in self:
            reference = self[f"{name}_f64"]
            errors.append(_largest(mine if mine.shape == reference.shape else mine[:, ::2, ::2], reference))
        return min(errors)


def _slices(text: str) -> tuple[slice, ...]:
    """Parse the slices that a file names, "(slice(None, None, 14), ...)" or "full"."""
    numbers = r"(None|-?\d+)"
    found = re.findall(rf"slice\({numbers}, {numbers}, {numbers}\)", text)
    return tuple(slice(*(None if part == "None" else int(part) for part in parts)) for parts in found)


def _largest(mine: Array, reference: Array) -> float:
    if mine.shape != reference.shape:
        raise SystemExit(f"a stage has the shape {mine.shape}, the file holds {reference.shape}")
    return float(np.abs(mine - reference.astype(np.float64)).max())


# ----------------------------------------------------------------------------------------------------------- the stages


class Posed(NamedTuple):
    """The poses of one pose case."""

    case: str
    R: Tensor  # (B, 3, 3)
    t: Tensor  # (B, 3), in radii
    score: Tensor | None  # (B,)
    radius_m: Tensor  # (B,)


def features(network: Network, golden: Golden) -> Iterator[Check]:
    """Check the image network and the features that points take from it."""
    net = network.feature_extraction.rgb_net
    scene = _scene(golden)
    taken = net.vit(normalize(scene.rgb))
    for index, tokens in enumerate(taken):
        yield Check(f"vit_out{index}", golden.error(f"vit_out{index}", tokens), 5e-5)
    yield Check("cls", golden.error("cls", taken[-1][:, 0]), 5e-5)
    cells = net.cells(torch.cat([tokens[:, 1:] for tokens in taken], dim=-1))
    yield Check("fmap", golden.error("fmap", net.pixels(cells)), 5e-5)
    yield Check("dense_fm", golden.error("dense_fm", network.features(scene.rgb, scene.choose)), 5e-5)


def objects(network: Network, golden: Golden) -> tuple[Tensor, Tensor]:
    """Return the stored data of the templates: points (B, 2048, 3) in metres and their features (B, 2048, C)."""
    points, kept = [], []
    for rgb, choose, xyz in zip(*(golden.tensor(f"in_tem_{name}") for name in ("rgb", "choose", "pts")), strict=True):
        picked = network.pick(xyz.flatten(0, 1))
        points.append(xyz.flatten(0, 1)[picked])
        kept.append(network.features_of_views(rgb, choose, picked))
    return torch.stack(points), torch.stack(kept)


def matching(network: Network, golden: Golden) -> Iterator[Check]:
    """Check everything from points and features to the pose."""
    points_m, of_points = objects(network, golden)
    yield Check("dense_po_raw", golden.error("dense_po_raw", points_m), 0.0, unit="m")
    yield Check("dense_fo", golden.error("dense_fo", of_points), 5e-5)
    model = network.model(network.describe(points_m, of_points, golden.tensor("in_model")))
    kept = model.description
    cloud = network.look(_scene(golden), kept.radius_m)
    yield Check("radius", golden.error("radius", kept.radius_m), 1e-6, unit="m")
    yield Check("dense_pm", golden.error("dense_pm", cloud.points), 1e-5)
    yield Check("dense_po", golden.error("dense_po", kept.points), 1e-6)
    yield Check("sparse_pm", golden.error("sparse_pm", cloud.sparse_points), 1e-5)
    yield Check("sparse_po", golden.error("sparse_po", model.sparse_points), 1e-6)
    yield from _structures(
        "geo_m", golden, network.geo_embedding.values(cloud.structure), off_diagonal=1e-3, diagonal=5e-2
    )
    yield from _structures(
        "geo_o", golden, network.geo_embedding.values(model.structure), off_diagonal=5e-3, diagonal=5e-3
    )

    coarse = network.coarse_point_matching
    first = Tokens(
        coarse.look_at_itself(coarse.tokens(take(cloud.features, cloud.sparse)), cloud.structure), kept.coarse
    )
    for index, tokens in enumerate(coarse.blocks(first, cloud.structure, model.structure)):
        yield Check(f"coarse_f1_{index}", golden.error(f"coarse_f1_{index}", tokens.scene), 3e-3)
        yield Check(f"coarse_f2_{index}", golden.error(f"coarse_f2_{index}", tokens.model), 5e-4)
    logits = network.match_coarsely(cloud, model)
    yield Check("coarse_atten", golden.error("coarse_atten", logits), 2e-3)
    uniforms = golden.tensor("e2e_u")
    start = network.coarse_pose(logits, cloud.sparse_points, model.sparse_points, kept.surface, uniforms)
    yield Check("e2e_init_R", golden.error("e2e_init_R", start.R), 1e-4, hint=True)
    yield Check("e2e_init_t", golden.error("e2e_init_t", start.t), 1e-4, hint=True)

    fixed = Pose(golden.tensor("fix_init_R"), golden.tensor("fix_init_t"))
    placed = start_at(cloud.points, fixed)
    yield Check("pe1", golden.error("pe1", network.position_encoding(placed)), 1e-4)
    yield Check("pe2", golden.error("pe2", network.position_encoding(kept.points)), 1e-4)
    yield from _fine_blocks(network, golden, cloud, model, placed)
    logits = network.match_finely(cloud, model, fixed)
    yield Check("fine_atten", golden.error("fine_atten", logits), 2e-4)
    pose = network.fine_pose(logits, cloud.points, kept.points, kept.surface)
    metres = pose.t * (kept.radius_m[:, None] + 1e-6)
    yield Check("fine_pred_R", golden.error("fine_pred_R", pose.R), 1e-4)
    yield Check("fine_pred_t", golden.error("fine_pred_t", metres), 1e-5, unit="m")
    yield Check("fine_score", golden.error("fine_score", pose.score), 2 / 2048)

    poses = network(_scene(golden), model)
    yield Check("e2e_pred_R", golden.error("e2e_pred_R", poses.R_cam_obj), 1e-4, hint=True)
    yield Check("e2e_pred_t", golden.error("e2e_pred_t", poses.t_cam_obj_m), 1e-5, hint=True, unit="m")
    yield Check("e2e_score", golden.error("e2e_score", poses.score), 2 / 2048, hint=True)


def _fine_blocks(network: Network, golden: Golden, cloud: Cloud, model: Model, placed: Tensor) -> Iterator[Check]:
    fine = network.fine_point_matching
    scene = fine.tokens(cloud.features, network.position_encoding(placed))
    first = Tokens(fine.look_at_itself(scene, cloud.sparse, cloud.structure), model.description.fine_first)
    both = Tokens(scene, model.description.fine)
    steps = fine.blocks(both, first, cloud.sparse, model.description.sparse, cloud.structure, model.structure)
    for index, tokens in enumerate(steps):
        yield Check(f"fine_f1_{index}", golden.error(f"fine_f1_{index}", tokens.scene), 2e-4)
        yield Check(f"fine_f2_{index}", golden.error(f"fine_f2_{index}", tokens.model), 2e-4)


def _structures(name: str, golden: Golden, mine: Tensor, *, off_diagonal: float, diagonal: float) -> Iterator[Check]:
    """Check the structure of pairs, its diagonal separately: there the original is a difference of large numbers."""
    mine = mine.cpu()
    apart = ~torch.eye(mine.shape[1], dtype=torch.bool)[None, :, :, None]
    slices = _slices(golden.meta["stats"][name]["slice"])
    stored = [torch.from_numpy(golden[key]) for key in (name, f"{name}_f64") if key in golden]
    for part, where, tolerance in (("", apart, off_diagonal), (" diagonal", ~apart, diagonal)):
        here = where.expand_as(mine)[slices]
        error = min(float((mine[slices] - reference).abs()[here].max()) for reference in stored)
        yield Check(f"{name}{part}", error, tolerance)
    if f"{name}_bgrow" in golden:
        error = _largest(mine[:, 0, ::7, ::4].double().numpy(), golden[f"{name}_bgrow"])
        yield Check(f"{name} background", error, off_diagonal if name == "geo_o" else diagonal)


def pose_cases(network: Network, golden: Golden) -> Iterator[Posed]:
    """Compute poses from constructed logits."""
    surface, radius_m = golden.tensor("model_n"), golden.tensor("radius")
    for case in golden.cases("coarse"):
        pose = network.coarse_pose(
            golden.tensor(f"{case}_atten"),
            golden.tensor(f"{case}_pts1"),
            golden.tensor(f"{case}_pts2"),
            surface,
            golden.tensor(f"{case}_u"),
        )
        yield Posed(case, pose.R, pose.t, None, radius_m)
    for case in golden.cases("fine"):
        scene = golden.tensor(f"{case}_pts1" if f"{case}_pts1" in golden else "dense_pm")
        model = golden.tensor(f"{case}_pts2" if f"{case}_pts2" in golden else "dense_po")
        logits = golden.tensor(f"{case}_atten") if f"{case}_atten" in golden else _rebuilt(golden, case, scene, model)
        scored = network.fine_pose(logits, scene, model, surface)
        yield Posed(case, scored.R, scored.t, scored.score, radius_m)


def _rebuilt(golden: Golden, case: str, scene: Tensor, model: Tensor) -> Tensor:
    """Rebuild logits too large to store from the true pose and a seed, as the file's author made them."""
    make = generated_weights.module("cases").atten_from_gt
    sigma = float(golden.meta["stats"].get(case, {}).get("sigma", SIGMA))
    truth = zip(golden[f"{case}_gt_R"], golden[f"{case}_gt_t"], golden[f"{case}_seeds"], strict=True)
    made = [
        torch.from_numpy(make(scene[b].cpu().numpy(), model[b].cpu().numpy(), R, t, int(seed), sigma))
        for b, (R, t, seed) in enumerate(truth)
    ]
    logits = torch.stack(made)
    sample = golden[f"{case}_atten_sub"]
    if _largest(logits[:, ::40, ::40].double().numpy(), sample) > 1e-4:
        raise SystemExit(f"{case}: the logits cannot be rebuilt as the file has them; is cases.py of the same making?")
    return logits.to(golden.device)


def against_file(posed: Posed, golden: Golden) -> Iterator[Check]:
    """Compare a pose case with the original's poses."""
    angle = rotation_angle_deg(posed.R.double(), golden.tensor(f"{posed.case}_R").double())
    yield Check(f"{posed.case} R", float(angle.max()), DEGREES_EXACT, unit="deg")
    yield Check(f"{posed.case} t", golden.error(f"{posed.case}_t", posed.t), RADII_EXACT, unit="radii")
    if posed.score is not None:
        yield Check(f"{posed.case} score", golden.error(f"{posed.case}_score", posed.score), 1 / 2048)


def against_exact(fast: Posed, exact: Posed) -> Iterator[Check]:
    """Compare a pose case of the fast setting with the exact one's."""
    angle = rotation_angle_deg(fast.R.double(), exact.R.double())
    apart_mm = (fast.t - exact.t).norm(dim=-1) * exact.radius_m * 1000
    yield Check(f"{fast.case} R", float(angle.max()), DEGREES_FAST, unit="deg")
    yield Check(f"{fast.case} t", float(apart_mm.max()), MM_FAST, unit="mm")
    if fast.score is not None and exact.score is not None:
        yield Check(f"{fast.case} score", float((fast.score - exact.score).abs().max()), 2 / 2048)


def _scene(golden: Golden) -> Scene:
    return Scene(*(golden.tensor(name) for name in ("in_rgb", "in_pts", "in_rgb_choose", "e2e_u")))


# ------------------------------------------------------------------------------------------------------------- the run


def compare(golden: Golden, exact: Network, fast: Network | None) -> dict[str, list[Check]]:
    """Return setting -> its checks; `fast` None = exact alone."""
    checks: dict[str, list[Check]] = {}
    poses = list(pose_cases(exact, golden))
    of_exact = [*features(exact, golden), *matching(exact, golden)]
    checks["exact"] = of_exact + [check for posed in poses for check in against_file(posed, golden)]
    if fast is not None:
        of_fast = [*features(fast, golden), *matching(fast, golden)]
        pairs = zip(pose_cases(fast, golden), poses, strict=True)
        checks["fast"] = of_fast + [check for pair in pairs for check in against_exact(*pair)]
    return checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.npz", help="such as ../shared/sam6d/golden.npz")
    parser.add_argument("--salt", help="of the generated weights (default: the file's own)")
    parser.add_argument("--weights", type=Path, help="a safetensors file instead of generated weights")
    parser.add_argument("--setting", choices=("exact", "fast", "both"), default="both")
    parser.add_argument("--device", default="cpu", help="where both compute; on a GPU fast is the network of gpu.py")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", help="write the figures to this file as well; - is standard output")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    begun = time.perf_counter()
    golden = Golden(arguments.file, arguments.device)
    salt = str(golden.meta.get("salt", "")) if arguments.salt is None else arguments.salt
    exact = Network()
    exact.load_state_dict(load_file(arguments.weights) if arguments.weights else generated_weights.state_dict(salt))
    keep_float32()
    kind = FastNetwork if arguments.device == "cpu" else GpuNetwork
    fast = None if arguments.setting == "exact" else kind.of(exact).to(arguments.device)
    exact.to(arguments.device)
    with torch.inference_mode():
        checks = compare(golden, exact, fast)
    if arguments.setting == "fast":
        del checks["exact"]
    failures = _print(checks)
    print(f"{'FAILED: ' + ', '.join(failures) if failures else 'all stages pass'}; {time.perf_counter() - begun:.0f} s")
    figures = {name: [{**check._asdict(), "verdict": check.verdict} for check in of] for name, of in checks.items()}
    write_json(arguments.json, {"file": arguments.file.name, "salt": salt, "settings": figures})
    sys.exit(1 if failures else 0)


def _print(checks: dict[str, list[Check]]) -> list[str]:
    """Print a table; return what failed."""
    table = Table(["setting", "stage", "max error", "tolerance", "unit", "verdict"])
    for setting, of_setting in checks.items():
        for check in of_setting:
            table.add(setting, check.stage, check.error, check.tolerance, check.unit, check.verdict)
    table.print()
    return [f"{name} {check.stage}" for name, of in checks.items() for check in of if check.verdict == "FAIL"]


if __name__ == "__main__":
    main()
