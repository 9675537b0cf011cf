"""Read OBJ and GLB with trimesh, which sees nothing but the files given."""

from __future__ import annotations

import io
import json
import logging
import struct
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from posekit.errors import BadData, InvalidInput, PoseError, TooLarge
from posekit.io.meshes.raw import Parts, UInt8, check_claim
from posekit.io.meshes.textures import MAX_TEXTURE_MEGAPIXELS, Files, bytes_of, sampled


def read_with_trimesh(
    data: bytes, others: Mapping[str, bytes], cad_format: str, max_faces: int, field: str | None
) -> Parts:
    """Read every body at its place in the file's scene, with its colours. Raises BadData if the parser fails."""
    if cad_format == "glb":
        _check_glb(data, max_faces, field)
    else:
        check_claim(data.count(b"\nf "), data.count(b"\nv "), max_faces, field)
    import trimesh

    logging.getLogger("trimesh").setLevel(logging.CRITICAL + 1)
    parts = Parts([], [], [], [])
    resolver: Any = Files(others, parts.warnings)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scene = trimesh.load_scene(io.BytesIO(data), file_type=cad_format, resolver=resolver, process=False)
            total = 0
            for node in scene.graph.nodes_geometry:
                T_scene_body, name = scene.graph[node]
                body = scene.geometry[name]
                if not isinstance(body, trimesh.Trimesh) or len(body.faces) == 0:
                    continue
                total += len(body.faces)
                check_claim(total, 0, max_faces, field)
                faces = np.asarray(body.faces, dtype=np.int64)
                T = np.asarray(T_scene_body, dtype=np.float64)
                mirrored = np.linalg.det(T[:3, :3]) < 0
                parts.vertices.append(np.asarray(body.vertices, dtype=np.float64) @ T[:3, :3].T + T[:3, 3])
                parts.faces.append(faces[:, ::-1] if mirrored else faces)
                parts.colors.append(_body_colors(body, parts.warnings))
    except (PoseError, MemoryError):
        raise
    except Exception:  # a parser of untrusted files may raise anything; each means that the file is bad
        raise BadData(f"the {cad_format.upper()} is broken and cannot be read", field) from None
    return parts


def _check_glb(data: bytes, max_faces: int, field: str | None) -> None:
    """Check a GLB's chunks and the claims in its JSON before trimesh takes memory for them."""
    broken = BadData("the GLB is cut short or broken", field)
    if len(data) < 20:
        raise broken
    version, length, json_length, json_kind = struct.unpack_from("<IIII", data, 4)
    if length > len(data) or json_kind != 0x4E4F534A or 20 + json_length > len(data):
        raise broken
    if version != 2:
        raise BadData(f"the GLB is of version {version}; version 2 is understood", field)
    try:
        tree = json.loads(data[20 : 20 + json_length])
        required = tree.get("extensionsRequired", [])
        unknown = [name for name in required if "draco" in str(name).lower() or "meshopt" in str(name).lower()]
        if unknown:
            raise InvalidInput(f"the GLB is compressed ({str(unknown[0])[:60]}); export it without compression", field)
        counts = [accessor["count"] for accessor in tree.get("accessors", [])]
        if any(type(count) is not int or count < 0 for count in counts):
            raise broken
        if any("bufferView" not in accessor and "sparse" not in accessor for accessor in tree.get("accessors", [])):
            raise BadData("the GLB is broken: it refers to data that is not in it", field)
        if sum(counts) > 12 * max_faces:
            raise TooLarge(f"the GLB holds more data than {max_faces} faces need; simplify it", field)
        children = [child for node in tree.get("nodes", []) for child in node.get("children", [])]
        roots = [root for scene in tree.get("scenes", []) for root in scene.get("nodes", [])]
        if len(set(children)) != len(children) or not set(children).isdisjoint(roots):
            raise BadData("the GLB is broken: its nodes do not form a tree", field)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise broken from None


def _body_colors(body: Any, notes: list[str]) -> UInt8 | None:
    """Return the (V, 3) RGB colours of one body as trimesh read it, None if it has no colours."""
    count = len(body.vertices)
    visual = body.visual
    if visual.kind == "vertex":
        return bytes_of(np.asarray(visual.vertex_colors)[:, :3])
    if visual.kind != "texture":
        return None
    material, uv = visual.material, visual.uv
    image = getattr(material, "image", None)
    if image is None:
        image = getattr(material, "baseColorTexture", None)
    if getattr(image, "format", None) is None:  # trimesh's placeholder for a missing texture
        image = None
    if image is not None and uv is not None and len(uv) == count:
        if image.format not in ("PNG", "JPEG") or image.width * image.height > MAX_TEXTURE_MEGAPIXELS * 1e6:
            notes.append("a texture is no PNG or JPEG, or too large: its colours are missing")
            return None
        try:
            return sampled(np.asarray(image.convert("RGB")), np.asarray(uv, dtype=np.float64))
        except (OSError, ValueError, SyntaxError):
            notes.append("a texture is broken: its colours are missing")
            return None
    painted = getattr(visual, "vertex_attributes", {}).get("color")
    if painted is not None and len(painted) == count:
        painted = np.asarray(painted)[:, :3]
        full = 1.0 if painted.dtype.kind == "f" else float(np.iinfo(painted.dtype).max)
        return bytes_of(painted * (255.0 / full))
    plain = getattr(material, "baseColorFactor", None)
    if plain is None and "kd" in getattr(material, "kwargs", {}):
        plain = material.diffuse
    if plain is None:
        return None
    plain = np.asarray(plain)[:3]
    return np.tile(bytes_of(plain * 255.0 if plain.dtype.kind == "f" else plain), (count, 1))
