"""The structure: direction of imports, no import circles, files per folder, places of mathematics.

An import counts wherever it stands: at the top of a file, in a function, or for types alone.
"""

from __future__ import annotations

import ast
import functools
import graphlib
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    name: ROOT / "client" / name if name == "pem" else ROOT / name
    for name in ("pointnet2_ext", "pem", "posekit", "workers", "serve", "benchmarks", "tests")
}
MAY_IMPORT = {  # beside itself and what does not come from here
    "pointnet2_ext": set(),
    "pem": set(),
    "posekit": {"pointnet2_ext"},
    "workers": {"posekit", "pointnet2_ext", "pem"},
    "serve": {"workers", "posekit", "pem"},
    "benchmarks": FOLDERS.keys() - {"tests"},
}
CODE = {".py", ".cpp", ".h", ".cu", ".cuh"}
FILES_SIDE_BY_SIDE = 14
ROOMS, FLOORS = 20, 6  # of serve/, at most

Graph = Mapping[str, Set[str]]  # who -> whom it imports


# ------------------------------------------------------------------------------------------------------------- imports


@functools.cache
def modules() -> dict[str, Path]:
    """Return module name -> file for every module here; a package goes by its own name."""
    found = {}
    for name, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (name, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def imports_of(module: str) -> frozenset[str]:
    """Return the modules of this repository that a module imports; a name from a package counts as that package."""
    found = set()
    for name in _imported(module):
        parts = name.split(".")
        while parts and ".".join(parts) not in modules():
            parts.pop()
        found.add(".".join(parts))
    return frozenset(found - {"", module})


def _imported(module: str) -> Iterator[str]:
    """Every imported name with dots, attributes of modules included."""
    path = modules()[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            yield from (".".join([*base, alias.name]) for alias in node.names)
        elif isinstance(node, ast.Call) and _names(node.func) == "import_module":
            yield from (
                word.value for word in node.args if isinstance(word, ast.Constant) and isinstance(word.value, str)
            )


def _names(function: ast.expr) -> str:
    """A called function's own name, without what it is an attribute of."""
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def inside(package: str) -> list[str]:
    """Return the modules of a package, itself included."""
    return [name for name in modules() if name == package or name.startswith(f"{package}.")]


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_one_way(package: str) -> None:
    allowed = {package, *MAY_IMPORT[package]}
    upwards = {
        f"{module} imports {other}"
        for module in inside(package)
        for other in imports_of(module)
        if other.split(".")[0] not in allowed
    }
    assert upwards == set()


def engines() -> list[str]:
    """Return the packages that hold an engine each."""
    modules_here = [name.split(".") for name in inside("posekit")]
    return [".".join(parts[:2]) for parts in modules_here if len(parts) == 3 and parts[2] == "engine"]


def test_the_engines_are_found() -> None:
    assert {"posekit.geometric", "posekit.sam6d"} <= set(engines())


@pytest.mark.parametrize("engine", engines())
def test_an_engine_imports_no_other_engine(engine: str) -> None:
    others = {module for other in engines() if other != engine for module in inside(other)}
    sideways = {f"{module} imports {other}" for module in inside(engine) for other in imports_of(module) & others}
    assert sideways == set()


# ------------------------------------------------------------------------------------------------------------- circles


def circle(graph: Graph) -> list[str]:
    """Return a circle of imports, each module imported by the next one; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize("package", FOLDERS)
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    here = set(inside(package))
    assert circle({module: imports_of(module) & here - above(module) for module in here}) == []


def above(module: str) -> set[str]:
    """Return the packages that a module lies in, which are always loaded before it."""
    parts = module.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def rooms() -> dict[str, set[str]]:
    """Return the files and folders of serve/, and the others that each imports."""
    found: dict[str, set[str]] = {}
    for module in inside("serve"):
        if module != "serve":
            room = module.split(".")[1]
            others = {other.split(".")[1] for other in imports_of(module) if other.startswith("serve.")}
            found.setdefault(room, set()).update(others - {room})
    return found


def floors(graph: Graph) -> list[list[str]]:
    """Return the rooms of each floor, the lowest first: each stands right above the highest room that it imports."""
    floor: dict[str, int] = {}
    for room in graphlib.TopologicalSorter(graph).static_order():
        floor[room] = 1 + max((floor[below] for below in graph[room]), default=-1)
    return [sorted(room for room in floor if floor[room] == level) for level in range(1 + max(floor.values()))]


def plan(graph: Graph) -> str:
    """Return the floors in words, the highest first."""
    shown = list(enumerate(floors(graph), start=1))
    return "\n".join(
        f"floor {number}: {room} -> {', '.join(sorted(graph[room])) or 'nothing'}"
        for number, level in reversed(shown)
        for room in level
    )


def test_the_rooms_of_the_server_stand_in_no_circle() -> None:
    assert circle(rooms()) == []


def test_the_server_has_few_rooms_on_few_floors() -> None:
    graph = rooms()
    assert len(graph) <= ROOMS, sorted(graph)
    assert len(floors(graph)) <= FLOORS, f"\n{plan(graph)}"


def test_a_circle_is_found_and_floors_are_counted() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}
    house = {"app": {"queue", "errors"}, "queue": {"errors"}, "errors": set(), "logs": set()}
    assert floors(house) == [["errors", "logs"], ["queue"], ["app"]]
    assert plan(house).splitlines()[0] == "floor 3: app -> errors, queue"


# ---------------------------------------------------------------------------------------------------- sizes of folders


def test_no_folder_is_too_full_to_find_a_file_in() -> None:
    full = {}
    for top in FOLDERS.values():
        for folder in (top, *(path for path in sorted(top.rglob("*")) if path.is_dir())):
            names = sorted(path.name for path in folder.iterdir() if path.suffix in CODE)
            names = [name for name in names if name not in ("__init__.py", "__main__.py")]
            if len(names) > FILES_SIDE_BY_SIDE:
                full[str(folder.relative_to(ROOT))] = names
    assert full == {}


# --------------------------------------------------------------------------------------------------------- mathematics

ANGLES = {"sin", "cos", "tan", "asin", "acos", "atan", "atan2", "arcsin", "arccos", "arctan", "arctan2"}
ANGLES |= {"degrees", "radians", "deg2rad", "rad2deg", "hypot"}
MATHEMATICS = ANGLES | {"linalg", "random", "meshgrid", "einsum", "matmul", "dot", "cross", "outer"}
LIBRARIES = {"math", "cmath", "scipy", "random"}


def calculations(tree: ast.AST) -> list[str]:
    """Return the places where a file multiplies matrices, turns, draws at random, or solves."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append(f"line {node.lineno}: a matrix product")
        elif isinstance(node, ast.Attribute) and node.attr in MATHEMATICS:
            found.append(f"line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("module", inside("workers"))
def test_workers_hold_no_mathematics(module: str) -> None:
    assert calculations(ast.parse(modules()[module].read_text())) == []
    imported = [name.split(".") for name in _imported(module)]
    assert {parts[0] for parts in imported} & LIBRARIES == set()
    assert {part for parts in imported if parts[0] == "numpy" for part in parts} & MATHEMATICS == set()


@pytest.mark.parametrize(
    "line",
    ["a @ b", "a @= b", "np.linalg.inv(a)", "np.random.default_rng(0)", "np.meshgrid(a, b)", "math.cos(a)", "a.dot(b)"],
)
def test_mathematics_is_recognised(line: str) -> None:
    assert calculations(ast.parse(line))
    assert not calculations(ast.parse("x = np.array(a).reshape(3, 3)[:, 2] * 1000.0"))
