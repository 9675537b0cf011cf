"""Turn arrays and files into a request. Input that cannot be sent raises an error before anything is sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from pem import imagefiles
from pem.contract import CadFormat
from pem.meshfiles import Mesh, read_cad
from pem.options import Camera, Mask, Picture
from pem.poses import Pose
from pem.rle import encode_rle

#: Options that go to the server unchanged.
_PLAIN: Final = (
    *("object_id", "cad_path", "cad_format", "model_unit", "engine", "refine", "hypotheses", "units", "min_score"),
    *("seed", "visualize", "output_dir", "box_format", "template_dir", "ism_cad_path"),
)


def pose_request(
    rgb: Picture, depth: Picture, K: Camera, masks: Sequence[Mask] | None, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the body of a pose request: pictures encoded, masks as RLE; `masks` is None if the request sends none.

    Raises ValueError or TypeError for input that cannot be sent.
    """
    camera = _camera(K, options)
    if camera.get("depth_unit") == "m" and isinstance(depth, np.ndarray) and depth.dtype.kind == "f":
        camera.setdefault("depth_scale", 1.0)
    body: dict[str, Any] = {
        "rgb_image": encode_rgb(rgb),
        "depth_image": encode_depth(depth, camera.get("depth_scale")),
        "cam_params": camera,
    }
    given = {name: value for name, value in options.items() if value is not None}
    body |= {name: value for name, value in given.items() if name in _PLAIN}
    if "cad" in given:
        body["cad"], body["cad_format"] = _cad(given["cad"], given.get("cad_format"))
    if "objects" in given:
        body["objects"] = {
            category: {"object_id": choice} if isinstance(choice, str) else dict(choice)
            for category, choice in given["objects"].items()
        }
    if "detections" in given:
        if masks is not None:
            raise ValueError("give masks or detections, not both")
        body["detections"] = [dict(item) for item in given["detections"]]
    elif masks is not None:
        masks = list(masks)  # it may be a generator
        _check_sizes(masks, _size(rgb, body["rgb_image"]) or _size(depth, body["depth_image"]))
        body["detections"] = _columns(masks, given)
    if "init_poses" in given:
        body["init_poses"] = [_init_pose(pose) for pose in given["init_poses"]]
    return body


def asked_for(options: Mapping[str, Any]) -> Callable[[int | str | None], str | None]:
    """Return a function: category of a detection -> its object as the request names it, None for a CAD in bytes."""
    named = {str(category): choice for category, choice in (options.get("objects") or {}).items()}
    if not named:
        cad = options.get("cad")
        one = options.get("object_id") or options.get("cad_path") or (str(cad) if isinstance(cad, str | Path) else None)
        return lambda category: one

    def by_category(category: int | str | None) -> str | None:
        choice = named.get(str(category))
        return choice.get("object_id") or choice.get("cad_path") if isinstance(choice, Mapping) else choice

    return by_category


def encode_rgb(rgb: Picture) -> bytes:
    """Encode a colour image for the server: (H, W, 3) or (H, W) uint8 as PNG; a file (bytes or path) unchanged."""
    if not isinstance(rgb, np.ndarray):
        return _file_bytes("rgb", rgb)
    if rgb.dtype != np.uint8 or not (rgb.ndim == 2 or (rgb.ndim == 3 and rgb.shape[2] == 3)):
        raise ValueError(f"rgb must be (H, W, 3) uint8 in RGB order, not {rgb.shape} {rgb.dtype}")
    return imagefiles.write_png(rgb)


def encode_depth(depth: Picture, depth_scale: float | None) -> bytes:
    """Encode a depth image for the server: (H, W) integers as 16-bit PNG, (H, W) floats as float32 TIFF; a file (16-bit
    PNG or float TIFF, bytes or path) unchanged."""
    if not isinstance(depth, np.ndarray):
        return _file_bytes("depth", depth)
    if depth.ndim != 2:
        raise ValueError(f"depth must be (H, W), not {depth.shape}")
    if depth.dtype.kind == "f":
        if depth_scale is None:
            raise ValueError('float depth needs depth_unit="m" where it holds metres, depth_scale=1 where millimetres')
        return imagefiles.write_float_tiff(depth)
    if depth.dtype == np.uint8:
        raise ValueError("8-bit depth has lost its data; give the sensor's 16-bit or float values")
    if depth.dtype.kind not in "iu" or depth.size == 0 or depth.min() < 0 or depth.max() > 65_535:
        raise ValueError("depth must hold 16-bit values (0 to 65535) or floats")
    return imagefiles.write_png(depth.astype(np.uint16, copy=False))


def encode_mask(mask: Mask) -> Any:
    """Encode a mask for the server: an (H, W) array as COCO RLE, a path as its bytes; anything else unchanged."""
    if isinstance(mask, str | Path):
        return Path(mask).read_bytes()
    if not isinstance(mask, np.ndarray):
        return dict(mask) if isinstance(mask, Mapping) else mask
    if mask.ndim != 2:
        raise ValueError(f"a mask must be (H, W), not {mask.shape}")
    return encode_rle(mask != 0)


def _size(picture: Picture, encoded: bytes) -> tuple[int, int] | None:
    """Return the rows and columns of a picture; None for a file that is not a PNG."""
    if isinstance(picture, np.ndarray):
        return picture.shape[0], picture.shape[1]
    return imagefiles.png_size(encoded)


def _check_sizes(masks: Sequence[Mask], size: tuple[int, int] | None) -> None:
    """Raise ValueError for a mask array of another size than the image: the server's error would name its RLE."""
    for index, mask in enumerate(masks):
        if size is None or not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.shape == size:
            continue
        hint = "; transpose it" if mask.shape == size[::-1] else ""
        raise ValueError(
            f"masks[{index}], an array, is {mask.shape[0]} rows of {mask.shape[1]} pixels, "
            f"the image is {size[0]} rows of {size[1]}{hint}"
        )


def _file_bytes(what: str, file: Any) -> bytes:
    if isinstance(file, bytes):
        return file
    if isinstance(file, str | Path):
        return Path(file).read_bytes()
    raise TypeError(f"{what} must be an array, the bytes of an image file or its path, not {type(file).__name__}")


def _camera(K: Camera, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `cam_params`. The options win over what a camera file says about depth."""
    said: dict[str, Any] = {}
    if isinstance(K, Mapping):
        if "cam_K" not in K:
            raise TypeError(f"K is a dict without cam_K (it has {', '.join(map(str, K)) or 'nothing'})")
        said, K = dict(K), K["cam_K"]
    matrix = np.asarray(K, dtype=np.float64)
    if matrix.size != 9:
        raise ValueError(f"K must be (3, 3), not {matrix.shape}")
    said |= {name: value for name, value in options.items() if value is not None}
    return {"cam_K": matrix.ravel().tolist()} | {
        name: said[name] for name in ("depth_scale", "depth_unit") if said.get(name) is not None
    }


def _cad(cad: bytes | str | Path | Mesh, cad_format: CadFormat | None) -> tuple[bytes, str]:
    source, _, known = read_cad(cad, cad_format)
    if isinstance(source, bytes):
        return source, known or ""
    return source.read_bytes(), known or source.suffix.lower().removeprefix(".")


def _columns(masks: Sequence[Mask], options: Mapping[str, Any]) -> dict[str, Any]:
    columns: dict[str, Any] = {"masks": [encode_mask(mask) for mask in masks]}
    for name in ("boxes", "scores"):
        if name in options:
            columns[name] = np.asarray(options[name], dtype=np.float64).tolist()
    if "object_ids" in options:
        ids = options["object_ids"]
        columns["object_ids"] = [item.item() if isinstance(item, np.generic) else item for item in ids]
    return columns


def _init_pose(pose: npt.ArrayLike | Pose | Mapping[str, npt.ArrayLike] | None) -> dict[str, Any] | None:
    if pose is None:
        return None
    if isinstance(pose, Mapping):
        if set(pose) != {"rotation", "translation"}:
            raise ValueError(f"an initial pose as a dict has rotation and translation, not {', '.join(map(str, pose))}")
        R, t_mm = (np.asarray(pose[name], dtype=np.float64) for name in ("rotation", "translation"))
    else:
        T = np.asarray(pose.T_cam_obj_mm if isinstance(pose, Pose) else pose, dtype=np.float64)
        if T.shape != (4, 4):
            raise ValueError(f"an initial pose must be (4, 4), not {T.shape}")
        R, t_mm = T[:3, :3], T[:3, 3]
    if R.shape != (3, 3) or t_mm.shape != (3,):
        raise ValueError(f"an initial pose is a rotation (3, 3) and a translation (3,), not {R.shape}, {t_mm.shape}")
    return {"rotation": R.tolist(), "translation": t_mm.tolist()}
