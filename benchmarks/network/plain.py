"""SAM-6D's pose estimation network (Lin et al., CVPR 2024) as its figure reads, for our engine's speed to be compared.

Eager torch, float32, all instances in one batch. Everything is computed for every instance, also what depends on the
object alone, and every tensor in full: the features of all pixels, the projections of all pairs of points, the
distances of all kept hypotheses. Nothing is slower than its plain formula needs, nothing is rearranged to be faster.
Of the two point operators the torch reference is called (pointnet2_ext.reference), timed as stages of their own.

Functions take the weights as a mapping with the checkpoint's names. Lengths are in object radii where no unit is said.
Shapes: B instances, N points of the scene, M of the object, C = 256 channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from pointnet2_ext import reference
from posekit.sam6d.network.config import Config

CONFIG = Config()
TINY_RADIUS = 1e-6  # added to a radius before dividing by it

Weights = Mapping[str, Tensor]


class Stages:
    """Seconds of wall time and of the process's CPUs by stage; a stage entered again adds up.

    A stage inside another has its seconds for itself: the outer one's are without them, and all add up to the whole.
    """

    def __init__(self, cpu_clock: Callable[[], float] = time.process_time) -> None:
        self.wall_s: dict[str, float] = {}
        self.cpu_s: dict[str, float] = {}
        self._cpu_clock = cpu_clock
        self._open: list[str] = []
        self._since = (0.0, 0.0)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        self._book_open()
        self._open.append(name)
        try:
            yield
        finally:
            self._book_open()
            self._open.pop()

    def move(self, inner: Stages, wall_share: float) -> None:
        """Give to the stages of `inner` what it measured inside the stage that is open now.

        `wall_share`: how much of its wall time passed here; 1 / n where n such ran at once.
        """
        self._book_open()
        for name in inner.wall_s:
            wall_s, cpu_s = inner.wall_s[name] * wall_share, inner.cpu_s[name]
            self._book(name, wall_s, cpu_s)
            self._book(self._open[-1], -wall_s, -cpu_s)

    def _book_open(self) -> None:
        """Give the time since the last change to the innermost stage."""
        now = (time.perf_counter(), self._cpu_clock())
        if self._open:
            self._book(self._open[-1], now[0] - self._since[0], now[1] - self._since[1])
        self._since = now

    def _book(self, name: str, wall_s: float, cpu_s: float) -> None:
        self.wall_s[name] = self.wall_s.get(name, 0.0) + wall_s
        self.cpu_s[name] = self.cpu_s.get(name, 0.0) + cpu_s


class Inputs(NamedTuple):
    """What one pass is given; all instances have the same shapes."""

    rgb: Tensor  # (B, 3, 224, 224) normalised
    points_m: Tensor  # (B, N, 3) in the camera's frame
    choose: Tensor  # (B, N) int64, each point's pixel in the flattened picture
    model_m: Tensor  # (B, 1024, 3) points of the CAD's surface
    object_points_m: Tensor  # (B, M, 3) in the CAD's frame, from its views
    object_features: Tensor  # (B, M, C), from its views
    uniforms: Tensor  # (B, 18000) in [0, 1): the draws of the coarse matching


class Poses(NamedTuple):
    """x_cam = R x_obj + t, and how sure the network is (0..1)."""

    R: Tensor  # (B, 3, 3)
    t_m: Tensor  # (B, 3)
    score: Tensor  # (B,)


@torch.inference_mode()
def estimate(w: Weights, inputs: Inputs, stages: Stages) -> Poses:
    """One pose per instance."""
    with stages("image features"):
        scene_features = pixel_features(feature_map(w, inputs.rgb), inputs.choose)
    radius = inputs.object_points_m.norm(dim=2).amax(1).view(-1, 1, 1) + TINY_RADIUS
    scene, obj = inputs.points_m / radius, inputs.object_points_m / radius
    model = inputs.model_m / radius

    with stages("furthest-point sampling"):
        scene_index = furthest_points(scene, CONFIG.coarse_points)
        obj_index = furthest_points(obj, CONFIG.coarse_points)
    sparse_scene, sparse_obj = rows(scene, scene_index), rows(obj, obj_index)
    with stages("geometry embedding, scene"):
        scene_geometry = geometry_embedding(w, with_background_point(sparse_scene))
    with stages("geometry embedding, object"):
        obj_geometry = geometry_embedding(w, with_background_point(sparse_obj))

    with stages("coarse matching"):
        logits = coarse_matching(
            w,
            rows(scene_features, scene_index),
            rows(inputs.object_features, obj_index),
            scene_geometry,
            obj_geometry,
        )
    with stages("coarse pose"):
        R, t = coarse_pose(logits, sparse_scene, sparse_obj, model, inputs.uniforms)

    with stages("position encoding, scene"):
        scene_positions = position_encoding(w, (scene - t.unsqueeze(1)) @ R, stages)
    with stages("position encoding, object"):
        obj_positions = position_encoding(w, obj, stages)
    with stages("fine matching"):
        logits = fine_matching(
            w,
            linear(w, "fine_point_matching.in_proj", scene_features) + scene_positions,
            linear(w, "fine_point_matching.in_proj", inputs.object_features) + obj_positions,
            scene_geometry,
            obj_geometry,
            scene_index,
            obj_index,
        )
    with stages("fine pose"):
        R, t, score = fine_pose(logits, scene, obj, model)
    return Poses(R, t * radius.squeeze(2), score)


# Image features.


def feature_map(w: Weights, rgb: Tensor) -> Tensor:
    """(B, 3, 224, 224) normalised to (B, C, 224, 224): a feature of every pixel."""
    pyramid = torch.cat([tokens[:, 1:] for tokens in vision_transformer(w, rgb)], 2)  # (B, 196, 4 * 768)
    side, up = CONFIG.patches, CONFIG.upscaling
    cells = linear(w, "feature_extraction.rgb_net.output_upscaling", pyramid)
    cells = cells.view(-1, side, side, up, up, CONFIG.channels).permute(0, 5, 1, 3, 2, 4)
    cells = cells.reshape(-1, CONFIG.channels, side * up, side * up)  # (B, C, 56, 56)
    return functional.interpolate(cells, (CONFIG.image_px, CONFIG.image_px), mode="bilinear", align_corners=False)


def pixel_features(fmap: Tensor, choose: Tensor) -> Tensor:
    """The features (B, N, C) of the pixels `choose` (B, N)."""
    return rows(fmap.flatten(2).transpose(1, 2), choose)


def vision_transformer(w: Weights, rgb: Tensor) -> list[Tensor]:
    """The normalised tokens (B, 197, 768) after each of the taken blocks, the class token first."""
    vit = "feature_extraction.rgb_net.vit"
    patches = functional.conv2d(
        rgb, w[f"{vit}.patch_embed.proj.weight"], w[f"{vit}.patch_embed.proj.bias"], stride=CONFIG.patch_px
    )
    x = torch.cat([w[f"{vit}.cls_token"].expand(len(rgb), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    x = x + w[f"{vit}.pos_embed"]
    taken = []
    for block in range(CONFIG.depth):
        name = f"{vit}.blocks.{block}"
        x = x + image_attention(w, f"{name}.attn", norm(w, f"{name}.norm1", x, eps=1e-6))
        hidden = functional.gelu(linear(w, f"{name}.mlp.fc1", norm(w, f"{name}.norm2", x, eps=1e-6)))
        x = x + linear(w, f"{name}.mlp.fc2", hidden)
        if block in CONFIG.taken_blocks:
            taken.append(norm(w, f"{vit}.norm", x, eps=1e-6))
    return taken


def image_attention(w: Weights, name: str, x: Tensor) -> Tensor:
    """Multi-head self-attention of the image's tokens."""
    qkv = linear(w, f"{name}.qkv", x).unflatten(2, (3, CONFIG.image_heads, -1))  # (B, 197, 3, heads, 64)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return linear(w, f"{name}.proj", merged(functional.scaled_dot_product_attention(q, k, v)))


# Geometric structure embedding (Qin et al., GeoTransformer, CVPR 2022).


def geometry_embedding(w: Weights, points: Tensor) -> Tensor:
    """What each pair of points looks like from anywhere: its distance, and its angles with the nearest neighbours.

    points: (B, S, 3). Returns (B, S, S, C).
    """
    distances = pairwise_distance(points, points)  # (B, S, S)
    nearest = distances.topk(CONFIG.neighbours + 1, dim=2, largest=False).indices[:, :, 1:]  # without the point itself
    to_nearest = rows(points, nearest.flatten(1)).unflatten(1, nearest.shape[1:]) - points.unsqueeze(2)
    to_others = points.unsqueeze(1) - points.unsqueeze(2)  # (B, S, S, 3)
    shape = (*distances.shape, CONFIG.neighbours, 3)
    a, b = to_nearest.unsqueeze(2).expand(shape), to_others.unsqueeze(3).expand(shape)
    angles = torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))  # (B, S, S, neighbours)

    div_term = w["geo_embedding.embedding.div_term"]
    by_distance = linear(w, "geo_embedding.proj_d", waves(distances / CONFIG.sigma_d, div_term))
    angle_index = angles * (180.0 / (CONFIG.sigma_a_deg * math.pi))
    by_angle = linear(w, "geo_embedding.proj_a", waves(angle_index, div_term)).amax(3)
    return by_distance + by_angle


def waves(x: Tensor, div_term: Tensor) -> Tensor:
    """(...) to (..., C): sine and cosine of each frequency, side by side."""
    phase = x.unsqueeze(-1) * div_term
    return torch.stack([phase.sin(), phase.cos()], -1).flatten(-2)


def with_background_point(points: Tensor) -> Tensor:
    """(B, S, 3) to (B, 1 + S, 3), the point that stands for the background first."""
    return torch.cat([torch.full_like(points[:, :1], CONFIG.background), points], 1)


# Transformer layers. The names are those of the checkpoint.


def geometric_layer(w: Weights, name: str, x: Tensor, geometry: Tensor) -> Tensor:
    """Self-attention that sees each pair's geometry. x: (B, S, C); geometry: (B, S, S, C)."""
    attention = f"{name}.attention.attention"
    q, k, v = (split(linear(w, f"{attention}.proj_{part}", x)) for part in "qkv")  # (B, heads, S, 64)
    p = linear(w, f"{attention}.proj_p", geometry).unflatten(3, (CONFIG.heads, -1)).permute(0, 3, 1, 2, 4)
    about_pairs = torch.einsum("bhnc,bhnmc->bhnm", q, p)
    scores = (q @ k.mT + about_pairs) / math.sqrt(q.shape[-1])
    return after_attention(w, name, x, merged(scores.softmax(-1) @ v))


def cross_layer(w: Weights, name: str, x: Tensor, memory: Tensor) -> Tensor:
    """Attention of x (B, S, C) to the other side's features (B, T, C)."""
    attention = f"{name}.attention.attention"
    q = split(linear(w, f"{attention}.proj_q", x))
    k, v = (split(linear(w, f"{attention}.proj_{part}", memory)) for part in "kv")
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return after_attention(w, name, x, merged(scores.softmax(-1) @ v))


def linear_layer(w: Weights, name: str, x: Tensor, memory: Tensor) -> Tensor:
    """Focused linear attention (Han et al., FLatten, ICCV 2023) of x (B, N, C) to memory (B, S, C)."""
    attention = f"{name}.attention.attention"
    scale = functional.softplus(w[f"{attention}.scale"])
    q = split(focused(linear(w, f"{attention}.proj_q", x), scale))
    k = split(focused(linear(w, f"{attention}.proj_k", memory), scale))
    v = split(linear(w, f"{attention}.proj_v", memory))
    total = q @ k.sum(2).unsqueeze(3)  # (B, heads, N, 1)
    return after_attention(w, name, x, merged(q @ (k.mT @ v) / (total + 1e-6)))


def focused(x: Tensor, scale: Tensor) -> Tensor:
    """(B, N, C) made positive and sharper, its length kept."""
    x = (x.relu() + 1e-6) / scale
    sharp = x**CONFIG.focusing
    out: Tensor = sharp / sharp.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)
    return out


def after_attention(w: Weights, name: str, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of a layer: projection and feed-forward, each added and then normalised."""
    x = norm(w, f"{name}.attention.norm", x + linear(w, f"{name}.attention.linear", attended))
    hidden = linear(w, f"{name}.output.expand", x).relu()
    return norm(w, f"{name}.output.norm", x + linear(w, f"{name}.output.squeeze", hidden))


def geometric_block(
    w: Weights, name: str, scene: Tensor, obj: Tensor, scene_geometry: Tensor, obj_geometry: Tensor
) -> tuple[Tensor, Tensor]:
    """Self-attention on both sides, then the scene attends to the object and the object to what the scene became."""
    scene = geometric_layer(w, f"{name}.layers.0", scene, scene_geometry)
    obj = geometric_layer(w, f"{name}.layers.0", obj, obj_geometry)
    scene = cross_layer(w, f"{name}.layers.1", scene, obj)
    obj = cross_layer(w, f"{name}.layers.1", obj, scene)
    return scene, obj


def similarity(w: Weights, name: str, scene: Tensor, obj: Tensor) -> Tensor:
    """Logits (B, 1 + N, 1 + M) of every match, the background first: cosines over the temperature."""
    scene, obj = (functional.normalize(linear(w, f"{name}.out_proj", side), dim=2) for side in (scene, obj))
    return scene @ obj.mT / CONFIG.temperature


# Coarse matching.


def coarse_matching(w: Weights, scene: Tensor, obj: Tensor, scene_geometry: Tensor, obj_geometry: Tensor) -> Tensor:
    """Logits (B, 197, 197) from the sparse points' features (B, 196, C) and both sides' geometry."""
    name = "coarse_point_matching"
    scene = with_background_token(w, name, linear(w, f"{name}.in_proj", scene))
    obj = with_background_token(w, name, linear(w, f"{name}.in_proj", obj))
    for block in range(CONFIG.blocks):
        scene, obj = geometric_block(w, f"{name}.transformers.{block}", scene, obj, scene_geometry, obj_geometry)
    return similarity(w, name, scene, obj)


def coarse_pose(logits: Tensor, scene: Tensor, obj: Tensor, model: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The hypothesis, out of 6000 drawn triples of matches, that lays the scene's points closest to the model.

    logits: (B, 197, 197); scene, obj: (B, 196, 3); model: (B, 1024, 3). Returns R (B, 3, 3) and t (B, 3).
    """
    matches, seen = assignment(logits)
    cumulated = (matches.flatten(1) ** 1.5).cumsum(1)
    cumulated = cumulated / (cumulated[:, -1:] + 1e-8)
    drawn = torch.searchsorted(cumulated, uniforms)  # (B, 3 * 6000)
    count = obj.shape[1]
    shape = (CONFIG.proposals, 3)
    p_scene = rows(scene, (drawn // count).clamp(max=scene.shape[1] - 1)).unflatten(1, shape)  # (B, 6000, 3, 3)
    p_obj = rows(obj, drawn % count).unflatten(1, shape)
    R, t = weighted_procrustes(p_obj, p_scene, torch.ones_like(p_obj[..., 0]))
    residuals = ((p_scene - t.unsqueeze(2)) @ R - p_obj).norm(dim=3).mean(2)  # (B, 6000)
    kept = residuals.topk(CONFIG.kept, dim=1, largest=False).indices
    R, t = rows(R.flatten(2), kept).unflatten(2, (3, 3)), rows(t, kept)  # (B, 300, ...)

    posed = (scene.unsqueeze(1) - t.unsqueeze(2)) @ R  # (B, 300, 196, 3)
    away = pairwise_distance(posed, model.unsqueeze(1)).amin(3)
    scores = seen.sum(1, keepdim=True) / ((away * seen.unsqueeze(1)).sum(2) + 1e-8)
    best = scores.argmax(1, keepdim=True)
    return rows(R.flatten(2), best).view(-1, 3, 3), rows(t, best).squeeze(1)


# Fine matching.


def position_encoding(w: Weights, points: Tensor, stages: Stages) -> Tensor:
    """What each of the points (B, N, 3) has around it in two radii, as features (B, N, C)."""
    name = "fine_point_matching.PE"
    scales = []
    for mlp, radius, samples in zip(("mlp1", "mlp2"), CONFIG.position_radii, CONFIG.position_samples, strict=True):
        with stages("ball query"):
            index = reference.ball_query(points, points, radius, samples)  # (B, N, samples)
        around = rows(points, index.flatten(1)).unflatten(1, index.shape[1:])
        x = torch.cat([around - points.unsqueeze(2), around], 3).permute(0, 3, 1, 2)  # (B, 6, N, samples)
        for layer in range(3):
            x = functional.conv2d(x, w[f"{name}.{mlp}.layer{layer}.conv.weight"])
            x = batch_norm(w, f"{name}.{mlp}.layer{layer}.normlayer.bn", x).relu()
        scales.append(x.amax(3))
    encoded = functional.conv1d(torch.cat(scales, 1), w[f"{name}.mlp3.conv.weight"], w[f"{name}.mlp3.conv.bias"])
    return encoded.transpose(1, 2)


def fine_matching(
    w: Weights,
    scene: Tensor,
    obj: Tensor,
    scene_geometry: Tensor,
    obj_geometry: Tensor,
    scene_index: Tensor,
    obj_index: Tensor,
) -> Tensor:
    """Logits (B, 1 + N, 1 + M) from the features (B, N, C) and (B, M, C) of all points, projected and placed.

    The indices (B, 196) say which points the geometry embeddings (B, 197, 197, C) are about.
    """
    name = "fine_point_matching"
    scene, obj = with_background_token(w, name, scene), with_background_token(w, name, obj)
    for block in range(CONFIG.blocks):
        transformer = f"{name}.transformers.{block}"
        sparse_scene, sparse_obj = geometric_block(
            w,
            f"{transformer}.sparse_layer",
            sparse_tokens(scene, scene_index),
            sparse_tokens(obj, obj_index),
            scene_geometry,
            obj_geometry,
        )
        scene = spread(w, f"{transformer}.dense_layer", scene, sparse_scene)
        obj = spread(w, f"{transformer}.dense_layer", obj, sparse_obj)
    return similarity(w, name, scene, obj)


def sparse_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Of the tokens (B, 1 + N, C) the background's and those at `index` (B, 196).

    The index counts points, the tokens start with the background: each point is represented by the token of the one
    before it. The released weights were trained so.
    """
    return torch.cat([x[:, :1], rows(x, index)], 1)


def spread(w: Weights, name: str, x: Tensor, sparse: Tensor) -> Tensor:
    """All points (B, 1 + N, C) read the sparse ones (B, 197, C), whose background token replaces theirs."""
    return torch.cat([sparse[:, :1], linear_layer(w, name, x[:, 1:], sparse[:, 1:])], 1)


def fine_pose(logits: Tensor, scene: Tensor, obj: Tensor, model: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pose that fits the soft matches best, and its score.

    logits: (B, 1 + N, 1 + M); scene: (B, N, 3); obj: (B, M, 3); model: (B, 1024, 3).
    Returns R (B, 3, 3), t (B, 3) and the score (B,): the share of points that are no background, times the share of
    those that lie near the model.
    """
    matches, seen = assignment(logits)
    weights = matches.sum(2)
    R, t = weighted_procrustes(matches / (weights.unsqueeze(2) + 1e-6) @ obj, scene, weights)
    away = pairwise_distance((scene - t.unsqueeze(1)) @ R, model).amin(2)
    near = (away < CONFIG.score_distance) * seen
    return R, t, near.sum(1) / (seen.sum(1) + 1e-8) * seen.mean(1)


# Parts.


def assignment(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Soft matches (B, N, M) between points that are no background, and which of the scene's are not (B, N; 0 or 1).

    logits: (B, 1 + N, 1 + M), the background first.
    """
    matches = logits.softmax(2) * logits.softmax(1)
    scene_seen = (matches[:, 1:, :].argmax(2) > 0).float()
    obj_seen = (matches[:, :, 1:].argmax(1) > 0).float()
    return matches[:, 1:, 1:] * scene_seen.unsqueeze(2) * obj_seen.unsqueeze(1), scene_seen


def weighted_procrustes(source: Tensor, target: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """R (..., 3, 3) and t (..., 3) that lay the source onto the target: target = R source + t.

    source, target: (..., N, 3); weights: (..., N).
    """
    weights = (weights / (weights.sum(-1, keepdim=True) + 1e-5)).unsqueeze(-1)
    source_center = (source * weights).sum(-2, keepdim=True)
    target_center = (target * weights).sum(-2, keepdim=True)
    U, _, Vh = torch.linalg.svd((source - source_center).mT @ (weights * (target - target_center)))
    V, Ut = Vh.mT, U.mT
    turn = torch.ones_like(V[..., 0])
    turn[..., 2] = torch.linalg.det(V @ Ut).sign()
    R = V @ turn.diag_embed() @ Ut
    return R, (target_center.mT - R @ source_center.mT).squeeze(-1)


def furthest_points(points: Tensor, count: int) -> Tensor:
    """Furthest-point sampling with the original's choice among ties; (B, N, 3) to (B, count).

    Its 512 threads each take every 512th point, and among equals the thread with the smallest bit-reversed number wins.
    Points drawn twice tie, and which of them is picked shows in `sparse_tokens`.
    """
    n = points.shape[1]
    bits = min(n.bit_length() - 1, 9)
    index = torch.arange(n)
    thread, turn = index % (1 << bits), index >> bits
    reversed_thread = sum((thread >> bit & 1) << (bits - 1 - bit) for bit in range(bits))
    order = (reversed_thread * n + turn).argsort()
    return order[reference.furthest_point_sample(points[:, order], count)]


def pairwise_distance(a: Tensor, b: Tensor) -> Tensor:
    """(..., N, 3) and (..., M, 3) to (..., N, M), through one matrix product."""
    squared = a.square().sum(-1).unsqueeze(-1) - 2 * a @ b.mT + b.square().sum(-1).unsqueeze(-2)
    return squared.clamp(min=0).sqrt()


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Of x (B, N, D) the rows `index` (B, K): (B, K, D)."""
    return x.gather(1, index.unsqueeze(2).expand(-1, -1, x.shape[2]))


def split(x: Tensor) -> Tensor:
    """(B, N, C) to (B, heads, N, C / heads)."""
    heads: Tensor = x.unflatten(2, (CONFIG.heads, -1)).transpose(1, 2)
    return heads


def merged(x: Tensor) -> Tensor:
    """(B, heads, N, D) to (B, N, heads * D)."""
    return x.transpose(1, 2).flatten(2)


def with_background_token(w: Weights, name: str, x: Tensor) -> Tensor:
    """(B, N, C) to (B, 1 + N, C), the matcher's background token first."""
    return torch.cat([w[f"{name}.bg_token"].expand(len(x), -1, -1), x], 1)


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    """x W^T + b."""
    return functional.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])


def norm(w: Weights, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of the last dimension."""
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def batch_norm(w: Weights, name: str, x: Tensor) -> Tensor:
    """Batch normalisation of (B, D, ...) with the trained statistics."""
    mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
    return functional.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"])
