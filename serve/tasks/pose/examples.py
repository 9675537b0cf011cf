"""Examples of pose requests and their answers, in both dialects. Their pictures and masks can be decoded."""

from __future__ import annotations

from typing import Any, Final

_RGB: Final = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAADklEQVR42mOIAgIGVAIAOFQFoaP9HFoAAAAASUVORK5CYII="
_DEPTH: Final = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAEEAAAAADcCh3hAAAAD0lEQVR42mNg/AKBDLgZAAw7D1F17bnaAAAAAElFTkSuQmCC"
_MASK_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAEUlEQVR42mNgAIP//2EEEAAAJ+wD/X0M/W0AAAAASUVORK5CYII="
)
_K_ROWS: Final = [[600.0, 0.0, 2.0], [0.0, 600.0, 2.0], [0.0, 0.0, 1.0]]
_K_FLAT: Final = [number for row in _K_ROWS for number in row]
_SQUARE: Final[dict[str, Any]] = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
_ID: Final = "9f2c" * 16
_PICTURES: Final[dict[str, Any]] = {"rgb_image": _RGB, "depth_image": _DEPTH}
_ROTATION: Final = [[0.36, -0.8, 0.48], [0.8, 0.0, -0.6], [0.48, 0.6, 0.64]]
_ROW: Final[dict[str, Any]] = {
    "object_id": 5,
    "cad_id": _ID,
    "rotation": _ROTATION,
    "translation": [12.4, -31.0, 612.7],
    "confidence": 0.93,
    "bbox": [211.0, 145.0, 88.0, 102.0],
    "status": "ok",
    "evidence": {"inlier_fraction": 0.91, "residual_mm": 1.4, "visible_overlap": 0.88, "free_space_violation": 0.02},
    "ambiguous": False,
}
_REJECTED: Final[dict[str, Any]] = {
    "object_id": 5,
    "cad_id": _ID,
    "rotation": None,
    "translation": None,
    "confidence": 0.0,
    "bbox": [402.0, 60.0, 5.0, 4.0],
    "status": "rejected",
    "error": {"code": "mask_too_small", "detail": "12 valid depth pixels under the mask, more than 32 needed"},
}
_TIMING: Final[dict[str, Any]] = {
    "decode_ms": 21.4,
    "queue_ms": 3.2,
    "pose_ms": 148.9,
    "batch_detections": 12,
    "batch_requests": 3,
    "respond_ms": 0.4,
    "total_ms": 176.0,
}
_POSE_ANSWER: Final[dict[str, Any]] = {
    "success": True,
    "poses": [_ROW, _REJECTED],
    "inference_time": 0.176,
    "timing": _TIMING,
    "cad_path_used": None,
    "output_dir_used": None,
    "error_message": None,
    "warnings": [],
    "engine": "geometric",
    "degraded": False,
    "release": "geometric-2",
}
#: schema -> name -> an example that its struct accepts
EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "PoseRequest": {
        "registered object": {
            **_PICTURES,
            "cam_params": {"cam_K": _K_FLAT, "depth_scale": 1.0},
            "detections": {
                "masks": [_SQUARE, _MASK_PNG],
                "boxes": [[1, 1, 2, 2], [1, 1, 2, 2]],
                "scores": [0.9, 0.8],
                "object_ids": [5, 5],
            },
            "object_id": "mug",
        },
        "SAM-6D detections, two objects": {
            **_PICTURES,
            "cam_params": {"cam_K": _K_ROWS, "depth_scale": 0.001, "depth_unit": "m"},
            "detections": [
                {"category_id": 5, "bbox": [1, 1, 2, 2], "score": 0.9, "segmentation": _SQUARE, "time": 0.1},
                {"category_id": 8, "segmentation": [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]},
            ],
            "objects": {"5": {"object_id": "mug"}, "8": {"cad_path": "parts/bolt.ply"}},
            "hypotheses": 2,
            "visualize": True,
        },
        "tracking": {
            **_PICTURES,
            "cam_params": {"cam_K": _K_FLAT},
            "detections": {"masks": [[[1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0, 3.0]]]},
            "cad_path": "mug.ply",
            "init_poses": [{"rotation": _ROTATION, "translation": [12.0, -31.0, 610.0]}],
            "deadline_ms": 200,
        },
    },
    "FullPipelineRequest": {
        "default": {
            **_PICTURES,
            "cam_params": {"cam_K": _K_FLAT, "depth_scale": 1.0},
            "template_dir": "templates/mug",
            "object_id": "mug",
        }
    },
    "SegDataRequest": {
        "default": {
            **_PICTURES,
            "cam_params": {"cam_K": _K_FLAT, "depth_scale": 1.0},
            "seg_data": [{"category_id": 5, "bbox": [1, 1, 2, 2], "score": 0.9, "segmentation": _SQUARE}],
            "cad_path": "mug.ply",
        }
    },
    "PoseAnswer": {"a pose and a rejected detection": _POSE_ANSWER},
    "SegDataAnswer": {
        "default": {
            "success": True,
            "detections": [{"category_id": 5, "bbox": [1, 1, 2, 2], "score": 0.9, "segmentation": _SQUARE}],
            "pose_scores": [0.837],
            "pred_rot": [_ROTATION],
            "pred_trans": [[12.4, -31.0, 612.7]],
            "num_detections": 1,
            "inference_time": 0.176,
            "template_dir_used": None,
            "cad_path_used": "mug.ply",
            "output_dir_used": None,
            "error_message": None,
            "rejected": [{"index": 1, "code": "no_depth", "detail": "no depth reading under the mask"}],
            "warnings": [],
        }
    },
}
