"""SAM-6D's pose estimation network (Lin et al., CVPR 2024), inference only, in the reference's arithmetic.

`describe` computes from an object's points and features all that depends on the object alone. `forward` computes poses
from scenes and such descriptions. quick/cpu.py holds the same network with its costly parts rewritten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import pointnet2_ext
from posekit.sam6d.network.attention import FocusedAttention, RelativeAttention
from posekit.sam6d.network.coarse import CoarseMatching, Pose, Tokens, coarse_pose
from posekit.sam6d.network.config import Config
from posekit.sam6d.network.features import FeatureExtraction, normalize
from posekit.sam6d.network.fine import FineMatching, PositionEncoding, ScoredPose, fine_pose, start_at
from posekit.sam6d.network.structure import GeometricStructureEmbedding


class Scene(NamedTuple):
    """The camera's view of each instance of a batch."""

    rgb: Tensor  # (B, 224, 224, 3) uint8, masked, BGR
    points_m: Tensor  # (B, 2048, 3), camera frame
    choose: Tensor  # (B, 2048), flat pixel of each point
    uniforms: Tensor  # (B, 3 * proposals) in [0, 1): random numbers for the voting


class Description(NamedTuple):
    """The stored description of an object, independent of any scene. Lengths are in radii, except `radius_m`."""

    radius_m: Tensor  # (B,)
    points: Tensor  # (B, 2048, 3)
    surface: Tensor  # (B, 1024, 3)
    sparse: Tensor  # (B, 196), indices of the sparse points among `points`
    coarse: Tensor  # (B, 197, C), sparse tokens of the coarse matching after self-attention
    fine: Tensor  # (B, 2049, C), tokens of the fine matching
    fine_first: Tensor  # (B, 197, C), sparse tokens of the fine matching after self-attention


class Model(NamedTuple):
    """A description, and the structure, which is faster computed from it than read from disk."""

    description: Description
    structure: Tensor  # (B, 197, 197, C)

    @property
    def sparse_points(self) -> Tensor:
        """Return the sparse points, (B, 196, 3)."""
        return take(self.description.points, self.description.sparse)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.description, self.structure))


def together(models: Sequence[Model]) -> Model:
    """Join single models into one batch. A single model is not copied."""
    if len(models) == 1:
        return models[0]
    descriptions = zip(*(model.description for model in models), strict=True)
    return Model(
        Description(*(torch.cat(values) for values in descriptions)), torch.cat([model.structure for model in models])
    )


class Cloud(NamedTuple):
    """A scene's points in radii, and the few that the coarse matching uses."""

    points: Tensor  # (B, 2048, 3)
    features: Tensor  # (B, 2048, C)
    sparse: Tensor  # (B, 196), indices of the sparse points
    structure: Tensor  # (B, 197, 197, C)

    @property
    def sparse_points(self) -> Tensor:
        """Return the sparse points, (B, 196, 3)."""
        return take(self.points, self.sparse)


class Poses(NamedTuple):
    """The network's answer for a batch."""

    R_cam_obj: Tensor  # (B, 3, 3)
    t_cam_obj_m: Tensor  # (B, 3)
    score: Tensor  # (B,), 0 to 1


class Parts(NamedTuple):
    """The classes of parts that quick/cpu.py replaces."""

    features: type[FeatureExtraction] = FeatureExtraction
    structure: type[GeometricStructureEmbedding] = GeometricStructureEmbedding
    relative: type[RelativeAttention] = RelativeAttention
    focused: type[FocusedAttention] = FocusedAttention
    position_encoding: type[PositionEncoding] = PositionEncoding


class Network(nn.Module):
    """The whole network; its state dict has the released checkpoint's names and shapes."""

    parts = Parts()

    def __init__(self, config: Config | None = None) -> None:
        super().__init__()
        self.config = config or Config()
        features, structure, relative, focused, position_encoding = self.parts
        self.feature_extraction = features(self.config)
        self.geo_embedding = structure(self.config)
        self.coarse_point_matching = CoarseMatching(self.config, relative)
        self.fine_point_matching = FineMatching(self.config, relative, focused, position_encoding)
        self.eval().requires_grad_(False)

    # ------------------------------------------------------------------------------------------------ stages, in order

    def features(self, rgb: Tensor, choose: Tensor) -> Tensor:
        """Return image features of points: (B, 224, 224, 3) uint8 BGR, (B, N) -> (B, N, C)."""
        out: Tensor = self.feature_extraction(normalize(rgb), choose)
        return out

    def pick(self, points_m: Tensor) -> Tensor:
        """Pick the points of all views that an object keeps, in furthest-point order: (P, 3) -> (2048,)."""
        return furthest(points_m[None], self.config.fine_points)[0]

    def features_of_views(
        self, rgb: Tensor, choose: Tensor, picked: Tensor, progress: Callable[[float], None] = lambda _: None
    ) -> Tensor:
        """Return features of the kept points, computed view by view.

        rgb: (V, 224, 224, 3) uint8 BGR; choose: (V, P); picked: (N,) indices into V * P -> (N, C).
        """
        of_view, chosen = picked // choose.shape[1], choose.flatten()[picked]
        out = rgb.new_empty((len(picked), self.config.channels), dtype=torch.float32)
        for view in range(len(rgb)):
            here = of_view == view
            if here.any():
                out[here] = self.features(rgb[view : view + 1], chosen[None, here])[0].float()
            progress((view + 1) / len(rgb))
        return out

    def structure(self, sparse_points: Tensor) -> Tensor:
        """Embed pairs of points, with the background in front: (B, n, 3) -> (B, 1 + n, 1 + n, C)."""
        background = torch.full_like(sparse_points[:, :1], self.config.background)
        out: Tensor = self.geo_embedding(torch.cat((background, sparse_points), dim=1))
        return out

    def thin(self, points: Tensor) -> Tensor:
        """Pick the points that the coarse matching uses: (B, N, 3) -> (B, 196)."""
        return furthest(points, self.config.coarse_points)

    def coarse_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor, uniforms: Tensor) -> Pose:
        """Vote for a pose.

        logits: (B, 1 + N, 1 + M); scene: (B, N, 3); model: (B, M, 3); surface: (B, S, 3); uniforms: (B, 3 H).
        """
        return coarse_pose(logits, scene, model, surface, uniforms, self.config.kept)

    def position_encoding(self, points: Tensor) -> Tensor:
        """Encode positions: (B, N, 3) in the object's frame -> (B, N, C)."""
        out: Tensor = self.fine_point_matching.PE(points)
        return out

    def fine_pose(self, logits: Tensor, scene: Tensor, model: Tensor, surface: Tensor) -> ScoredPose:
        """Compute the final pose: logits (B, 1 + N, 1 + M), scene (B, N, 3), model (B, M, 3), surface (B, S, 3)."""
        return fine_pose(logits, scene, model, surface, self.config.score_distance)

    # --------------------------------------------------------------------------------------------------- the two verbs

    def describe(self, points_m: Tensor, features: Tensor, surface_m: Tensor) -> Description:
        """Compute all that depends on the object alone.

        points_m: (B, 2048, 3) in the CAD's frame, in furthest-point order; features: (B, 2048, C); surface_m: (B, 1024,
        3).
        """
        radius_m = points_m.norm(dim=-1).amax(dim=1)
        points = in_radii(points_m, radius_m)
        sparse = self.thin(points)
        structure = self.structure(take(points, sparse))
        coarse, fine = self.coarse_point_matching, self.fine_point_matching
        tokens = fine.tokens(features, self.position_encoding(points))
        return Description(
            radius_m=radius_m,
            points=points,
            surface=in_radii(surface_m, radius_m),
            sparse=sparse,
            coarse=coarse.look_at_itself(coarse.tokens(take(features, sparse)), structure),
            fine=tokens,
            fine_first=fine.look_at_itself(tokens, sparse, structure),
        )

    def model(self, description: Description) -> Model:
        """Add the structure: 40 MB an object, computed in less time than reading it would take."""
        return Model(description, self.structure(take(description.points, description.sparse)))

    def look(self, scene: Scene, radius_m: Tensor) -> Cloud:
        """Compute the points, features and structure of a scene."""
        points = in_radii(scene.points_m, radius_m)
        sparse = self.thin(points)
        return Cloud(points, self.features(scene.rgb, scene.choose), sparse, self.structure(take(points, sparse)))

    def match_coarsely(self, cloud: Cloud, model: Model) -> Tensor:
        """Return the logits of the sparse points, (B, 197, 197)."""
        coarse = self.coarse_point_matching
        scene = coarse.look_at_itself(coarse.tokens(take(cloud.features, cloud.sparse)), cloud.structure)
        *_, last = coarse.blocks(Tokens(scene, model.description.coarse), cloud.structure, model.structure)
        return coarse.logits(last)

    def match_finely(self, cloud: Cloud, model: Model, start: Pose) -> Tensor:
        """Return the logits of all points, (B, 2049, 2049)."""
        fine = self.fine_point_matching
        scene = fine.tokens(cloud.features, self.position_encoding(start_at(cloud.points, start)))
        first = Tokens(fine.look_at_itself(scene, cloud.sparse, cloud.structure), model.description.fine_first)
        *_, last = fine.blocks(
            Tokens(scene, model.description.fine),
            first,
            cloud.sparse,
            model.description.sparse,
            cloud.structure,
            model.structure,
        )
        return fine.logits(last)

    def forward(self, scene: Scene, model: Model) -> Poses:
        """Estimate poses of a batch of instances. Row i of `model` is the model of instance i."""
        kept = model.description
        cloud = self.look(scene, kept.radius_m)
        logits = self.match_coarsely(cloud, model)
        start = self.coarse_pose(logits, cloud.sparse_points, model.sparse_points, kept.surface, scene.uniforms)
        logits = self.match_finely(cloud, model, start)
        pose = self.fine_pose(logits, cloud.points, kept.points, kept.surface)
        return Poses(pose.R, pose.t * (kept.radius_m[:, None] + 1e-6), pose.score)


def furthest(points: Tensor, count: int) -> Tensor:
    """Furthest-point sampling that breaks ties like the original's GPU kernel: (B, N, 3) -> (B, count).

    Templates keep their coordinates in 16 bits, so ties are common. Each thread of the kernel owns every T-th point.
    Its tournament prefers the thread whose number, read backwards in bits, is smaller, and then the lower index. Once
    the points are sorted in that order, our operator's rule (lowest index) gives the same answer.
    """
    order = _tournament(points.shape[1], points.device)
    return order[pointnet2_ext.furthest_point_sample(points[:, order], count)]


def _tournament(count: int, device: torch.device) -> Tensor:
    """Return the order of preference of `count` points, (count,); point 0 comes first."""
    bits = min(count.bit_length() - 1, 9)  # at most 512 threads
    thread = torch.arange(count, device=device) % (1 << bits)
    backwards = sum((((thread >> bit) & 1) << (bits - 1 - bit) for bit in range(bits)), torch.zeros_like(thread))
    return backwards.argsort(stable=True)


def in_radii(points_m: Tensor, radius_m: Tensor) -> Tensor:
    """Convert metres to radii: (B, N, 3), (B,) -> (B, N, 3)."""
    return points_m / (radius_m[:, None, None] + 1e-6)


def take(values: Tensor, index: Tensor) -> Tensor:
    """Take rows by index: (B, N, C), (B, n) -> (B, n, C)."""
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[-1]))
