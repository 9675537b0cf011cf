"""The kernel that answers: code can ask which it is, and a fallback is logged."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pointnet2_ext
from pointnet2_ext import ops

PACKAGE = Path(ops.__file__).parent


def run_python(code: str, *, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


def test_public_names_are_sorted_and_exist():
    assert pointnet2_ext.__all__ == sorted(pointnet2_ext.__all__)
    assert all(callable(getattr(pointnet2_ext, name)) for name in pointnet2_ext.__all__)
    assert set(pointnet2_ext.__all__) <= set(dir(pointnet2_ext))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = pointnet2_ext.nonsense


def test_kernel_for_says_compiled_exactly_where_a_library_lies():
    built = {path.stem.removeprefix("_kernels_") for path in PACKAGE.glob("_kernels_*.so")}
    for device in ("cpu", "cuda"):
        assert pointnet2_ext.kernel_for(device) == ("compiled" if device in built else "reference")
    assert pointnet2_ext.kernel_for("cuda:1") == pointnet2_ext.kernel_for(torch.device("cuda"))
    assert pointnet2_ext.kernels("cpu") == dict.fromkeys(ops.OPS, pointnet2_ext.kernel_for("cpu"))


def test_without_a_library_the_reference_answers_and_a_warning_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert ops._load_compiled(tmp_path) == frozenset()
    assert "no compiled kernels for cpu: the slower torch reference answers" in caplog.text
    assert "--no-build-isolation" in caplog.text


@pytest.mark.parametrize("gpu", [True, False])
def test_a_gpu_without_its_library_is_heard_too(tmp_path, caplog, monkeypatch, gpu):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with caplog.at_level(logging.WARNING):
        ops._load_compiled(tmp_path)
    assert ("no compiled kernels for cuda" in caplog.text) == gpu


def test_a_library_that_does_not_load_is_named_with_its_cause(tmp_path, caplog):
    (tmp_path / "_kernels_cpu.so").write_bytes(b"not a library")
    with caplog.at_level(logging.WARNING):
        assert ops._load_compiled(tmp_path) == frozenset()
    assert "_kernels_cpu.so does not load with torch" in caplog.text


def test_the_package_without_its_libraries_gives_the_same_answers(tmp_path):
    copy = tmp_path / "pointnet2_ext"
    copy.mkdir()
    for name in ("__init__.py", "ops.py", "reference.py"):
        (copy / name).write_bytes((PACKAGE / name).read_bytes())
    code = (
        "import torch, pointnet2_ext as p\n"
        f"assert p.__file__.startswith({str(tmp_path)!r}) and p.kernel_for('cpu') == 'reference'\n"
        "points = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(3))\n"
        "print(p.furthest_point_sample(points, 40).tolist(), p.ball_query(points, points[:, :9], 0.8, 12).tolist())"
    )
    answer = run_python(code, folder=tmp_path)
    assert answer.returncode == 0, answer.stderr
    assert "the slower torch reference answers" in answer.stderr
    points = torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(3))
    picked = pointnet2_ext.furthest_point_sample(points, 40)
    near = pointnet2_ext.ball_query(points, points[:, :9], 0.8, 12)
    assert answer.stdout.strip() == f"{picked.tolist()} {near.tolist()}"


def test_importing_the_package_does_not_import_torch():
    answer = run_python("import sys, pointnet2_ext; assert 'torch' not in sys.modules")
    assert answer.returncode == 0, answer.stderr


def test_without_torch_the_first_use_says_what_to_install():
    code = "import sys; sys.modules['torch'] = None\nimport pointnet2_ext\npointnet2_ext.kernel_for('cpu')"
    answer = run_python(code)
    assert answer.returncode != 0
    assert "pointnet2_ext.kernel_for needs torch, which is not installed here" in answer.stderr
    assert 'pip install ".[server]"' in answer.stderr


@pytest.mark.skipif(pointnet2_ext.kernel_for("cpu") == "reference", reason="no compiled kernels here")
@pytest.mark.parametrize("arguments", [(torch.zeros(1, 5, 2), 1), (torch.zeros(1, 5, 3), 0), (torch.zeros(1, 5, 3), 6)])
def test_the_compiled_op_called_directly_refuses_bad_input(arguments):
    with pytest.raises(RuntimeError, match="must be"):
        torch.ops.pointnet2_ext.furthest_point_sample(*arguments)


@pytest.mark.skipif(pointnet2_ext.kernel_for("cpu") == "reference", reason="no compiled kernels here")
@pytest.mark.skipif(
    "backend: OpenMP" not in torch.__config__.parallel_info(), reason="torch's threads are not OpenMP's"
)
def test_the_compiled_library_starts_threads_and_brings_no_openmp_of_its_own():
    library = (PACKAGE / "_kernels_cpu.so").read_bytes()
    assert b"GOMP_parallel" in library  # at::parallel_for compiled without OpenMP uses one thread, in silence
    assert b"libgomp.so" not in library


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the operators were tested on the CPU only")
def test_the_operators_were_tested_on_cuda_too(all_devices):
    assert "cuda" in all_devices
