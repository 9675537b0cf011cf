"""The CUDA sources on a machine without a GPU: compiled by nvcc, and run by threads of the CPU."""

from __future__ import annotations

import ast
import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pointnet2_ext import reference

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "pointnet2_ext/csrc"
SOURCES = sorted([*ROOT.glob("*/csrc/*.cu"), *ROOT.glob("posekit/*/csrc/*.cu")])
TORCH = Path(torch.__file__).parent / "include"
ARCHITECTURES = ["sm_80", "sm_90"]
# One file of torch's CUDA headers is made by its build; builds for the CPU bring the others, and lack this one.
MADE_BY_THE_BUILD = "c10/cuda/impl/cuda_cmake_macros.h"
ON_THREADS = Path(__file__).with_name("cuda_on_threads.cpp")


@pytest.fixture
def nvcc(tmp_path):
    """`nvcc(source, *options)`: compile with the flags of setup.py, in a folder of its own; the words of nvcc."""
    program = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if program is None:
        pytest.skip("no nvcc here: the CUDA sources were not compiled")
    (flags,) = re.findall(r"^CUDA_FLAGS = (.*)", (ROOT / "setup.py").read_text(), re.MULTILINE)

    def compile(source: Path, *options: str) -> None:
        command = [program, *ast.literal_eval(flags), "-Werror", "all-warnings", *options, str(source)]
        answer = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert answer.returncode == 0, answer.stderr

    return compile


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_device_code_compiles_without_torch_and_fuses_nothing(nvcc, tmp_path, architecture):
    kernels = ["sample_cloud<4, {}>", "sample_cloud<8, {}>", "sample_step<{}>", "query<{}>"]
    used = [f"(void*)pointnet2_ext::{kernel.format(type_)}" for kernel in kernels for type_ in ("float", "double")]
    source = tmp_path / "kernels.cu"
    includes = "".join(f'#include "{path}"\n' for path in sorted(CSRC.glob("*.cuh")))
    source.write_text(f"{includes}void* kernels[] = {{{', '.join(used)}}};\n")
    nvcc(source, f"-arch={architecture}", "-cubin")
    nvcc(source, f"-arch={architecture}", "-ptx")
    instructions = (tmp_path / "kernels.ptx").read_text()
    assert re.search(r"\bmul\.rn\.f32\b", instructions)
    assert not re.search(r"\bfma\b", instructions)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_the_glue_to_torch_compiles(nvcc, tmp_path, source):
    if not (TORCH / "c10/cuda/CUDAGuard.h").exists():
        pytest.skip("this torch brings no CUDA headers: of the CUDA sources, device code alone was compiled")
    if not (TORCH / MADE_BY_THE_BUILD).exists():
        stand_in = tmp_path / MADE_BY_THE_BUILD
        stand_in.parent.mkdir(parents=True)
        stand_in.write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    folders = [str(tmp_path), str(TORCH), str(TORCH / "torch/csrc/api/include")]
    targets = f"-gencode=arch=compute_{ARCHITECTURES[0][3:]},code=[{','.join(ARCHITECTURES)}]"
    nvcc(source, "-c", targets, *(option for folder in folders for option in ("-isystem", folder)))
    assert (tmp_path / f"{source.stem}.o").exists()


@pytest.fixture(scope="module")
def on_threads(tmp_path_factory) -> ctypes.CDLL:
    """Return the kernels as functions, run by threads of the CPU."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here: the CUDA kernels were not run")
    library = tmp_path_factory.mktemp("on_threads") / "kernels.so"
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-pthread", "-Wno-unknown-pragmas"]
    command = [compiler, *flags, f"-I{CSRC}", str(ON_THREADS), "-o", str(library)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr
    return ctypes.CDLL(str(library))


def call(function, *arguments: Tensor | int | float) -> None:
    """Call a function of the library; pass tensors as pointers."""
    given = [
        ctypes.c_void_p(value.data_ptr())
        if isinstance(value, Tensor)
        else ctypes.c_float(value)
        if isinstance(value, float)
        else ctypes.c_int64(value)
        for value in arguments
    ]
    function(*given)


def cloud(batch: int, n: int) -> Tensor:
    """Make a cloud of whole numbers, so that there are ties and repeated points."""
    generator = torch.Generator().manual_seed(n)
    return (2 * torch.randn(batch, n, 3, generator=generator)).round()


@pytest.mark.parametrize("n, count", [(1, 1), (33, 8), (513, 6), (2048, 6)])
def test_a_block_samples_a_cloud_as_the_reference_does(on_threads, n, count):
    points, picked = cloud(2, n), torch.full((2, count), -1)
    call(on_threads.sample_in_registers, points, 2, n, count, picked)
    torch.testing.assert_close(picked, reference.furthest_point_sample(points, count))


@pytest.mark.parametrize("n, parts", [(5, 2), (700, 1), (4097, 3)])
def test_blocks_that_share_a_cloud_sample_it_as_the_reference_does(on_threads, n, parts):
    points, picked = cloud(2, n), torch.full((2, 4), -1)
    call(on_threads.sample_in_steps, points, 2, n, 4, parts, picked)
    torch.testing.assert_close(picked, reference.furthest_point_sample(points, 4))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("n, count", [(1, 3), (31, 5), (32, 40), (65, 1), (513, 33)])
def test_warps_find_what_the_reference_finds(on_threads, n, count, blocks):
    points, centers = cloud(2, n), cloud(2, 9)
    found = torch.full((2, 9, count), -1)
    call(on_threads.query_balls, points, centers, 2, n, 9, 4.0, count, blocks, found)
    torch.testing.assert_close(found, reference.ball_query(points, centers, 2.0, count))
