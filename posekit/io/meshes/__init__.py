"""Read CAD models: from a client's files to vertices and faces; every claim of the files is checked first.

PLY, STL and OFF are read here. OBJ and GLB are read by trimesh, which sees nothing but the files given. The result is
one mesh in the file's own unit. `resolve_unit`, `to_mesh` and `health` then interpret it in metres.
"""

from posekit.io.meshes.archive import expand, unzip
from posekit.io.meshes.content import content_id
from posekit.io.meshes.formats import FORMATS, Unit, sniff, unreadable
from posekit.io.meshes.inspection import HealthReport, diameter_m, health, is_watertight, resolve_unit, to_mesh
from posekit.io.meshes.raw import RawMesh
from posekit.io.meshes.read import load_mesh

__all__ = [
    "FORMATS",
    "HealthReport",
    "RawMesh",
    "Unit",
    "content_id",
    "diameter_m",
    "expand",
    "health",
    "is_watertight",
    "load_mesh",
    "resolve_unit",
    "sniff",
    "to_mesh",
    "unreadable",
    "unzip",
]
