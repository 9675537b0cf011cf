"""Two point-cloud operators, furthest-point sampling and ball query, as torch ops with a plain-torch reference.

Importing this package is cheap and needs no torch; the first use of an operator imports it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pointnet2_ext.ops import ball_query, furthest_point_sample, kernel_for, kernels

__all__ = ["ball_query", "furthest_point_sample", "kernel_for", "kernels"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from pointnet2_ext import ops
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise ImportError(
            f"pointnet2_ext.{name} needs torch, which is not installed here; "
            'install the server part in the project folder with: pip install ".[server]"'
        ) from error
    return getattr(ops, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
