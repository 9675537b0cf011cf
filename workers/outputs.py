"""The outputs beside the rows: the overlay picture, and the files of `output_dir`.

Imports OpenCV, so the respond stage imports it when it starts.
"""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pem.contract import Row
from pem.rle import encode_rle
from posekit import overlay
from posekit.engine import Float64, Mesh, UInt8
from posekit.errors import StoreError, StoreFull
from posekit.io import images, masks
from posekit.store import ObjectStore, write_atomically
from posekit.units import transform_mm_to_m
from workers.messages import OUTPUT_FILES, Job

DETECTIONS, POSES, PICTURE = OUTPUT_FILES


class Outputs:
    """Draws the overlay and writes files; caches the last few meshes."""

    def __init__(self, objects_dir: Path) -> None:
        self._store = ObjectStore(objects_dir)
        self._mesh = functools.lru_cache(maxsize=8)(self._load_mesh)

    def make(self, job: Job, rows: list[Row], *, seconds: float = -1.0) -> tuple[bytes | None, bool]:
        """Draw if the job wants a picture or files, write if it wants files; return (PNG or None, True if written).

        `rows` are all rows of the job, in order. `seconds` is SAM-6D's `time`, -1 if unknown.
        Raises StoreFull, and StoreError for other disk errors.
        """
        if not job.visualize and job.output_dir is None:
            return None, False
        rgb = images.decode_color(job.rgb, job.max_megapixels, job.rgb_field)
        picture = images.encode_png(self._draw(rgb, job, rows))
        if job.output_dir is not None:
            _write(Path(job.output_dir), picture, job, rows, (rgb.shape[0], rgb.shape[1]), seconds)
        return (picture if job.visualize else None), job.output_dir is not None

    def _draw(self, rgb: UInt8, job: Job, rows: list[Row]) -> UInt8:
        K = np.array(job.K, dtype=np.float64).reshape(3, 3)
        return overlay.draw_overlay(rgb, K, [self._item(row) for row in rows])

    def _item(self, row: Row) -> overlay.OverlayItem:
        label = "object" if row.object_id is None else str(row.object_id)
        if row.rotation is None or row.translation is None:
            code = "rejected" if isinstance(row.error, msgspec.UnsetType) else row.error.code
            return overlay.OverlayItem(label=label, rejected=True, code=code, bbox=row.bbox)
        return overlay.OverlayItem(
            label=label, mesh=self._mesh(row.cad_id or ""), T_cam_obj=_pose(row), score=row.confidence, bbox=row.bbox
        )

    def _load_mesh(self, object_id: str) -> Mesh | None:
        try:
            return self._store.load_mesh(object_id)
        except StoreError:  # deleted since; the picture shows the mask's box
            return None


def _write(folder: Path, picture: bytes, job: Job, rows: list[Row], size: tuple[int, int], seconds: float) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / DETECTIONS, msgspec.json.encode(_sam6d(job, rows, size, seconds)))
        write_atomically(folder / POSES, _table(job, rows))
        write_atomically(folder / PICTURE, picture)
    except StoreFull:
        raise StoreFull("the files of output_dir cannot be written: the server's disk is full", "output_dir") from None
    except OSError as error:
        raise StoreError(f"output_dir cannot be written: {error.strerror}", "output_dir") from error


def _sam6d(job: Job, rows: list[Row], size: tuple[int, int], seconds: float) -> list[dict[str, Any]]:
    """Return the solved detections as SAM-6D's own program writes them: `score` is detector times pose, `t` in mm."""
    found = []
    for index, (spec, row) in enumerate(zip(job.detections, rows, strict=True)):
        if row.status != "ok":
            continue
        mask = masks.decode_mask(spec.png or spec.raw, *size, job.mask_field(index), job.max_mask_megapixels * 1e6)
        found.append(
            {
                "scene_id": 0,
                "image_id": 0,
                "category_id": 1 if row.object_id is None else row.object_id,
                "bbox": row.bbox,
                "score": spec.score * row.confidence,
                "time": seconds,
                "segmentation": encode_rle(mask),
                "R": row.rotation,
                "t": row.translation,
            }
        )
    return found


def _table(job: Job, rows: list[Row]) -> bytes:
    """Return every row, rejected ones too, as arrays that `numpy.load` reads without pickles. NaN if without a pose."""
    no_rotation, no_translation = np.full((3, 3), np.nan).tolist(), [np.nan] * 3
    errors = [
        ("", "") if isinstance(row.error, msgspec.UnsetType) else (row.error.code, row.error.detail) for row in rows
    ]
    file = io.BytesIO()
    np.savez_compressed(
        file,
        index=np.arange(len(rows)),
        status=np.array([row.status for row in rows], dtype=np.str_),
        R=np.array([row.rotation or no_rotation for row in rows], dtype=np.float64).reshape(-1, 3, 3),
        t_mm=np.array([row.translation or no_translation for row in rows], dtype=np.float64).reshape(-1, 3),
        confidence=np.array([row.confidence for row in rows], dtype=np.float64),
        score=np.array([spec.score for spec in job.detections], dtype=np.float64),
        bbox=np.array([row.bbox for row in rows], dtype=np.float64).reshape(-1, 4),
        object_id=np.array(["" if row.object_id is None else str(row.object_id) for row in rows], dtype=np.str_),
        cad_id=np.array([row.cad_id or "" for row in rows], dtype=np.str_),
        error_code=np.array([code for code, _ in errors], dtype=np.str_),
        error_detail=np.array([detail for _, detail in errors], dtype=np.str_),
        K=np.array(job.K, dtype=np.float64).reshape(3, 3),
    )
    return file.getvalue()


def _pose(row: Row) -> Float64:
    T_cam_obj_mm = np.eye(4)
    T_cam_obj_mm[:3, :3] = row.rotation
    T_cam_obj_mm[:3, 3] = row.translation
    return transform_mm_to_m(T_cam_obj_mm)
