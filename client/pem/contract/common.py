"""The parts that requests of both dialects share (camera, CAD, options), and the failure that any route may answer."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Unit = Literal["mm", "m", "auto"]
CadFormat = Literal["ply", "obj", "stl", "glb", "off", "zip"]
NonEmpty = Annotated[str, Meta(min_length=1, max_length=4096)]
Triple = Annotated[list[float], Meta(min_length=3, max_length=3)]
Box = Annotated[list[float], Meta(min_length=4, max_length=4)]
Positive = Annotated[float, Meta(gt=0)]
Milliseconds = Annotated[int, Meta(ge=1)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]

# The structs accept any string: the server knows the values, checks them, and puts them into its OpenAPI document in
# place of `x-values`.
Engine = Annotated[str, Meta(extra_json_schema={"x-values": "engine"})]
RejectCode = Annotated[str, Meta(extra_json_schema={"x-values": "reject code"})]


class Wire(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a client sends: unknown fields are refused."""


class CamParams(Wire, kw_only=True):
    """The camera, and what a raw depth value means: raw x depth_scale = millimetres (metres with depth_unit "m")."""

    cam_K: Annotated[
        msgspec.Raw,
        Meta(
            description="Pinhole camera matrix of this image size, pixels: 9 numbers in row order, or 3 rows of 3. "
            "Whole numbers are pixel centres, as OpenCV's are: the middle of a picture 640 wide has cx 319.5.",
            extra_json_schema={
                "anyOf": [
                    {"title": "flat", "type": "array", "items": {"type": "number"}, "minItems": 9, "maxItems": 9},
                    {
                        "title": "3x3",
                        "type": "array",
                        "items": {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
                        "minItems": 3,
                        "maxItems": 3,
                    },
                ]
            },
        ),
    ]
    depth_scale: Annotated[
        Positive | None,
        Meta(
            description="Raw value x depth_scale = millimetres; 1.0 for a 16-bit PNG unless given, needed for a TIFF."
        ),
    ] = None
    depth_unit: Annotated[
        Literal["mm", "m"],
        Meta(description="m: raw value x depth_scale is metres, as RealSense and ROS write it (0.001)."),
    ] = "mm"


class ObjectChoice(Wire, kw_only=True):
    """One category's CAD: exactly one of the two."""

    cad_path: Annotated[
        NonEmpty | None, Meta(description="A mesh file under the server's CAD root: relative, or absolute inside it.")
    ] = None
    object_id: Annotated[NonEmpty | None, Meta(description="A registered object, by its hash or its name.")] = None


class Asked(Wire, kw_only=True):
    """What a request for poses may carry in either dialect.

    Pictures are base64 in JSON, raw bytes in MessagePack, files in multipart.
    """

    rgb_image: Annotated[
        bytes, Meta(description="Colour image: PNG or JPEG, 8-bit; grey and RGBA are accepted. Rectified.")
    ]
    depth_image: Annotated[
        bytes,
        Meta(
            description="Depth image: 16-bit PNG or 32-bit float TIFF, registered to the colour image and of its size; "
            "0 and NaN mean no reading. 8-bit depth has lost its data and is refused."
        ),
    ]
    cam_params: Annotated[CamParams, Meta(description="The camera, and what a raw depth value means.")]
    cad_path: Annotated[
        NonEmpty | None,
        Meta(
            description="A mesh file under the server's CAD root: relative, or absolute inside it. "
            "Give exactly one of cad_path, object_id, cad and objects."
        ),
    ] = None
    object_id: Annotated[NonEmpty | None, Meta(description="A registered object, by its hash or its name.")] = None
    cad: Annotated[bytes | None, Meta(description="The mesh file itself, at most 10 MB; needs cad_format.")] = None
    cad_format: Annotated[
        CadFormat | None, Meta(description="What `cad` is; zip is an OBJ with its MTL and textures.")
    ] = None
    objects: Annotated[
        dict[str | int, ObjectChoice] | None,
        Meta(
            description="CAD by category, for detections of different objects: keys as strings or integers. "
            "A detection whose category has no entry gets the row `no_cad`."
        ),
    ] = None
    model_unit: Annotated[
        Unit | None,
        Meta(
            description="Unit of the CAD's numbers: m for GLB and mm for the others unless given; auto guesses and "
            "says so. Not with object_id, which has its unit."
        ),
    ] = None
    engine: Annotated[
        Engine, Meta(description="Which engine answers, among those configured; auto is the server's choice.")
    ] = "auto"
    refine: Annotated[
        Literal["auto", "icp", "none"],
        Meta(
            description="auto: icp for the geometric engine, none for sam6d. icp with sam6d: the geometric engine's "
            "refiner polishes the network's pose; where it cannot, a warning says why."
        ),
    ] = "auto"
    units: Annotated[
        Literal["check", "strict"],
        Meta(
            description="What happens when depth, masks and CAD fit each other only in another unit: "
            "check refuses what is certainly a slip and warns of what is odd, strict refuses both."
        ),
    ] = "check"
    seed: Annotated[
        Seed | None,
        Meta(
            description="Of the engine's random choices; by default it follows from the decoded content, "
            "so that the same question has the same answer."
        ),
    ] = None
    deadline_ms: Annotated[
        Milliseconds | None,
        Meta(
            description="Work past it is not started and the answer is 504. "
            "Also as header X-Request-Deadline-Ms; the shorter one counts. By default 30 seconds."
        ),
    ] = None
    output_dir: Annotated[
        NonEmpty | None,
        Meta(
            description="Folder below the server's output root, relative: "
            "detection_pem.json, poses.npz and vis_pem.png are written there."
        ),
    ] = None


class ErrorBody(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What went wrong; `field` is the path of the field at fault."""

    code: Annotated[str, Meta(description="Stable, for programs; see the table of failures.")]
    detail: Annotated[str, Meta(description="In words: what is wrong, and what to do.")]
    request_id: Annotated[str, Meta(description="Finds the request in the server's log.")]
    field: Annotated[str | None, Meta(description="Path of the field at fault, as the client wrote it.")] = None
