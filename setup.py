"""Builds the compiled kernels of pointnet2_ext where torch and a compiler are there; everything else: pyproject.toml.

Without them the package installs all the same and the torch reference answers. That is said here (pip shows it with
`-v`), in a log line at the first use, and by `pointnet2_ext.kernel_for`. `POINTNET2_EXT_REQUIRE=1` makes it an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

SOURCES = sorted(
    str(path.relative_to(Path(__file__).parent)) for path in Path(__file__).parent.glob("pointnet2_ext/csrc/*.cpp")
)
REQUIRED = os.environ.get("POINTNET2_EXT_REQUIRE") == "1"


def say_left_out(why: str) -> None:
    """One line that tells that the kernels are not built; an error where they are required."""
    if REQUIRED:
        raise SystemExit(f"pointnet2_ext: compiled kernels are required and cannot be built: {why}")
    print(
        f"pointnet2_ext: compiled kernels are NOT built, the torch reference answers: {why}",
        file=sys.stderr,
        flush=True,
    )


def kernels() -> dict[str, Any]:
    """The arguments of `setup` that build the kernels; empty where torch is not importable."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except Exception as error:  # a broken torch raises anything: the install goes on without kernels
        say_left_out(f"torch cannot be imported in this build ({error}); use pip install --no-build-isolation")
        return {}

    class BuildKernels(BuildExtension):  # type: ignore[misc]
        """Builds with torch's flags; a failed compilation leaves the kernels out and says so."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:  # no compiler, or one that fails: the reference answers
                say_left_out(f"{type(error).__name__}: {error}")

    extension = CppExtension(
        "pointnet2_ext._kernels_cpu",
        SOURCES,
        # No fused multiply-add: the same bits as the reference, so that near-ties fall the same way.
        extra_compile_args=["-O3", "-g0", "-std=c++20", "-ffp-contract=off"],
        optional=True,
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
    }


setup(**kernels())
