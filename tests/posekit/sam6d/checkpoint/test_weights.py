"""Checkpoints as torch.save and safetensors write them: fitting ones are kept, all others refused in words."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posekit.errors import BrokenCheckpoint, StoreFull
from posekit.sam6d.checkpoint import manifest, weights

ROOT = Path(__file__).parents[4]
STATE_DICT = ROOT / "../shared/sam6d/state_dict.json"
Tensors = dict[str, Tensor]


def numbers(names: dict[str, Tensor]) -> Tensors:
    """Return tensors of these shapes and types, all different; their numbers are exact in every float type."""
    return {
        name: torch.full(wanted.shape, index % 256, dtype=wanted.dtype)
        for index, (name, wanted) in enumerate(names.items())
    }


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Tensors:
    """Return weights with only the small tensors of the real network, so that its files are small."""
    expected = {name: wanted for name, wanted in weights._expected().items() if wanted.numel() <= 768}
    monkeypatch.setattr(weights, "_expected", lambda: expected)
    return numbers(expected)


@pytest.fixture
def pth(tmp_path: Path) -> Callable[..., Path]:
    def save(content: Any, **options: Any) -> Path:
        torch.save(content, tmp_path / "some.pth", **options)
        return tmp_path / "some.pth"

    return save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def refusal(file: Path, folder: Path) -> str:
    with pytest.raises(BrokenCheckpoint) as refused:
        weights.import_checkpoint(file, folder)
    assert not folder.exists(), "something was written"
    return refused.value.detail


# -------------------------------------------------------------------------------------------------------- the real size


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Import a checkpoint of full size, in float16, with `module.`, nested as by its trainer; return the folder."""
    place = tmp_path_factory.mktemp("real")
    model = {f"module.{name}": value for name, value in numbers(dict(weights._expected())).items()}
    half = {name: value.half() for name, value in model.items() if not name.endswith("num_batches_tracked")}
    torch.save({"meta": {"iter": 3, "time": "now"}, "model": half, "optimizer": {"state": {}}}, place / "released.pth")
    done = weights.import_checkpoint(place / "released.pth", place / "checkpoints")
    (place / "released.pth").unlink()
    assert done.notes == [
        'took what is under "model"; left out meta, optimizer',
        'removed "module." before each name',
        "456 tensors converted from float16 to float32",
        "6 tensors named num_batches_tracked were missing and are 0 now",
    ]
    yield place / "checkpoints"
    shutil.rmtree(place)  # pytest would keep the 432 MB of the last three runs


def test_a_whole_checkpoint_becomes_the_networks_state_dict(real: Path) -> None:
    loaded = weights.load_state_dict(real / manifest.FILE_NAME)
    expected = numbers(dict(weights._expected()))
    assert list(loaded) == list(expected)
    for name, wanted in expected.items():
        assert loaded[name].dtype == wanted.dtype
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(loaded[name], wanted), name


def test_loading_copies_nothing(real: Path) -> None:
    mapped = weights.load_state_dict(real / manifest.FILE_NAME)
    names = [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    assert str(real / manifest.FILE_NAME) in names
    largest = max(mapped.values(), key=lambda tensor: tensor.numel())
    start, size = largest.data_ptr(), largest.nbytes
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if "sam-6d" in line
    ]
    assert any(int(a, 16) <= start and start + size <= int(b, 16) for a, b in ranges)


def test_what_was_imported_is_verified(real: Path) -> None:
    verdict = weights.verify(real / manifest.FILE_NAME)
    assert verdict.problem is None
    assert verdict.entry is not None
    assert (verdict.sha256, verdict.bytes) == (verdict.entry.sha256, verdict.entry.bytes)
    assert verdict.entry == manifest.entry(real / manifest.FILE_NAME)


def test_the_network_has_the_names_and_shapes_of_the_release() -> None:
    if not STATE_DICT.is_file():
        pytest.skip("../shared/sam6d is not beside the project")
    shapes = json.loads(STATE_DICT.read_text())
    assert {name: list(wanted.shape) for name, wanted in weights._expected().items()} == shapes


# -------------------------------------------------------------------------------------------------------- what is taken


@pytest.mark.parametrize("nest", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
def test_each_nesting_is_read(
    small: Tensors, pth: Callable[..., Path], folder: Path, nest: str | None, prefix: str, options: dict[str, bool]
) -> None:
    model = {prefix + name: value for name, value in small.items()}
    weights.import_checkpoint(pth({nest: model} if nest else model, **options), folder)
    loaded = weights.load_state_dict(folder / manifest.FILE_NAME)
    assert loaded.keys() == small.keys()
    assert all(torch.equal(loaded[name], value) for name, value in small.items())


def test_safetensors_are_taken_as_well(small: Tensors, tmp_path: Path, folder: Path) -> None:
    save_file(small, tmp_path / "some.bin")
    weights.import_checkpoint(tmp_path / "some.bin", folder)
    assert weights.verify(folder / manifest.FILE_NAME).problem is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_become_float32(
    small: Tensors, pth: Callable[..., Path], folder: Path, dtype: torch.dtype
) -> None:
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in small.items()}
    done = weights.import_checkpoint(pth(given), folder)
    floats = sum(value.is_floating_point() for value in small.values())
    assert done.notes == [f"{floats} tensors converted from {str(dtype).removeprefix('torch.')} to float32"]
    loaded = load_file(folder / manifest.FILE_NAME)
    assert all(torch.equal(loaded[name], value) for name, value in small.items())


def test_parameters_views_and_tensors_that_share_memory_are_taken(
    small: Tensors, pth: Callable[..., Path], folder: Path
) -> None:
    one, two, three = [name for name, value in small.items() if value.shape == (256,)][:3]
    small[one] = torch.nn.Parameter(torch.arange(256.0))
    small[two] = small[three] = torch.arange(512.0)[::2]
    weights.import_checkpoint(pth(small), folder)
    loaded = weights.load_state_dict(folder / manifest.FILE_NAME)
    assert torch.equal(loaded[one], torch.arange(256.0))
    assert torch.equal(loaded[two], loaded[three])
    assert torch.equal(loaded[two], torch.arange(0, 512.0, 2))


# ------------------------------------------------------------------------------------------------- what is written down


def test_the_entry_says_where_the_weights_are_from(small: Tensors, pth: Callable[..., Path], folder: Path) -> None:
    entry = weights.import_checkpoint(pth(small), folder).entry
    assert (entry.name, entry.engine) == ("sam-6d-pem-base.safetensors", "sam6d")
    assert "JiehongLin/SAM-6D" in entry.source
    assert "unknown" in entry.licence
    assert entry.bytes == (folder / entry.name).stat().st_size
    assert json.loads((folder / "sam-6d-pem-base.json").read_text())["sha256"] == entry.sha256


def test_the_manifest_explains_every_field_of_an_entry() -> None:
    declared = json.loads((ROOT / "checkpoints/manifest.json").read_text())
    assert tuple(declared["schema"]) == manifest.WeightsEntry.__struct_fields__


def test_the_same_weights_again_change_only_what_is_said_of_them(
    small: Tensors, pth: Callable[..., Path], folder: Path
) -> None:
    first = weights.import_checkpoint(pth(small), folder, source="here")
    written = (folder / manifest.FILE_NAME).stat().st_mtime_ns
    again = weights.import_checkpoint(pth({"model": small}), folder, licence="MIT")
    assert (first.already, again.already) == (False, True)
    assert (again.entry.source, again.entry.licence) == ("here", "MIT")
    assert manifest.entry(folder / manifest.FILE_NAME) == again.entry
    assert (folder / manifest.FILE_NAME).stat().st_mtime_ns == written


def test_other_weights_are_replaced_only_where_that_is_asked_for(
    small: Tensors, pth: Callable[..., Path], folder: Path
) -> None:
    first = weights.import_checkpoint(pth(small), folder, source="here")
    other = pth({name: value + 1 for name, value in small.items()})
    with pytest.raises(BrokenCheckpoint, match="--force"):
        weights.import_checkpoint(other, folder)
    assert manifest.entry(folder / manifest.FILE_NAME) == first.entry
    second = weights.import_checkpoint(other, folder, force=True)
    assert second.entry.source == manifest.SOURCE, "what was said of other weights"
    assert weights.verify(folder / manifest.FILE_NAME).problem is None


def test_a_full_disk_leaves_nothing_behind(
    small: Tensors, pth: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StoreFull, match="the file of the weights cannot be written: the disk is full"):
        weights.import_checkpoint(pth(small), folder)
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------------------ what is refused


def test_what_does_not_fit_is_named(small: Tensors, pth: Callable[..., Path], folder: Path) -> None:
    names = [name for name in small if small[name].ndim == 1]
    lost, reshaped, counted, listed, hollow = names[:5]
    del small[lost]
    small[reshaped] = torch.zeros(3, 4)
    small[counted] = small[counted].long()
    changed: dict[str, Any] = {
        **small,
        listed: [1, 2],
        hollow: torch.zeros(256, device="meta"),
        "head.extra": torch.ones(1),
    }
    words = refusal(pth(changed), folder)
    assert f"1 missing: {lost}\n" in words
    assert "1 left over: head.extra\n" in words
    assert "4 of another form: " in words
    assert f"{reshaped} is float32 (3, 4) and should be float32 " in words
    assert f"{counted} is int64 " in words
    assert f"{listed} is no dense tensor" in words
    assert f"{hollow} is no dense tensor" in words


def test_of_many_the_first_ten_are_named_and_the_rest_counted(
    small: Tensors, pth: Callable[..., Path], folder: Path
) -> None:
    names = [name for name in small if not name.endswith("num_batches_tracked")]
    words = refusal(pth({name: small[name] for name in names[13:]}), folder)
    assert f"13 missing: {', '.join(names[:10])} and 3 more" in words


def test_weights_of_another_network_are_recognised(small: Tensors, pth: Callable[..., Path], folder: Path) -> None:
    words = refusal(pth({"model": {"encoder.weight": torch.zeros(3), 7: torch.zeros(1)}}), folder)
    assert "weights of something else" in words
    assert "2 left over: encoder.weight, 7" in words


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e300])
def test_a_number_that_is_none_in_float32_is_refused_by_its_tensors_name(
    small: Tensors, pth: Callable[..., Path], folder: Path, number: float
) -> None:
    name = next(name for name, value in small.items() if value.ndim == 1)
    small[name] = small[name].double()
    small[name][3] = number
    assert refusal(pth(small), folder) == f"some.pth has infinite or undefined numbers in {name}"


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "is empty"),
        (b"hello, these are no weights\n", "is no checkpoint"),
        (b"<!DOCTYPE html><html>Google Drive - Virus scan warning</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "Git LFS"),
        (b"\x80\x04\x95\x00", "damaged"),
        (b"PK\x03\x04 and no more", "damaged"),
        (b"\x02\0\0\0\0\0\0\0{}", "none of them is in it"),
        (b"\xff\0\0\0\0\0\0\0{}", "damaged"),
        (b'\x10\0\0\0\0\0\0\0{"x": [1, 2, 3]}', "damaged"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_files_of_other_kinds_are_told_apart(tmp_path: Path, folder: Path, content: bytes, words: str) -> None:
    (tmp_path / "some.pth").write_bytes(content)
    assert words in refusal(tmp_path / "some.pth", folder)


@pytest.mark.parametrize("content, words", [({}, "none of them is in it"), ([1], "holds a list"), ("x", "holds a str")])
def test_a_checkpoint_without_tensors_is_refused(
    pth: Callable[..., Path], folder: Path, content: Any, words: str
) -> None:
    assert words in refusal(pth(content), folder)


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    assert "is a folder" in refusal(tmp_path, tmp_path / "checkpoints")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_file_cut_short_is_refused(
    small: Tensors, pth: Callable[..., Path], folder: Path, options: dict[str, bool], share: float
) -> None:
    file = pth(small, **options)
    os.truncate(file, int(share * file.stat().st_size))
    assert refusal(file, folder)


def test_an_archive_that_is_no_checkpoint_is_told_apart(small: Tensors, tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "some.pth"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pack/sam-6d-pem-base.pth", b"\x80\x02}q\x00.")
    assert "not one of torch.save" in refusal(file, folder)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pack/data.pkl", b"\x80\x02}q\x00.")
    assert "compressed" in refusal(file, folder)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("pack/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("pack/constants.pkl", b"\x80\x02}q\x00.")
    assert "TorchScript" in refusal(file, folder)


def test_an_archive_that_would_fill_the_memory_is_not_unpacked(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "some.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("pack/data.pkl", bytes(1000))
        archive.filelist[0].file_size = 5_000_000_000  # the directory at its end is written on closing
    assert "unpacks to 5.0 GB" in refusal(file, folder)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "some.pth"
    file.write_bytes(b"PK\x03\x04")
    os.truncate(file, 5_000_000_000)
    assert "has 5.0 GB" in refusal(file, folder)


# -------------------------------------------------------------------------------------------------------- hostile files


class Hostile:
    """An object that makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "old"])
@pytest.mark.parametrize("place", ["beside", "inside", "alone"])
def test_code_in_a_file_does_not_run(
    small: Tensors, pth: Callable[..., Path], tmp_path: Path, folder: Path, options: dict[str, bool], place: str
) -> None:
    hostile = Hostile(tmp_path / "ran")
    contents = {"beside": {"model": small, "meta": hostile}, "inside": {**small, "x": hostile}, "alone": hostile}
    file = pth(contents[place], **options)
    words = refusal(file, folder)
    assert f"asks to load {os.system.__module__}.system" in words
    assert "nothing was executed" in words
    assert "torch.load(" not in words, "a hostile file must not be opened elsewhere"
    assert not (tmp_path / "ran").exists()
    torch.load(file, weights_only=False)
    assert (tmp_path / "ran").exists(), "the file would not have done anything to anybody"


def test_a_bare_pickle_with_code_does_not_run(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "some.pth").write_bytes(pickle.dumps(Hostile(tmp_path / "ran"), protocol=2))
    assert "asks to load" in refusal(tmp_path / "some.pth", folder)
    assert not (tmp_path / "ran").exists()


def test_objects_of_training_are_refused_with_the_way_to_take_the_tensors_out(
    small: Tensors, pth: Callable[..., Path], tmp_path: Path, folder: Path
) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    words = refusal(pth({"model": small, "optimizer": optimizer}), folder)
    assert "asks to load torch.optim.sgd.SGD" in words
    snippet = "\n".join(line.strip() for line in words.splitlines() if line.startswith("    "))
    subprocess.run([sys.executable, "-W", "error", "-c", snippet], cwd=tmp_path, check=True, timeout=60)
    weights.import_checkpoint(tmp_path / "tensors.pth", folder)
    assert weights.verify(folder / manifest.FILE_NAME).problem is None


# ------------------------------------------------------------------------------------------------ loading and verifying


@pytest.fixture
def kept(small: Tensors, pth: Callable[..., Path], folder: Path) -> Path:
    """Weights that were imported."""
    weights.import_checkpoint(pth(small), folder)
    return folder / manifest.FILE_NAME


@pytest.mark.parametrize("nbytes", [0, 4, 100, 5_000, -1])
def test_weights_cut_short_are_refused_before_a_page_is_missing(kept: Path, nbytes: int) -> None:
    os.truncate(kept, nbytes if nbytes >= 0 else kept.stat().st_size - 1)
    with pytest.raises(BrokenCheckpoint, match="cut short"):
        weights.load_state_dict(kept)
    assert "cut short" in (weights.verify(kept).problem or "")
    assert manifest.entry(kept) is None


def test_weights_with_another_type_are_not_loaded(kept: Path, small: Tensors) -> None:
    save_file({name: value.half() for name, value in small.items()}, kept)
    with pytest.raises(BrokenCheckpoint, match=r"is float16 .* and should be float32"):
        weights.load_state_dict(kept)


def test_weights_that_are_missing_are_said_to_be(tmp_path: Path) -> None:
    with pytest.raises(BrokenCheckpoint, match="pem weights import FILE"):
        weights.load_state_dict(tmp_path / "sam-6d-pem-base.safetensors")
    with pytest.raises(BrokenCheckpoint, match=r"cannot be read|no safetensors"):
        weights.load_state_dict(tmp_path)
    assert manifest.files(tmp_path / "nowhere") == []


def test_one_changed_bit_is_found(kept: Path) -> None:
    data = bytearray(kept.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    assert "damaged or replaced" in (weights.verify(kept).problem or "")
    assert weights.describe(kept).problem is None, "it reads no numbers"


def test_undefined_numbers_in_weights_put_there_by_hand_are_found(kept: Path, small: Tensors) -> None:
    save_file({name: value / 0 if value.is_floating_point() else value for name, value in small.items()}, kept)
    assert "infinite or undefined" in (weights.verify(kept).problem or "")


def test_weights_without_an_entry_are_not_vouched_for(kept: Path) -> None:
    kept.with_suffix(".json").unlink()
    assert "nothing is recorded" in (weights.verify(kept).problem or "")
    kept.with_suffix(".json").write_text("{")
    assert "cannot be read" in (weights.verify(kept).problem or "")
    assert manifest.entry(kept) is None


def test_weights_are_held_to_the_manifest_of_their_folder(kept: Path) -> None:
    entry = manifest.entry(kept)
    rows = [{field: getattr(entry, field) for field in manifest.WeightsEntry.__struct_fields__}]
    kept.with_suffix(".json").unlink()
    kept.with_name("manifest.json").write_text(json.dumps({"schema": {}, "weights": rows}))
    assert manifest.entry(kept) == entry
    assert weights.verify(kept).problem is None
    rows[0]["sha256"] = "0" * 64
    kept.with_name("manifest.json").write_text(json.dumps({"schema": {}, "weights": rows}))
    assert "not what is recorded" in (weights.verify(kept).problem or "")
