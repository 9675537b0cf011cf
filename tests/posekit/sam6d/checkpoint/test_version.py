"""The version of stored models: different for other weights and for another number of views."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.network import generated_weights
from posekit.errors import BrokenCheckpoint
from posekit.sam6d import VERSION
from posekit.sam6d.checkpoint import manifest
from posekit.sam6d.checkpoint.version import sha256_of, version_of


def weights_file(folder: Path, content: bytes = b"some weights") -> Path:
    path = folder / "some.safetensors"
    path.write_bytes(content)
    return path


def entry_of(path: Path, sha256: str) -> manifest.WeightsEntry:
    return manifest.WeightsEntry(
        name=path.name,
        engine="sam6d",
        source="",
        source_sha256="",
        sha256=sha256,
        bytes=path.stat().st_size,
        licence="",
    )


def test_a_version_tells_the_weights_and_a_number_of_views_that_is_not_the_published_one(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    digits = hashlib.sha256(b"some weights").hexdigest()[:8]
    assert version_of(path) == version_of(path, 42) == f"{VERSION}.{digits}"
    assert version_of(path, 8) == f"{VERSION}.{digits}.v8"


def test_weights_of_another_salt_are_of_another_version(tmp_path: Path) -> None:
    if not generated_weights.available():
        pytest.skip("the folder shared/sam6d, from which the network's weights are made up, is not here")
    make = generated_weights.module("weights").make
    found = []
    for salt in ("", "", "other"):
        save_file({"bias": torch.from_numpy(make("bias", (256,), salt))}, tmp_path / "some.safetensors")
        found.append(version_of(tmp_path / "some.safetensors"))
    assert found[0] == found[1] != found[2]


def test_what_was_recorded_at_the_import_is_believed_and_not_computed_again(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    manifest.record(path, entry_of(path, "ab" * 32))
    assert version_of(path) == f"{VERSION}.abababab"
    path.write_bytes(b"some other weights of another size")
    assert sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_an_entry_of_the_folders_manifest_counts_as_well(tmp_path: Path) -> None:
    path = weights_file(tmp_path)
    known = entry_of(path, "cd" * 32)
    row = {field: getattr(known, field) for field in known.__struct_fields__}
    (tmp_path / "manifest.json").write_text(json.dumps({"weights": [row]}))
    assert version_of(path) == f"{VERSION}.cdcdcdcd"


def test_weights_that_are_not_there_are_named_without_their_folder(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match=r"some\.safetensors cannot be read: No such file") as caught:
        version_of(tmp_path / "some.safetensors")
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(BrokenCheckpoint, match="cannot be read"):
        version_of(tmp_path)
