"""Build the compiled kernels if torch and a compiler are installed. Everything else is in pyproject.toml.

A package with kernels keeps their sources in its `csrc/`: C++ in `*.cpp` becomes `_kernels_cpu.so` beside it, CUDA in
`*.cu` becomes `_kernels_cuda.so`. Without compiled kernels everything installs all the same, and the torch references
answer. This build says so (pip shows it with `-v`), a log line at the first use says so, and so does `kernel_for` of
each package.

CUDA is compiled if torch finds a GPU and a toolkit. Variables: `REQUIRE_KERNELS=1` makes anything that cannot be built
an error. `FORCE_CUDA=1` compiles CUDA even without a GPU, and makes it an error if that is impossible.
`TORCH_CUDA_ARCH_LIST` names the GPUs to compile for (torch reads it), `CUDA_HOME` the toolkit, `MAX_JOBS` the jobs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGES = sorted(".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("p*/**/csrc"))
# No fused multiply-add: results equal pointnet2_ext's reference bit for bit on every processor, and near-ties fall the
# same way. Square roots without errno and comparisons without traps can be vectorised.
# at::parallel_for needs OpenMP, else it silently uses one thread. OpenMP is compiled in but not linked: torch brings
# the library, and a second copy would ignore torch.set_num_threads.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-Wno-psabi",  # the warning concerns vectors passed by value, and ours are inlined
]
CUDA_FLAGS = ["-O3", "-std=c++20", "-fmad=false"]
REQUIRED = os.environ.get("REQUIRE_KERNELS") == "1"
CUDA_REQUIRED = os.environ.get("FORCE_CUDA") == "1"


def say_left_out(what: str, why: str, *, required: bool = REQUIRED) -> None:
    """Print a line saying that kernels are not built; exit with an error if they are required."""
    if required:
        raise SystemExit(f"{what}: compiled kernels are required and cannot be built: {why}")
    print(
        f"{what}: compiled kernels are NOT built, the torch reference answers: {why}",
        file=sys.stderr,
        flush=True,
    )


def sources(package: str, *endings: str) -> list[str]:
    """Return the files in a package's csrc/ with one of the endings, relative to the folder of setup.py."""
    folder = ROOT / package.replace(".", "/") / "csrc"
    return sorted(str(path.relative_to(ROOT)) for path in folder.glob("*") if path.suffix in endings)


def cuda_wanted() -> bool:
    """Return True if CUDA is to be compiled; exit with an error if it is forced and impossible."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if not CUDA_REQUIRED:
        return torch.cuda.is_available() and CUDA_HOME is not None
    if torch.version.cuda is None:
        raise SystemExit(
            f"FORCE_CUDA=1, but torch {torch.__version__} is a build without CUDA: install one that has it"
        )
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin/nvcc").exists():
        raise SystemExit(
            f"FORCE_CUDA=1, but there is no nvcc in {CUDA_HOME or 'PATH or /usr/local/cuda'}: install the CUDA toolkit "
            f"{torch.version.cuda} or name its folder in CUDA_HOME"
        )
    return True


def kernels() -> dict[str, Any]:
    """Return the arguments of `setup` that build the kernels; empty if torch cannot be imported."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except Exception as error:  # a broken torch may raise any error: the install goes on without kernels
        why = f"torch cannot be imported in this build ({error}); use pip install --no-build-isolation"
        say_left_out(", ".join(PACKAGES), why, required=REQUIRED or CUDA_REQUIRED)
        return {}

    class BuildKernels(BuildExtension):  # type: ignore[misc]
        """Builds each library separately, with torch's flags. Leaves out a library that fails, and says so."""

        def build_extensions(self) -> None:
            every, folder = self.extensions, Path(self.build_temp)
            for extension in every:
                self.extensions = [extension]
                self.build_temp = str(folder / extension.name)  # else x.cpp and x.cu would share one x.o
                try:
                    super().build_extensions()
                except Exception as error:  # no compiler, a failing one, or the wrong toolkit
                    extension.optional = True  # else setuptools would look for its file
                    forced = CUDA_REQUIRED and extension.name.endswith("_cuda")
                    say_left_out(extension.name, f"{type(error).__name__}: {error}", required=REQUIRED or forced)
            self.extensions, self.build_temp = every, str(folder)

    extensions = [
        CppExtension(
            f"{package}._kernels_cpu",
            sources(package, ".cpp"),
            depends=sources(package, ".h"),
            extra_compile_args=FLAGS,
        )
        for package in PACKAGES
        if sources(package, ".cpp")
    ]
    if cuda_wanted():
        extensions += [
            CUDAExtension(
                f"{package}._kernels_cuda",
                sources(package, ".cu"),
                depends=sources(package, ".h", ".cuh"),
                extra_compile_args={"cxx": FLAGS, "nvcc": CUDA_FLAGS},
            )
            for package in PACKAGES
            if sources(package, ".cu")
        ]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
    }


setup(**kernels())
