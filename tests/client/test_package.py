"""The package as others import it: its names, and the modules that importing it loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pem

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "client" / "pem"
HEAVY = ("torch", "open3d", "mosec", "cv2", "trimesh", "scipy", "starlette", "uvicorn", "aiohttp", "pycocotools")
CLIENTS = ("httpx", "rich", "typer", "asyncio")


def imported(code: str, names: tuple[str, ...]) -> str:
    """Run code in a separate process; return which of the names it has imported."""
    told = f"import sys; {code}; print([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stderr == ""
    return done.stdout.strip()


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module


def test_the_public_names_are_sorted_and_all_there() -> None:
    constants = [name for name in pem.__all__ if name.isupper()]
    classes = [name for name in pem.__all__ if not name.isupper() and name[0].isupper()]
    functions = [name for name in pem.__all__ if name[0].islower()]
    assert pem.__all__ == sorted(constants) + sorted(classes) + sorted(functions)
    assert {"Client", "AsyncClient", "Pose", "PoseResult", "PoseOptions", "PemError", "encode_rle"} <= set(pem.__all__)
    for name in pem.__all__:
        assert getattr(pem, name) is not None
    assert set(pem.__all__) <= set(dir(pem))


def test_an_error_that_the_client_raises_is_public() -> None:
    from pem import errors

    classes = {name for name, value in vars(errors).items() if isinstance(value, type)}
    assert classes <= set(pem.__all__)


def test_a_name_that_is_none_is_said() -> None:
    with pytest.raises(AttributeError, match=r"module 'pem' has no attribute 'Cleint'"):
        pem.Cleint  # noqa: B018


@pytest.mark.parametrize("module", ["contract", "rle", "host.machine", "host.procfs", "host.ports"])
def test_what_workers_import_brings_no_http_client(module: str) -> None:
    assert imported(f"import pem.{module}", CLIENTS) == "[]"


def test_the_client_and_the_command_line_bring_nothing_heavy() -> None:
    assert imported("import pem.client, pem.cli", HEAVY) == "[]"


def test_the_package_imports_only_itself_and_what_it_declares() -> None:
    known = {"pem", "numpy", "msgspec", "httpx", "rich", "typer", *sys.stdlib_module_names}
    for path in sorted(PACKAGE.rglob("*.py")):
        foreign = {name for name in imports(path) if name.split(".")[0] not in known}
        assert not foreign, f"{path.relative_to(ROOT)} imports {', '.join(sorted(foreign))}"


def test_the_former_place_of_the_client_works_and_says_the_new_one() -> None:
    code = "from serve.client import *; from serve.client import Client; print(Client.__module__)"
    command = [sys.executable, "-W", "always::DeprecationWarning", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout == "pem.client\n"
    assert "DeprecationWarning: serve.client is now the package pem: `import pem` and pem.Client" in done.stderr
    quiet = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import serve.client"], capture_output=True, text=True, cwd=ROOT
    )
    assert quiet.stderr == ""


@pytest.mark.parametrize("name", pem.__all__)
def test_every_former_name_is_the_same_thing(name: str) -> None:
    import serve.client

    if name.endswith("_rle"):
        pytest.skip("was never there")
    with pytest.warns(DeprecationWarning, match=rf"pem\.{name}"):
        assert getattr(serve.client, name) is getattr(pem, name)


def test_what_never_was_at_the_former_place_is_not_there() -> None:
    import serve.client

    with pytest.raises(AttributeError, match=r"module 'serve\.client' has no attribute 'nothing'"):
        serve.client.nothing  # noqa: B018
