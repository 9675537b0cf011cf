"""What the OpenAPI document says in words and by example: a sentence for every field, and bodies that really decode.

Tests hold that no field is without words, and that every example is accepted by its struct.
"""

from __future__ import annotations

from typing import Any, Final

Json = dict[str, Any]

# ------------------------------------------------------------------------------------------------------ words of fields

IMAGES: Final = {
    "rgb_image": "Colour image: PNG or JPEG, 8-bit; grey and RGBA are accepted. Rectified.",
    "depth_image": "Depth image: 16-bit PNG or 32-bit float TIFF, registered to the colour image and of its size; "
    "0 and NaN mean no reading. 8-bit depth has lost its data and is refused.",
}
REQUEST: Final = {
    **IMAGES,
    "cam_params": "The camera, and what a raw depth value means.",
    "cad_path": "A mesh file under the server's CAD root: relative, or absolute inside it. "
    "Give exactly one of cad_path, object_id, cad and objects.",
    "object_id": "A registered object, by its hash or its name.",
    "cad": "The mesh file itself, at most 10 MB; needs cad_format.",
    "cad_format": "What `cad` is; zip is an OBJ with its MTL and textures.",
    "objects": "CAD by category, for detections of different objects: keys as strings or integers. "
    "A detection whose category has no entry gets the row `no_cad`.",
    "model_unit": "Unit of the CAD's numbers, mm unless given; auto guesses and says so. Not with object_id, "
    "which has its unit.",
    "engine": "Which engine answers, among those configured; auto is the server's choice.",
    "refine": "auto: icp for the geometric engine, none for sam6d. icp with sam6d: the geometric engine's refiner "
    "polishes the network's pose; where it cannot, a warning says why.",
    "hypotheses": "How many runners-up to return with each pose.",
    "units": "What happens when depth, masks and CAD fit each other only in another unit: check refuses what is "
    "certainly a slip and warns of what is odd, strict refuses both.",
    "min_score": "Confidence below it turns a pose into the row `low_confidence`.",
    "seed": "Of the engine's random choices; by default it follows from the decoded content, so that the same "
    "question has the same answer.",
    "deadline_ms": "Work past it is not started and the answer is 504. Also as header X-Request-Deadline-Ms; "
    "the shorter one counts. By default 30 seconds.",
    "visualize": "Return an overlay PNG in `visualization`.",
    "output_dir": "Folder below the server's output root, relative: detection_pem.json, poses.npz and vis_pem.png "
    "are written there.",
    "detections": "Columns `{masks, boxes, scores, object_ids}`, or SAM-6D's list of "
    "`{segmentation, category_id, bbox, score}`. None at all is a valid question.",
    "box_format": "How boxes are written: xywh, or xyxy as some ISM servers do.",
    "init_poses": "One for each mask, null to search: refine these poses instead (tracking). The geometric engine's "
    "refiner does that for either engine.",
    "template_dir": "The ISM server's own path of the object's templates, passed on to it.",
    "ism_cad_path": "The ISM server's own path of the CAD, passed on to it.",
}

#: schema -> what it is, where the struct's own words are for its readers in the code
SCHEMAS: Final[dict[str, str]] = {
    "PoseRequest": "Detections and CAD in.",
    "FullPipelineRequest": "CAD in; the ISM server is asked for the detections.",
    "SegDataRequest": "Detections and CAD in, as the second dialect spells them.",
    "ObjectRequest": "What is known about a CAD file.",
    "Row": "One detection's answer: a pose, or why there is none.",
    "RowError": "Why a detection has no pose.",
    "Health": "What a CAD model looks like.",
    "WireSymmetries": "An object's symmetries as BOP writes them.",
    "ObjectModelAnswer": "What one engine has made of an object.",
    "ObjectList": "The registered objects.",
    "Status": "How the server is.",
    "Version": "What answers here.",
    "Health2": "What clients of the second dialect ask first.",
    "ModelMetadata": "Open Inference Protocol metadata.",
}

#: schema -> field -> what it means
FIELDS: Final[dict[str, dict[str, str]]] = {
    "PoseRequest": REQUEST,
    "FullPipelineRequest": REQUEST,
    "SegDataRequest": REQUEST
    | {
        "depth_image": f"{IMAGES['depth_image']} Bare little-endian float32 of the colour image's size is accepted.",
        "seg_data": "COCO detections, as SAM-6D's detection_ism.json has them.",
        "template_dir": "Accepted for the sake of existing clients, and not used: a warning says so.",
        "det_score_thresh": "Detections are used whose score is strictly above it; the others are in `rejected`.",
        "refine": "none unless asked.",
    },
    "CamParams": {
        "cam_K": "Pinhole camera matrix of this image size, pixels: 9 numbers in row order, or 3 rows of 3.",
        "depth_scale": "Raw value x depth_scale = millimetres; 1.0 for a 16-bit PNG unless given, needed for a TIFF.",
        "depth_unit": "m: raw value x depth_scale is metres, as RealSense and ROS write it (0.001).",
    },
    "ObjectChoice": {"cad_path": REQUEST["cad_path"].split(". ")[0] + ".", "object_id": REQUEST["object_id"]},
    "InitPose": {
        "rotation": "3 rows of 3, object to camera.",
        "translation": "Millimetres.",
    },
    "Columns": {
        "masks": "One for each detection.",
        "boxes": "Pixels, see box_format; the masks' own boxes unless given.",
        "scores": "The detector's; 1.0 unless given. They do not change a pose's confidence.",
        "object_ids": "Category of each detection: integer, string or null, echoed in its row.",
    },
    "Detection": {
        "segmentation": "The mask.",
        "category_id": "Echoed in the row as object_id, and the key into `objects`.",
        "bbox": "Pixels, see box_format; the mask's own box unless given.",
        "score": "The detector's.",
    },
    "ObjectRequest": {
        "name": "Works wherever the id does.",
        "model_unit": "Unit of the file's numbers; auto guesses and says so in the health report.",
        "cad_format": "By default the file name's ending.",
        "symmetries_discrete": "Rotations that leave the object as it is: each a 4x4 in row order, millimetres. "
        "Symmetries given override those found.",
        "symmetries_continuous": "Axes about which any turn leaves the object as it is.",
    },
    "ContinuousSymmetry": {"axis": "Its direction.", "offset": "A point on it, millimetres."},
    "PoseAnswer": {
        "success": "The request was processed, even where every row is rejected.",
        "poses": "One row for each detection sent, in the order sent.",
        "inference_time": "Seconds from the body received to the answer written.",
        "timing": "Where the time went.",
        "cad_path_used": "The CAD file, below the CAD root.",
        "output_dir_used": "Where files were written, below the output root.",
        "error_message": "The failure in words.",
        "warnings": "What was odd and did not stop the answer.",
        "engine": "Which engine answered.",
        "degraded": "The geometric engine stood in for the network; a warning says why.",
        "release": "What answered, for comparing answers over time.",
        "visualization": "Overlay PNG, where asked for.",
        "detections": "What the ISM server found (full pipeline only).",
        "error": "The failure for programs.",
    },
    "Row": {
        "object_id": "The detection's category as it was sent.",
        "cad_id": "Content hash of its CAD.",
        "rotation": "3 rows of 3, object to camera: p_cam = R p_obj + t, OpenCV camera frame. Null where rejected.",
        "translation": "Millimetres. Null where rejected.",
        "confidence": "0 to 1, about the pose alone; never multiplied by the detector's score.",
        "bbox": "x, y, width, height in pixels.",
        "status": "rejected: there is no pose, and `error` says why.",
        "evidence": "What speaks for the pose.",
        "ambiguous": "Another pose fits nearly as well.",
        "hypotheses": "Runners-up, where asked for.",
        "error": "Why there is no pose.",
    },
    "RowEvidence": {
        "inlier_fraction": "Of the readings under the mask: how many the pose explains.",
        "residual_mm": "Median difference between the depth read and the depth of the posed model.",
        "visible_overlap": "Of the model's surface that should be visible: how much was seen there.",
        "free_space_violation": "Of the same: where the camera saw through it, to something behind.",
    },
    "RowError": {"code": "A closed list, which the metrics share.", "detail": "In words, with the numbers."},
    "RowHypothesis": {
        "rotation": "3 rows of 3, object to camera.",
        "translation": "Millimetres.",
        "confidence": "0 to 1.",
    },
    "Timing": {
        "decode_ms": "Images and masks decoded, point clouds cut.",
        "queue_ms": "All waiting, in the gateway and between stages.",
        "pose_ms": "In the engine, with whatever shared its passes.",
        "batch_detections": "Detections in the largest pass this request rode in.",
        "batch_requests": "Requests that shared that pass.",
        "respond_ms": "Overlay and files.",
        "onboard_ms": "Waited for the CAD to be onboarded.",
        "ism_ms": "The ISM server's call.",
        "total_ms": "All of it.",
    },
    "FoundDetections": {
        "masks": "Compressed COCO RLE.",
        "boxes": "x, y, width, height in pixels.",
        "scores": "The detector's.",
        "object_ids": "As the ISM server gave them.",
    },
    "ErrorBody": {
        "code": "Stable, for programs; see the table of failures.",
        "detail": "In words: what is wrong, and what to do.",
        "request_id": "Finds the request in the server's log.",
        "field": "Path of the field at fault, as the client wrote it.",
    },
    "SegDataAnswer": {
        "success": "The request was processed.",
        "detections": "The solved detections as they were sent; all arrays run along them.",
        "pose_scores": "Confidence of the pose x the detector's score.",
        "pred_rot": "3 rows of 3 each, object to camera.",
        "pred_trans": "Millimetres.",
        "num_detections": "Length of the arrays.",
        "inference_time": "Seconds.",
        "template_dir_used": "Always null: templates are made from the CAD.",
        "cad_path_used": "The CAD file, below the CAD root.",
        "output_dir_used": "Where files were written, below the output root.",
        "error_message": "The failure in words.",
        "rejected": "The detections without a pose.",
        "warnings": "What was odd and did not stop the answer.",
        "error": "The failure for programs.",
    },
    "RejectedDetection": {
        "index": "In seg_data.",
        "code": "A closed list, which the metrics share.",
        "detail": "In words, with the numbers.",
    },
    "ObjectAnswer": {
        "object_id": "sha256 over the resolved unit and the files' names and bytes.",
        "name": "Works wherever the id does.",
        "status": "ready: poses can be asked for at once.",
        "progress": "0 to 1.",
        "model_unit": "Resolved; auto never stays.",
        "health": "What the CAD looks like.",
        "symmetries": "Given or found; null while onboarding.",
        "created": "Unix seconds.",
        "onboard_seconds": "How long onboarding took, all engines together.",
        "engines": "By engine: a request only waits for the one that it asks for.",
        "error": "Why onboarding failed. With status ready another engine can be asked all the same.",
    },
    "ObjectModelAnswer": {
        "status": "queued: others are onboarded before it.",
        "progress": "0 to 1.",
        "seconds": "How long onboarding took.",
        "threads": "CPU threads that it took them on.",
        "bytes": "What it takes on the server's disk.",
        "error": "Why onboarding failed.",
    },
    "Health": {
        "faces": "Triangles.",
        "watertight": "Whether the surface is closed.",
        "extents_mm": "Size of the axis-aligned box.",
        "diameter_mm": "Largest distance between two points.",
        "warnings": "What may trouble pose estimation: suspicious scale, holes and the like.",
    },
    "WireSymmetries": {
        "symmetries_discrete": "Each a 4x4 in row order, millimetres.",
        "symmetries_continuous": "Each `{axis, offset}`, millimetres.",
    },
    "ObjectList": {"objects": "All that are registered."},
    "Status": {
        "server": "draining: finishes what it has, takes nothing new.",
        "model_loaded": "Whether poses can be answered.",
        "device": "Where the pose stage runs.",
        "uptime": "Seconds since start.",
        "version": "Of the server.",
        "engine": "What `engine: auto` means here.",
        "release": "What answers now.",
        "kernels": "Operation -> compiled or reference.",
        "tracks": "The backends by name.",
        "objects": "How many are registered.",
        "queue": "What waits or runs right now.",
        "detections_per_second": "Of `engine`, measured lately; the queue's admission reckons with it.",
        "engines": "Name -> release of those that answer, the default first.",
        "degraded": "The geometric engine stands in for the network.",
        "degraded_reason": "Why; null where it does not.",
    },
    "QueueState": {"requests": "Waiting or running.", "detections": "Waiting or running."},
    "Track": {
        "state": "Of the backend.",
        "release": "What it answers with.",
        "workers": "Stage -> live processes.",
        "restarts": "Of its processes, since start.",
    },
    "Version": {
        "version": "Of the server.",
        "engine": "What `engine: auto` means here.",
        "release": "What answers now.",
        "checkpoint": "Name of the weights; null where the engine has none.",
        "sha256": "Of their file.",
        "engines": "Name -> release of those that answer, the default first.",
        "degraded": "The geometric engine stands in for the network.",
    },
    "Health2": {
        "status": "healthy: poses can be asked for.",
        "model": "`{loaded, device}`",
        "timestamp": "Unix seconds.",
    },
    "ModelMetadata": {
        "name": "pem",
        "versions": "The release that answers now.",
        "platform": "pem-server",
        "inputs": "Name, datatype and shape of what goes in.",
        "outputs": "Name, datatype and shape of what comes out.",
        "parameters": "Engine, units, and the licences of engine and weights.",
    },
}

# ------------------------------------------------------------------------------------------------------------- examples

_RGB: Final = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAADklEQVR42mOIAgIGVAIAOFQFoaP9HFoAAAAASUVORK5CYII="
_DEPTH: Final = "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAEEAAAAADcCh3hAAAAD0lEQVR42mNg/AKBDLgZAAw7D1F17bnaAAAAAElFTkSuQmCC"
_MASK_PNG: Final = (
    "iVBORw0KGgoAAAANSUhEUgAAAAQAAAAECAAAAACMmsGiAAAAEUlEQVR42mNgAIP//2EEEAAAJ+wD/X0M/W0AAAAASUVORK5CYII="
)
_K_ROWS: Final = [[600.0, 0.0, 2.0], [0.0, 600.0, 2.0], [0.0, 0.0, 1.0]]
_K_FLAT: Final = [number for row in _K_ROWS for number in row]
_SQUARE: Final[Json] = {"size": [4, 4], "counts": [5, 2, 2, 2, 5]}
_ID: Final = "9f2c" * 16
_PICTURES: Final[Json] = {"rgb_image": _RGB, "depth_image": _DEPTH}
_ROTATION: Final = [[0.36, -0.8, 0.48], [0.8, 0.0, -0.6], [0.48, 0.6, 0.64]]
_ROW: Final[Json] = {
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
_REJECTED: Final[Json] = {
    "object_id": 5,
    "cad_id": _ID,
    "rotation": None,
    "translation": None,
    "confidence": 0.0,
    "bbox": [402.0, 60.0, 5.0, 4.0],
    "status": "rejected",
    "error": {"code": "mask_too_small", "detail": "12 valid depth pixels under the mask, more than 32 needed"},
}
_TIMING: Final[Json] = {
    "decode_ms": 21.4,
    "queue_ms": 3.2,
    "pose_ms": 148.9,
    "batch_detections": 12,
    "batch_requests": 3,
    "respond_ms": 0.4,
    "total_ms": 176.0,
}
_POSE_ANSWER: Final[Json] = {
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
_OBJECT: Final[Json] = {
    "object_id": _ID,
    "name": "mug",
    "status": "ready",
    "progress": 1.0,
    "model_unit": "mm",
    "health": {
        "faces": 5104,
        "watertight": True,
        "extents_mm": [80.0, 80.0, 95.0],
        "diameter_mm": 131.2,
        "warnings": [],
    },
    "symmetries": {"symmetries_discrete": [], "symmetries_continuous": [{"axis": [0, 0, 1], "offset": [0, 0, 0]}]},
    "created": 1750000000.0,
    "onboard_seconds": 2.3,
    "engines": {"geometric": {"status": "ready", "progress": 1.0, "seconds": 2.3, "threads": 1, "bytes": 2404549}},
}

#: schema -> name -> an example that the struct accepts
EXAMPLES: Final[dict[str, dict[str, Json]]] = {
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
    "ObjectRequest": {"named": {"name": "mug", "model_unit": "m"}},
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
    "ObjectAnswer": {"ready": _OBJECT},
    "ObjectList": {"default": {"objects": [_OBJECT]}},
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
