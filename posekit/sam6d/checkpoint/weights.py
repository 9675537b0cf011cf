"""Import, verify and load the network's weights. Nothing in a checkpoint is executed; weights are kept as safetensors.

A file may hold exactly what the network has: its names, shapes and types (see `Network.state_dict`). The records of
weight files, and the files beside them: `posekit.sam6d.checkpoint.manifest`.
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from posekit.errors import BrokenCheckpoint, StoreError
from posekit.sam6d.checkpoint import manifest
from posekit.sam6d.checkpoint.manifest import WeightsEntry
from posekit.sam6d.network.whole import Network
from posekit.store import write_atomically

SIZE_LIMIT: Final = 4 * 2**30  # bytes of a file, packed or unpacked; the released checkpoint has a tenth of that

Tell = Callable[[str], None]  # told what is being done now

#: wanted type -> types that can be converted to it
_CONVERTIBLE: Final[dict[torch.dtype, tuple[torch.dtype, ...]]] = {
    torch.float32: (torch.float16, torch.bfloat16, torch.float64),
    torch.int64: (torch.int32, torch.int16, torch.int8, torch.uint8),
}
_COUNTER: Final = "num_batches_tracked"  # of batch normalisation; unused in inference, so it may be missing
_NAMED_AT_MOST = 10  # names listed for each sort of misfit

#: Modules that no checkpoint needs: a pickle that asks for them would run code.
_RUNS_CODE = frozenset(
    {"os", "posix", "nt", "sys", "subprocess", "builtins", "shutil", "runpy", "importlib", "socket", "pty", "ctypes"}
)


class Imported(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an import."""

    path: str
    entry: WeightsEntry
    already: bool  # the same weights were already there
    notes: list[str]  # changes made to the tensors


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """The facts and the first problem of a weight file."""

    name: str
    bytes: int
    sha256: str | None  # sha256 of the bytes as they are now; None if they were not read
    entry: WeightsEntry | None
    problem: str | None  # None: no problem found


def _say_nothing(_: str) -> None:
    pass


# -------------------------------------------------------------------------------------------------------------- loading


def load_state_dict(path: Path) -> dict[str, Tensor]:
    """Load the network's tensors from a safetensors file: exactly its 462 names, shapes and types, in its order.

    The tensors are views of the mapped file: nothing is copied, and processes that load the same file share its memory.
    Do not write to them. Raises BrokenCheckpoint if the file is missing, cut short, damaged or made for another
    network.
    """
    tensors = _read_safetensors(path)
    misfits = _misfits(tensors, exact=True)
    if misfits:
        raise BrokenCheckpoint(_fits_not(path, misfits))
    return {name: tensors[name] for name in _expected()}


# ------------------------------------------------------------------------------------------------------------ importing


def import_checkpoint(
    file: Path,
    checkpoints_dir: Path,
    *,
    source: str | None = None,
    licence: str | None = None,
    force: bool = False,
    tell: Tell = _say_nothing,
) -> Imported:
    """Write the weights in `file` (.pth, .pt or .safetensors) to `checkpoints_dir`, with their record.

    Accepted are `{"model": ...}`, `{"state_dict": ...}` and the bare dict, with or without `module.` before each name,
    and floating-point tensors of any width. Everything is checked before anything is written, and nothing in the file
    is executed. Tensors that the network has but inference does not use are kept.

    Raises BrokenCheckpoint if `file` is refused, or if other weights are in the way and `force` is false; StoreError if
    the folder cannot be written.
    """
    tell("reading")
    found, notes = _read(file)
    misfits = _misfits(found, exact=False)
    if misfits:
        raise BrokenCheckpoint(_fits_not(file, misfits))
    tell("checking every number")
    tensors = _converted(found, notes)
    unusable = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if unusable:
        raise BrokenCheckpoint(f"{file.name} has infinite or undefined numbers in {_listed(unusable)}")
    tell("writing")
    data = save({name: tensor.numpy() for name, tensor in tensors.items()})
    path = checkpoints_dir / manifest.FILE_NAME
    sha256 = hashlib.sha256(data).hexdigest()
    already = path.is_file() and _sha256(path) == sha256
    if path.exists() and not already and not force:
        raise BrokenCheckpoint(f"{path.name} is there already and holds other weights; --force replaces them")
    before = manifest.entry(path) if already else None
    new = WeightsEntry(
        name=path.name,
        engine=manifest.ENGINE,
        source=source or (before.source if before else manifest.SOURCE),
        source_sha256=_sha256(file),
        sha256=sha256,
        bytes=len(data),
        licence=licence or (before.licence if before else manifest.LICENCE),
    )
    if not already:
        _replace(path, data)
    if new != before:
        manifest.record(path, new)
    return Imported(path=str(path), entry=new, already=already, notes=notes)


def _replace(path: Path, data: bytes) -> None:
    """Replace the weights. The old record goes first, so that a crash leaves no record rather than a wrong one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        manifest.forget(path)
    except OSError as error:
        raise StoreError(f"the folder of the weights cannot be written: {error.strerror}") from error
    write_atomically(path, data, "the file of the weights")


# ------------------------------------------------------------------------------------------------------------ verifying


def describe(path: Path) -> Verdict:
    """Return the record of a weight file, and check names, shapes and types against the network's.

    Reads the header only; `verify` reads the whole file.
    """
    return _judge(path, sha256=None)


def verify(path: Path) -> Verdict:
    """Read and check a weight file: bytes against the record, tensors against the network, numbers for NaN or inf."""
    try:
        sha256 = _sha256(path)
    except BrokenCheckpoint as error:
        return Verdict(name=path.name, bytes=0, sha256=None, entry=None, problem=error.detail)
    return _judge(path, sha256)


def _judge(path: Path, sha256: str | None) -> Verdict:
    """Return the first problem, tensors before bytes; check the numbers if `sha256` shows that the bytes were read."""
    recorded: list[WeightsEntry] = []
    nbytes = path.stat().st_size
    problem = None
    try:
        tensors = load_state_dict(path)
        recorded = manifest.entries(path)
        if sha256 and not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
            problem = f"{path.name} has infinite or undefined numbers"
        elif not recorded:
            problem = f"nothing is recorded of {path.name}: `pem weights import` it"
        elif any(one.bytes != nbytes or sha256 not in (None, one.sha256) for one in recorded):
            problem = f"{path.name} is not what is recorded: damaged or replaced since; import it again with --force"
    except BrokenCheckpoint as error:
        problem = error.detail
    known = recorded[0] if recorded else None
    return Verdict(name=path.name, bytes=nbytes, sha256=sha256, entry=known, problem=problem)


def _sha256(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error.strerror}") from error


# -------------------------------------------------------------------------------------------------------------- reading


def _read(file: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the unchecked content of a checkpoint file under the network's names, and notes on how it was found."""
    kind = _sniff(file)
    checkpoint: Any = _read_safetensors(file) if kind == "safetensors" else _read_pickled(file, kind)
    if not isinstance(checkpoint, Mapping):
        raise BrokenCheckpoint(f"{file.name} holds a {type(checkpoint).__name__} where tensors by name should be")
    notes = []
    for nest in ("model", "state_dict"):
        if isinstance(checkpoint.get(nest), Mapping):
            left = [str(name) for name in checkpoint if name != nest]
            notes.append(f'took what is under "{nest}"' + (f"; left out {_listed(left)}" if left else ""))
            checkpoint = checkpoint[nest]
            break
    found = {str(name): value for name, value in checkpoint.items()}
    if found and all(name.startswith("module.") for name in found):
        found = {name.removeprefix("module."): value for name, value in found.items()}
        notes.append('removed "module." before each name')
    return found, notes


def _sniff(file: Path) -> Literal["zip", "pickle", "safetensors"]:
    """Return a file's kind by its first bytes; its name proves nothing."""
    name = file.name
    if file.is_dir():
        raise BrokenCheckpoint(f"{name} is a folder: name the file in it")
    if not file.is_file():
        raise BrokenCheckpoint(f"{name} is no file")
    try:
        nbytes = file.stat().st_size
        with open(file, "rb") as opened:
            start = opened.read(64)
    except OSError as error:
        raise BrokenCheckpoint(f"{name} cannot be read: {error.strerror}") from error
    if nbytes == 0:
        raise BrokenCheckpoint(f"{name} is empty: download it again")
    if nbytes > SIZE_LIMIT:
        raise BrokenCheckpoint(f"{name} has {nbytes / 1e9:.1f} GB; a checkpoint of this network has less than one")
    if start.startswith(b"PK\x03\x04"):
        return "zip"
    if start.startswith(b"\x80"):
        return "pickle"
    if start[8:9] == b"{":
        return "safetensors"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise BrokenCheckpoint(f"{name} is a web page: a download service shows one before the file; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise BrokenCheckpoint(f"{name} only stands for a file in Git LFS: `git lfs pull` fetches that")
    raise BrokenCheckpoint(f"{name} is no checkpoint: neither what torch.save writes nor safetensors")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Return all tensors of a file, as views of its mapped pages."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise BrokenCheckpoint(
            f"there is no {path.name}: `pem weights import FILE` makes it from a checkpoint"
        ) from None
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError):
        raise BrokenCheckpoint(f"{path.name} is cut short, damaged or no safetensors file") from None
    except OSError as error:
        raise BrokenCheckpoint(f"{path.name} cannot be read: {error.strerror or 'it is no file'}") from None


def _read_pickled(file: Path, kind: Literal["zip", "pickle"]) -> Any:
    """Load what torch.save wrote, tensors only: torch builds nothing else from it, whatever the file asks for."""
    try:
        if kind == "zip":
            _look_inside(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's age and kind; the checks below report what matters
            return torch.load(file, map_location="cpu", weights_only=True, mmap=kind == "zip")
    except BrokenCheckpoint:
        raise
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise BrokenCheckpoint(_unsafe(file, asked[1]) if asked else _damaged(file)) from None
    except Exception:  # a damaged file may make the readers raise anything
        raise BrokenCheckpoint(_damaged(file)) from None


def _look_inside(file: Path) -> None:
    """Refuse, before unpacking, an archive that unpacks to more than SIZE_LIMIT or that is no checkpoint."""
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
    nbytes = sum(part.file_size for part in parts)
    if nbytes > SIZE_LIMIT:
        raise BrokenCheckpoint(
            f"{file.name} unpacks to {nbytes / 1e9:.1f} GB, more than any checkpoint of this network"
        )
    names = {part.filename.partition("/")[2] for part in parts}
    if "constants.pkl" in names:
        raise BrokenCheckpoint(f"{file.name} is a TorchScript program, no checkpoint")
    if "data.pkl" not in names:
        raise BrokenCheckpoint(f"{file.name} is an archive, but not one of torch.save: unpack it first")
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise BrokenCheckpoint(
            f"{file.name} is compressed inside, which torch.save never does: it is not as it was saved"
        )


def _damaged(file: Path) -> str:
    return f"{file.name} is cut short, damaged or no checkpoint: torch cannot read it; download it again"


def _unsafe(file: Path, asked: str) -> str:
    refused = f"{file.name} asks to load {asked}, which is code, not a tensor; it was refused and nothing was executed."
    if asked.partition(".")[0] in _RUNS_CODE:
        return f"{refused} No checkpoint needs that: the file is made to do harm. Do not open it with anything else."
    return (
        f"{refused} Only if you trust whoever made the file: on a machine with nothing to lose, take its tensors out\n"
        "    import torch\n"
        f'    checkpoint = torch.load("{file.name}", map_location="cpu", weights_only=False)\n'
        '    torch.save({"model": checkpoint["model"]}, "tensors.pth")\n'
        "and import tensors.pth."
    )


# ------------------------------------------------------------------------------------------------------------- checking


@functools.cache
def _expected() -> Mapping[str, Tensor]:
    """Return the network's own tensors by name, without their numbers."""
    with torch.device("meta"):
        return dict(Network().state_dict())


def _misfits(found: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Return a line for each sort of difference from the network; empty if all fits.

    If not `exact`, tensors that can be made to fit count as fitting.
    """
    expected = _expected()
    missing = [name for name in expected if name not in found and (exact or not name.endswith(_COUNTER))]
    left_over = [name for name in found if name not in expected]
    other = []
    for name, wanted in expected.items():
        if name in found and not _fits(found[name], wanted, exact):
            form = _form(found[name]) if _is_plain(found[name]) else "no dense tensor"
            other.append(f"{name} is {form} and should be {_form(wanted)}")
    lines = []
    if not any(name in expected for name in found):
        lines.append("none of them is in it: these are weights of something else")
    elif missing:
        lines.append(f"{len(missing)} missing: {_listed(missing)}")
    if left_over:
        lines.append(f"{len(left_over)} left over: {_listed(left_over)}")
    if other:
        lines.append(f"{len(other)} of another form: {_listed(other)}")
    return lines


def _fits(value: Any, wanted: Tensor, exact: bool) -> bool:
    types = (wanted.dtype, *(() if exact else _CONVERTIBLE[wanted.dtype]))
    return _is_plain(value) and value.shape == wanted.shape and value.dtype in types


def _is_plain(value: Any) -> bool:
    """Return True for a tensor that stores a number for each place. A file may also hold sparse, nested, empty ones."""
    return isinstance(value, Tensor) and not value.is_nested and value.layout == torch.strided and value.is_cpu


def _form(tensor: Tensor) -> str:
    """Return a tensor's type and shape for a list of misfits."""
    return f"{_short(tensor.dtype)} {tuple(tensor.shape)}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fits_not(file: Path, misfits: list[str]) -> str:
    return "\n  ".join([f"{file.name} does not fit the network, which has {len(_expected())} tensors:", *misfits])


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED_AT_MOST
    return ", ".join(names[:_NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _converted(found: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Return every tensor of the network in its own type, contiguous; add the changes made to `notes`."""
    done: Counter[str] = Counter()
    tensors = {}
    for name, wanted in _expected().items():
        value = found.get(name)
        if value is None:
            tensors[name] = torch.zeros(wanted.shape, dtype=wanted.dtype)
            done[f"named {_COUNTER} were missing and are 0 now"] += 1
            continue
        if value.dtype != wanted.dtype:
            done[f"converted from {_short(value.dtype)} to {_short(wanted.dtype)}"] += 1
        tensors[name] = value.detach().resolve_neg().to(wanted.dtype).contiguous()
    notes += [f"{count} tensors {what}" for what, count in done.items()]
    return tensors
