"""Missing or unloadable kernels are logged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from posekit.compiled import load_kernels


def test_a_missing_library_and_one_that_does_not_load_are_heard_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "_kernels_cpu.so"
    with caplog.at_level(logging.WARNING):
        assert not load_kernels("posekit.somewhere", path)
        path.write_bytes(b"not a library")
        assert not load_kernels("posekit.somewhere", path)
    assert "posekit.somewhere has no compiled kernels: the slower torch reference answers" in caplog.text
    assert "_kernels_cpu.so of posekit.somewhere does not load with torch" in caplog.text
    assert caplog.text.count("--no-build-isolation") == 2
