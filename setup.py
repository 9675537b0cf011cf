"""Builds the compiled kernels where torch and a compiler are there; everything else: pyproject.toml.

Two packages have some: `posekit.geometric` and `pointnet2_ext`. Without them everything installs all the same and the
torch references answer. That is said here (pip shows it with `-v`), in a log line at the first use, and by the
`kernel_for` of each. `POINTNET2_EXT_REQUIRE=1` makes it an error.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
PACKAGES = ["posekit.geometric", "pointnet2_ext"]
# No fused multiply-add: the bits of pointnet2_ext's reference, so that near-ties fall the same way, and the same on
# every processor. Roots that set no errno, and comparisons that raise no signal, can be done several at once.
FLAGS = ["-O3", "-g0", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
REQUIRED = os.environ.get("POINTNET2_EXT_REQUIRE") == "1"


def say_left_out(why: str) -> None:
    """One line that tells that the kernels are not built; an error where they are required."""
    if REQUIRED:
        raise SystemExit(f"{', '.join(PACKAGES)}: compiled kernels are required and cannot be built: {why}")
    print(
        f"{', '.join(PACKAGES)}: compiled kernels are NOT built, the torch reference answers: {why}",
        file=sys.stderr,
        flush=True,
    )


def sources(package: str, ending: str) -> list[str]:
    """The C++ files of a package, relative to this one."""
    folder = ROOT / package.replace(".", "/") / "csrc"
    return sorted(str(path.relative_to(ROOT)) for path in folder.glob(f"*{ending}"))


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

    extensions = [
        CppExtension(
            f"{package}._kernels_cpu",
            sources(package, ".cpp"),
            depends=sources(package, ".h"),
            extra_compile_args=FLAGS,
            optional=True,
        )
        for package in PACKAGES
    ]
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": BuildKernels.with_options(no_python_abi_suffix=True)},
    }


setup(**kernels())
