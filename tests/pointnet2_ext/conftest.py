"""Fixtures of the operator tests: every device, and seeded clouds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def all_devices() -> list[str]:
    return DEVICES


@pytest.fixture
def with_threads() -> Iterator[Callable[[int], None]]:
    """`with_threads(N)`: torch and the kernels use N threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cloud(device: str) -> Callable[..., Tensor]:
    """`cloud(B, N)`: seeded points of a unit normal distribution on the device under test."""

    def make(batch: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + n)
        return torch.randn(batch, n, 3, generator=generator, dtype=dtype).to(device)

    return make
