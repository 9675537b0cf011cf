"""Examples of answers about the server: status, version, health of the second dialect, model metadata."""

from __future__ import annotations

from typing import Any, Final

#: schema -> name -> an example that its struct accepts
EXAMPLES: Final[dict[str, dict[str, dict[str, Any]]]] = {
    "Status": {
        "default": {
            "server": "running",
            "model_loaded": True,
            "device": "cpu",
            "uptime": 3601.2,
            "version": "0.1.0",
            "engine": "geometric",
            "release": "geometric-2",
            "kernels": {"furthest_point_sample": "compiled", "ball_query": "compiled", "explain": "compiled"},
            "tracks": {
                "production": {
                    "state": "ready",
                    "release": "geometric-2",
                    "workers": {"decode": 2, "pose": 1, "respond": 1, "inspect": 1, "onboard": 1},
                    "restarts": 0,
                }
            },
            "objects": 3,
            "queue": {"requests": 2, "detections": 14},
            "detections_per_second": 21.5,
            "engines": {"geometric": "geometric-2"},
            "degraded": False,
            "degraded_reason": None,
        }
    },
    "Version": {
        "default": {
            "version": "0.1.0",
            "engine": "geometric",
            "release": "geometric-2",
            "checkpoint": None,
            "sha256": None,
            "engines": {"geometric": "geometric-2"},
            "degraded": False,
        }
    },
    "Health2": {
        "default": {"status": "healthy", "model": {"loaded": True, "device": "cpu"}, "timestamp": 1750000000.0}
    },
    "ModelMetadata": {
        "default": {
            "name": "pem",
            "versions": ["geometric-2"],
            "platform": "pem-server",
            "inputs": [
                {"name": "rgb_image", "datatype": "BYTES", "shape": [1]},
                {"name": "depth_image", "datatype": "BYTES", "shape": [1]},
                {"name": "cam_K", "datatype": "FP64", "shape": [3, 3]},
                {"name": "masks", "datatype": "BYTES", "shape": [-1]},
                {"name": "object_id", "datatype": "BYTES", "shape": [1]},
            ],
            "outputs": [
                {"name": "rotation", "datatype": "FP64", "shape": [-1, 3, 3]},
                {"name": "translation", "datatype": "FP64", "shape": [-1, 3]},
                {"name": "confidence", "datatype": "FP64", "shape": [-1]},
            ],
            "parameters": {
                "server_version": "0.1.0",
                "engine": "geometric",
                "engine_licence": "Apache-2.0",
                "weights_licence": "none: this engine has no weights",
                "lengths": "mm",
                "frame": "object to camera, OpenCV camera frame",
                "endpoint": "/api/v1/pose_estimation",
            },
        }
    },
}
