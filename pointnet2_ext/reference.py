"""The definition of each operator in plain torch, ties and empty cases included.

It runs on every device and answers wherever no compiled kernel is present. A compiled kernel must return the same
indices. It does the same arithmetic in the same order, so that even near-ties fall the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor


def furthest_point_sample(points: Tensor, count: int) -> Tensor:
    """Pick `count` points, each the furthest from those already picked.

    points: (B, N, 3), finite. Returns (B, count) int64. Starts at index 0; ties go to the lowest index. Once every
    point is picked or repeats a picked one, all distances are 0, and the answer is index 0 again.
    """
    rows = torch.arange(points.shape[0], device=points.device)
    picked = torch.zeros(points.shape[0], count, dtype=torch.int64, device=points.device)
    nearest = torch.full(points.shape[:2], float("inf"), dtype=points.dtype, device=points.device)
    for step in range(1, count):
        last = points[rows, picked[:, step - 1]].unsqueeze(1)  # (B, 1, 3)
        nearest = torch.minimum(nearest, _squared_length(points - last))  # (B, N)
        furthest = nearest.amax(1, keepdim=True)  # (B, 1)
        picked[:, step] = (nearest == furthest).to(torch.uint8).argmax(1)  # the first of the ties
    return picked


def ball_query(points: Tensor, centers: Tensor, radius: float, count: int) -> Tensor:
    """Return for each center the first `count` points within `radius` of it, in the order of their indices.

    points: (B, N, 3); centers: (B, M, 3), same dtype and device; both finite. Returns (B, M, count) int64. Within means
    a distance strictly below `radius` (compared squared, in the points' dtype). Spare slots repeat the first hit; a
    center without a hit gets index 0 in all slots.
    """
    limit = torch.full((), radius, dtype=points.dtype, device=points.device).square()
    hits = _squared_length(points.unsqueeze(1) - centers.unsqueeze(2)) < limit  # (B, M, N)
    found_so_far = hits.cumsum(-1)  # (B, M, N): number of hits up to and including this point
    wanted = torch.arange(1, count + 1, device=points.device).expand(*centers.shape[:2], count).contiguous()
    index = torch.searchsorted(found_so_far, wanted)  # (B, M, count): index of the k-th hit; N = there is none
    none = points.shape[1]
    index = torch.where(index == none, index[..., :1], index)
    return torch.where(index == none, 0, index)


def _squared_length(vectors: Tensor) -> Tensor:
    """Return x*x + y*y + z*z, (..., 3) to (...), summed in this order, as the compiled kernels do."""
    x, y, z = vectors.unbind(-1)
    return x * x + y * y + z * z
