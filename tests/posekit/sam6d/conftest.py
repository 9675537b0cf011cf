"""Run all tests here in the network's own setting, and some of them also without its compiled kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from posekit.sam6d import kernels


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["compiled", "reference"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run the test twice: with the compiled kernels, and without them, as if none were built."""
    wanted: str = request.param
    if wanted == "compiled" and kernels.kernel_for("cpu") == "reference":
        pytest.skip("no compiled kernels here")
    monkeypatch.setattr(kernels, "_compiled", wanted == "compiled")
    return wanted
