"""Find the symmetries of a sampled surface, and measure poses modulo symmetries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
import torch
from scipy.spatial import cKDTree

from posekit.engine import Float64, Symmetries, UInt8
from posekit.geometry import nearest_rotation, rotation_angle_deg, rotation_from_vector, view_directions

Indices = npt.NDArray[np.intp]

TESTED = 2048  # samples on which a symmetry is judged
FEW = 256  # samples on which a candidate is screened
FIRST_ORDERS = (2, 3, 4, 5, 6)  # fractions of a turn tried about every axis,
ORDERS = tuple(range(2, 25))  # and about the axes that are left
SURE = 0.012  # share of the diameter that 99 % of the surface may be off in a symmetry,
SURE_AT_MOST = 0.035  # and that any of it may be off
TWIN = 0.03  # mean distance, as a share of the diameter, up to which a turned object is confusable
TWIN_DEG = 15.0  # between twins; refinement finds nearer ones
MAX_TWINS = 16
MAX_GROUP = 60


@dataclass(frozen=True, kw_only=True)
class Surface:
    """A sampled surface on which turns are judged. Metres, any frame."""

    points: Float64  # (S, 3)
    normals: Float64  # (S, 3), of either sign
    colours: UInt8 | None  # (S, 3)
    tree: cKDTree  # over `points`
    nearest: Callable[[Float64], Indices]  # (N, 3) -> samples (N,), good to a cell of the field
    diameter: float
    spacing: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """Symmetries in the centred frame: exact ones, and motions that shape alone cannot tell from the identity."""

    symmetries: Symmetries
    twins: Float64  # (T, 4, 4), identity first; includes motions that colour or small features break


def find(surface: Surface) -> Found:
    """Search the turns about the surface's centroid: a symmetry leaves the centroid where it is.

    Exact symmetries preserve shape and, where there are colours, colours.
    """
    judge = _Judge(surface)
    axes = _axes(judge)
    round_axes = _without_parallel([axis for axis in axes if judge.is_round(axis)])
    if len(round_axes) > 1:  # a second axis makes it a ball
        round_axes = list(np.eye(3))
    continuous = [axis for axis in round_axes if all(judge.keeps_colours(_turn(axis, a)) for a in _ROUND_ANGLES)]

    exact = [np.eye(3)]
    confusable: list[tuple[float, Float64]] = []
    for axis in [] if len(round_axes) > 1 else axes:
        turns = [_turn(axis, 2 * np.pi / order) for order in ORDERS]
        means = judge.means(turns)
        usual = float(judge.means([_turn(axis, angle) for angle in _ROUND_ANGLES]).max())
        is_round = any(abs(axis @ other) > 0.99 for other in round_axes)
        for order, R, mean in reversed(list(zip(ORDERS, turns, means, strict=True))):
            # Of neighbouring orders (a gear of 16 teeth, turned by a 17th) keep only the best.
            meant = not is_round and mean < 0.6 * usual and mean < 1.5 * means.min() + 2e-4
            if meant and mean < SURE and judge.is_sure(R) and judge.keeps_colours(R):
                exact = _closed(exact, R, continuous)
            elif mean < TWIN and order in FIRST_ORDERS:
                confusable += [(float(mean), _turn(axis, 2 * np.pi * k / order)) for k in range(1, order)]
        if (is_round and not continuous) or usual < TWIN:
            confusable += [(usual, _turn(axis, 2 * np.pi * k / 12)) for k in range(1, 12)]

    twins: list[Float64] = []
    for _, R in sorted(confusable, key=lambda entry: entry[0]):
        if len(twins) < MAX_TWINS and _is_new(R, [*exact, *twins], continuous, TWIN_DEG):
            twins.append(R)
    return Found(
        symmetries=Symmetries(
            discrete=tuple(judge.about_pivot(R) for R in exact[1:]),
            continuous=tuple((axis, judge.pivot) for axis in continuous),
        ),
        twins=np.stack([np.eye(4), *(judge.about_pivot(R) for R in twins)]),
    )


def moved(symmetries: Symmetries, offset_m: Float64) -> Symmetries:
    """Return the same symmetries in a frame where every point has `offset_m` added."""
    T = np.eye(4)
    T[:3, 3] = offset_m
    T_back = np.eye(4)
    T_back[:3, 3] = -offset_m
    return Symmetries(
        discrete=tuple(T @ S @ T_back for S in symmetries.discrete),
        continuous=tuple((axis, offset + offset_m) for axis, offset in symmetries.continuous),
    )


def pose_difference(T_a: Float64, T_b: Float64, symmetries: Symmetries) -> tuple[float, float]:
    """Return the distance of two poses T_cam_obj modulo symmetries: degrees, and metres between the objects' places.

    Of all symmetric versions of `T_b`, the one nearest in rotation counts.
    """
    best = (np.inf, np.inf)
    for S in _group(symmetries):
        T = T_b @ S
        if not symmetries.continuous:
            best = min(best, (_angle_deg(T_a[:3, :3].T @ T[:3, :3]), float(np.linalg.norm(T_a[:3, 3] - T[:3, 3]))))
            continue
        if len(symmetries.continuous) > 1:  # a ball has no rotation
            offset = np.append(symmetries.continuous[0][1], 1.0)
            best = min(best, (0.0, float(np.linalg.norm(((T_a - T) @ offset)[:3]))))
            continue
        axis, pivot = symmetries.continuous[0]
        unit = axis / np.linalg.norm(axis)
        R = T[:3, :3].T @ T_a[:3, :3]  # turn T about the axis by the angle that brings it nearest to T_a
        sine = unit @ np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]])
        cosine = np.trace(R) - unit @ R @ unit
        turned = T @ _about(_turn(unit, np.arctan2(sine, cosine)), pivot)
        distance = float(np.linalg.norm(T_a[:3, 3] - turned[:3, 3]))
        best = min(best, (_angle_deg(T_a[:3, :3].T @ turned[:3, :3]), distance))
    return best


# ------------------------------------------------------------------------------------------------------- candidates

_ROUND_ANGLES = (0.4, 1.1, 1.7, 1.9, 2.9)  # radians: none is a small fraction of a turn


class _Judge:
    """Measures how well a turn about the centroid maps the surface and its colours onto themselves."""

    def __init__(self, surface: Surface) -> None:
        self.surface = surface
        self.pivot = surface.points.mean(axis=0)
        self.picked = np.arange(TESTED) * len(surface.points) // TESTED
        self.few = np.arange(FEW) * len(surface.points) // FEW
        self.colours = None if surface.colours is None else surface.colours.astype(np.float64) / 255
        if self.colours is not None:
            _, neighbours = surface.tree.query(surface.points[self.picked], k=2)
            step = np.abs(self.colours[self.picked] - self.colours[neighbours[:, 1]]).mean(axis=1)
            self.colour_step = float(step.mean())

    def about_pivot(self, R: Float64) -> Float64:
        return _about(R, self.pivot)

    def means(self, turns: list[Float64]) -> Float64:
        """Return the approximate mean distance of the turned surface to itself, as a share of the diameter: (T,)."""
        few = self.surface.points[self.few] - self.pivot
        turned = np.einsum("tij,nj->tni", np.asarray(turns), few) + self.pivot
        distance = self._distances(turned.reshape(-1, 3), self.surface.nearest(turned.reshape(-1, 3)))
        return np.asarray(np.minimum(distance, 0.15).reshape(len(turns), FEW).mean(axis=1))

    def is_sure(self, R: Float64) -> bool:
        """Return True if the turned surface lies on itself, up to sampling."""
        turned, nearest = self._matched(R)
        distance = self._distances(turned, nearest)
        return bool(np.quantile(distance, 0.99) < SURE and distance.max() < SURE_AT_MOST)

    def is_round(self, axis: Float64) -> bool:
        turns = [_turn(axis, angle) for angle in _ROUND_ANGLES]
        return bool(self.means(turns).max() < SURE) and all(self.is_sure(R) for R in turns)

    def keeps_colours(self, R: Float64) -> bool:
        if self.colours is None:
            return True
        _, nearest = self._matched(R)
        change = np.abs(self.colours[self.picked] - self.colours[nearest]).mean(axis=1)
        return bool(change.mean() < 2 * self.colour_step + 0.03 and (change > 0.2).mean() < 0.05 + 2 * self.colour_step)

    def refined(self, R: Float64, steps: int = 6) -> Float64:
        """Return the best-fitting turn near R, found by a few point-to-plane steps about the centroid."""
        surface = self.surface
        for _ in range(steps):
            turned = (surface.points[self.picked[::4]] - self.pivot) @ R.T
            nearest = surface.nearest(turned + self.pivot)
            normal = surface.normals[nearest]
            off = ((turned + self.pivot - surface.points[nearest]) * normal).sum(axis=1)
            near = np.abs(off) < 0.08 * surface.diameter
            J = np.cross(turned, normal)[near]
            H = J.T @ J
            omega = -np.linalg.solve(H + (1e-3 * np.trace(H) + 1e-12) * np.eye(3), J.T @ off[near])
            R = rotation_from_vector(torch.from_numpy(omega)).numpy() @ R
        return np.asarray(nearest_rotation(torch.from_numpy(R)).numpy())

    def _matched(self, R: Float64) -> tuple[Float64, Indices]:
        turned = (self.surface.points[self.picked] - self.pivot) @ R.T + self.pivot
        _, nearest = self.surface.tree.query(turned)
        return turned, nearest

    def _distances(self, turned: Float64, nearest: Indices) -> Float64:
        """Return distances to the surface as shares of the diameter.

        Within a spacing, only the distance off the plane counts.
        """
        away = turned - self.surface.points[nearest]
        off_plane = (away * self.surface.normals[nearest]).sum(axis=1)
        along = np.sqrt(np.maximum((away**2).sum(axis=1) - off_plane**2, 0))
        beyond = np.maximum(along - 1.5 * self.surface.spacing, 0)
        return np.asarray(np.sqrt(off_plane**2 + beyond**2) / self.surface.diameter)


def _axes(judge: _Judge) -> list[Float64]:
    """Find the axes about which a fraction of a turn nearly maps the object onto itself; refined, likeliest first."""
    centred = judge.surface.points - judge.pivot
    _, principal = np.linalg.eigh(centred.T @ centred)
    likely = [*np.eye(3), *principal.T]
    sphere = view_directions(400).numpy()
    tried = np.concatenate([np.asarray(likely), sphere[sphere[:, 2] > 0]])
    turns = [_turn(axis, 2 * np.pi / order) for order, axis in product(FIRST_ORDERS, tried)]
    rough = judge.means(turns)
    kept: list[Float64] = []
    for index in np.argsort(rough, kind="stable"):
        if rough[index] > 2 * TWIN or len(kept) == 30:
            break
        # Neighbouring axes of the spiral are 8 degrees apart: a turn near a better one leads to the same axis.
        if _is_new(turns[index], kept, [], 20.0):
            kept.append(turns[index])
    axes = []
    for R in kept:
        vector = _log(judge.refined(R))
        angle = float(np.linalg.norm(vector))
        if angle < np.radians(10):
            continue
        axis = vector / angle
        close = [np.sign(other @ axis) * other for other in likely if abs(other @ axis) > np.cos(np.radians(3))]
        fits = judge.means([_turn(choice, angle) for choice in [*close, axis]])
        # Prefer an axis of the CAD or of inertia where it is as good.
        axes.append([*close, axis][int(np.flatnonzero(fits <= 1.2 * fits.min() + 5e-4)[0])])
    return _without_parallel([*axes, *likely])


def _closed(group: list[Float64], R: Float64, round_axes: list[Float64]) -> list[Float64]:
    """Return the group generated by `group` and R, ignoring turns about `round_axes`; unchanged past MAX_GROUP."""
    if not _is_new(R, group, round_axes):
        return group
    grown = [*group, R]
    index = 0
    while index < len(grown):
        for S in list(grown):
            for combined in (grown[index] @ S, S @ grown[index]):
                if _is_new(combined, grown, round_axes):
                    grown.append(combined)
        if len(grown) > MAX_GROUP:
            return group
        index += 1
    return grown


def _is_new(R: Float64, known: list[Float64], round_axes: list[Float64], apart_deg: float = 6.0) -> bool:
    """Return True if R differs from all of `known`, ignoring turns about `round_axes`."""
    if len(round_axes) > 1:
        return False
    for other in known:
        if round_axes:
            cosine = float(np.clip((R @ round_axes[0]) @ (other @ round_axes[0]), -1, 1))
            if np.degrees(np.arccos(cosine)) < apart_deg:
                return False
        elif _angle_deg(R.T @ other) < apart_deg:
            return False
    return True


def _without_parallel(axes: list[Float64]) -> list[Float64]:
    kept: list[Float64] = []
    for axis in axes:
        if all(abs(axis @ other) < np.cos(np.radians(10)) for other in kept):
            kept.append(axis)
    return kept


def _group(symmetries: Symmetries) -> list[Float64]:
    return [np.eye(4), *symmetries.discrete]


def _about(R: Float64, pivot: Float64) -> Float64:
    T = np.eye(4)
    T[:3, :3] = R
    T[:3, 3] = pivot - R @ pivot
    return T


def _turn(axis: Float64, angle: float) -> Float64:
    return np.asarray(rotation_from_vector(torch.from_numpy(np.asarray(axis, dtype=np.float64) * angle)).numpy())


def _log(R: Float64) -> Float64:
    """Return the rotation vector of R; accurate near half a turn too."""
    cosine = np.clip((np.trace(R) - 1) / 2, -1, 1)
    angle = np.arccos(cosine)
    skew = np.array([R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]]) / 2
    if angle < np.pi - 0.05:
        length = np.linalg.norm(skew)
        return np.asarray(skew * (angle / max(float(length), 1e-12)))
    outer = (R + R.T) / 2 - cosine * np.eye(3)  # (1 - cos) axis axis^T
    column = outer[:, np.argmax(np.diag(outer))]
    axis = column / np.linalg.norm(column)
    return np.asarray(axis * angle * (1.0 if axis @ skew >= 0 else -1.0))


def _angle_deg(R: Float64) -> float:
    return float(rotation_angle_deg(torch.from_numpy(R), torch.eye(3, dtype=torch.float64)))
