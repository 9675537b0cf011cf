"""Compare two answers to one question, and classify the differences.

Values that no two runs share (times, rates, ids that the server makes up) are first replaced by a mark of their kind.
All others are compared exactly, numbers bit for bit. A difference in sentences for people alone counts as words.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np

Kind = Literal["words", "different"]

#: Keys whose numbers differ from run to run.
RUN_NUMBERS: Final = frozenset(
    {
        "bytes",  # of a model's file, which stores the seconds that onboarding took
        "created",
        "created_unix",
        "detections_per_second",
        "inference_time",
        "ism_ms",
        "loading_time",
        "onboard_ms",
        "onboard_seconds",
        "seconds",
        "time",
        "timestamp",
        "uptime",
    }
)
#: Keys whose texts are sentences for people.
WORDS: Final = frozenset(
    {"degraded_reason", "description", "detail", "error", "error_message", "hint", "message", "summary", "title"}
)
#: Lists whose elements are sentences for people.
WORD_LISTS: Final = frozenset({"warnings"})
#: Response headers whose values are compared, beside the presence of all.
EXACT_HEADERS: Final = (
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-allow-origin",
    "access-control-expose-headers",
    "allow",
    "connection",
    "content-type",
    "location",
    "vary",
    "www-authenticate",
)
_OWN_ID: Final = re.compile(r"[0-9a-f]{24}")  # a request id made by the server
_NEW_KEY: Final = re.compile(r"pem_[A-Za-z0-9_-]{32}")
_SHOWN: Final = 160  # characters of a value shown in a report


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A server's answer; without one, status 0 and the reason as the body."""

    status: int
    headers: Sequence[tuple[str, str]] = ()
    body: bytes = b""

    @property
    def content_type(self) -> str:
        """Return the media type without its parameters."""
        named = {name.lower(): value for name, value in self.headers}
        return named.get("content-type", "").split(";")[0].strip().lower()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One place where two answers differ."""

    where: str
    old: str
    new: str
    kind: Kind = "different"


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How to read one side's answer: texts of that side to replace, and keys that this question does not compare."""

    own_texts: Mapping[str, str] = field(default_factory=dict)  # text that only this side uses -> its mark
    open_keys: Collection[str] = ()  # keys whose values, present or not, are not compared
    exact_keys: Collection[str] = ()  # keys of RUN_NUMBERS that are compared after all
    structure_only: bool = False  # sort the unordered parts of an OpenAPI document


ABSENT: Final = "(absent)"


# ------------------------------------------------------------------------------------------------------- whole replies


def compare_replies(old: Reply, new: Reply, old_reading: Reading, new_reading: Reading) -> list[Difference]:
    """Return every difference between two replies; a missing reply is always one."""
    for side, reply in (("old", old), ("new", new)):
        if reply.status == 0:
            other = new if side == "old" else old
            reasons = [_short(one.body.decode("utf-8", "replace")) or str(one.status) for one in (old, new)]
            both = ", and so did the other" if other.status == 0 else ""
            return [Difference(where=f"the {side} server did not answer{both}", old=reasons[0], new=reasons[1])]
    found: list[Difference] = []
    if old.status != new.status:
        found.append(Difference(where="status", old=str(old.status), new=str(new.status)))
    found += _headers(old, new, old_reading, new_reading)
    if old.content_type != new.content_type:
        return found
    texts = [_decoded(one, reading) for one, reading in ((old, old_reading), (new, new_reading))]
    return found + list(_bodies(old.content_type, *texts, reading=old_reading))


def _headers(old: Reply, new: Reply, old_reading: Reading, new_reading: Reading) -> Iterator[Difference]:
    read = []
    for reply, reading in ((old, old_reading), (new, new_reading)):
        named = {name.lower(): _own(value, reading) for name, value in reply.headers}
        read.append({name: value for name, value in named.items() if f"header {name}" not in reading.open_keys})
    before, after = read
    for name in sorted(before.keys() ^ after.keys()):
        yield Difference(where=f"header {name}", old=before.get(name, ABSENT), new=after.get(name, ABSENT))
    for name in sorted(before.keys() & after.keys()):
        marks = before[name], after[name]
        if name == "server-timing":
            marks = _timing_names(marks[0]), _timing_names(marks[1])
        elif name == "x-request-id":
            marks = _OWN_ID.sub("(own id)", marks[0]), _OWN_ID.sub("(own id)", marks[1])
        elif name == "traceparent":
            marks = _trace_form(marks[0]), _trace_form(marks[1])
        elif name not in EXACT_HEADERS:
            continue
        if marks[0] != marks[1]:
            yield Difference(where=f"header {name}", old=marks[0], new=marks[1])


def _timing_names(value: str) -> str:
    return ", ".join(sorted(part.split(";")[0].strip() for part in value.split(",")))


#: The trace named in questions, which an answer must continue.
SENT_TRACE: Final = "4bf92f3577b34da6a3ce929d0e0e4736"


def _trace_form(value: str) -> str:
    trace, flags = value.split("-")[1:2], value.split("-")[3:]
    return f"{'the one sent' if trace == [SENT_TRACE] else f'{len(value)} characters'}, {flags}"


def _decoded(reply: Reply, reading: Reading) -> Any:
    """Return the body as a tree if it is one, else as text."""
    if not reply.body:
        return None
    try:
        if reply.content_type == "application/json":
            return msgspec.json.decode(reply.body)
        if reply.content_type == "application/msgpack":
            return msgspec.msgpack.decode(reply.body)
    except msgspec.DecodeError as error:
        return f"(does not parse: {error}) {reply.body[:200]!r}"
    return _own(reply.body.decode("utf-8", "replace"), reading)


def _bodies(content_type: str, old: Any, new: Any, *, reading: Reading) -> Iterator[Difference]:
    if content_type == "text/html":
        if old != new:
            yield _words("page", old, new)
    elif content_type == "text/plain" and "# TYPE " in f"{old}":
        yield from compare_metrics(str(old), str(new))
    else:
        yield from compare_trees(old, new, reading, reading, "body")


# --------------------------------------------------------------------------------------------------------------- trees


def compare_trees(old: Any, new: Any, old_reading: Reading, new_reading: Reading, where: str) -> list[Difference]:
    """Return the differences between two trees of JSON values, without what changes from run to run."""
    before, after = (_normal(tree, one) for tree, one in ((old, old_reading), (new, new_reading)))
    found = list(_tree(before, after, where, name=""))
    if not found and not old_reading.structure_only:
        orders = [json.dumps(tree) for tree in (before, after)]  # repr() would do, but this is what clients see
        if orders[0] != orders[1]:
            found.append(_words(f"{where}: order of keys", orders[0], orders[1]))
    return found


def _normal(value: Any, reading: Reading, name: str = "", inside: str = "") -> Any:
    """Return the value with marks in place of what only this run or this side uses."""
    if isinstance(value, Mapping):
        kept = {str(key): item for key, item in value.items() if key not in reading.open_keys}
        return {_own(key, reading): _normal(item, reading, key, name) for key, item in kept.items()}
    if isinstance(value, list | tuple):
        items = [_normal(item, reading, name, inside) for item in value]
        if reading.structure_only and name in ("required", "enum", "type", "tags"):
            items.sort(key=str)
        return items
    if isinstance(value, bytes):
        return "base64:" + base64.b64encode(value).decode()
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int | float):
        of_run = name in RUN_NUMBERS or inside == "timing"
        return "(number of this run)" if of_run and name not in reading.exact_keys else value
    text = _own(str(value), reading)
    if name == "request_id":
        return _OWN_ID.sub("(own id)", text)
    return _NEW_KEY.sub("(a new key)", text)


def _own(text: str, reading: Reading) -> str:
    for own, mark in reading.own_texts.items():
        text = text.replace(own, mark)
    return text


def _tree(old: Any, new: Any, where: str, name: str) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            at = f"{where}.{key}"
            if key not in old or key not in new:
                kind: Kind = "words" if key in ("description", "summary", "title") else "different"
                sides = [_short(_shown(one[key])) if key in one else ABSENT for one in (old, new)]
                yield Difference(where=at, old=sides[0], new=sides[1], kind=kind)
            else:
                yield from _tree(old[key], new[key], at, key)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield Difference(where=f"{where}: length", old=str(len(old)), new=str(len(new)))
        for index, items in enumerate(zip(old, new, strict=False)):
            yield from _tree(*items, f"{where}[{index}]", name)
    elif type(old) is not type(new) or not _same_scalar(old, new):
        if isinstance(old, str) and isinstance(new, str) and (name in WORDS or name in WORD_LISTS):
            yield _words(where, old, new)
        else:
            before, after = _pair(_shown(old), _shown(new))
            yield Difference(where=where, old=before, new=after)


def _same_scalar(old: Any, new: Any) -> bool:
    if isinstance(old, float):
        return np.float64(old).tobytes() == np.float64(new).tobytes()
    return bool(old == new)


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | float) else json.dumps(value)


def _words(where: str, old: Any, new: Any) -> Difference:
    before, after = _pair(str(old), str(new))
    return Difference(where=where, old=before, new=after, kind="words")


def _pair(old: str, new: str) -> tuple[str, str]:
    """Return both texts, cut to the part where they differ."""
    if max(len(old), len(new)) <= _SHOWN:
        return old, new
    same = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    start = max(0, same - _SHOWN // 3)
    before, after = (("..." if start else "") + _short(text[start:]) for text in (old, new))
    return before, after


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


# ------------------------------------------------------------------------------------------------------------- metrics

_SAMPLE: Final = re.compile(r"^([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? \S+$")
_LABEL: Final = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
Series = set[tuple[str, tuple[tuple[str, str], ...]]]


@dataclass
class _Family:
    kind: str = ABSENT
    help: str = ABSENT
    series: Series = field(default_factory=set)


def compare_metrics(old: str, new: str) -> Iterator[Difference]:
    """Return the differences in families, types and series of two Prometheus pages; values are not compared.

    Mosec names its stages after classes: if only those names differ, that counts as words.
    """
    before, after = _families(old), _families(new)
    for name in sorted(before.keys() | after.keys()):
        a, b = before.get(name), after.get(name)
        where = f"metric {name}"
        if a is None or b is None:
            yield Difference(where=where, old=a.kind if a else ABSENT, new=b.kind if b else ABSENT)
            continue
        if a.kind != b.kind:
            yield Difference(where=f"{where}: type", old=a.kind, new=b.kind)
        if a.help != b.help:
            yield _words(f"{where}: help", a.help, b.help)
        if a.series != b.series:
            bare = name.startswith("mosec_") and _without(a.series, "stage") == _without(b.series, "stage")
            gone, come = (_short(", ".join(_series(one))) for one in (a.series - b.series, b.series - a.series))
            kind: Kind = "words" if bare else "different"
            yield Difference(where=f"{where}: series", old=gone or ABSENT, new=come or ABSENT, kind=kind)


def _families(text: str) -> dict[str, _Family]:
    found: dict[str, _Family] = {}
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name, _, words = line[7:].partition(" ")
            found.setdefault(name, _Family()).help = words
        elif line.startswith("# TYPE "):
            name, _, kind = line[7:].partition(" ")
            found.setdefault(name, _Family()).kind = kind
        elif match := _SAMPLE.match(line):
            labels = tuple(sorted(_LABEL.findall(match[2] or "")))
            base = re.sub(r"_(bucket|sum|count)$", "", match[1])
            family = match[1] if match[1] in found or base not in found else base
            found.setdefault(family, _Family()).series.add((match[1], labels))
    return found


def _without(series: Series, label: str) -> Series:
    return {(name, tuple(pair for pair in labels if pair[0] != label)) for name, labels in series}


def _series(series: Series) -> list[str]:
    return sorted(f"{name}{{{','.join(f'{key}={value}' for key, value in labels)}}}" for name, labels in series)


# --------------------------------------------------------------------------------------------------------------- files


def compare_folders(
    old: Path, new: Path, old_reading: Reading, new_reading: Reading, *, leave_out: Collection[str] = ()
) -> tuple[int, list[Difference]]:
    """Return the number of files in either folder, and the differences in names and, by file type, in contents.

    `leave_out`: top-level files and folders that are skipped.
    """
    names = [{name for name in _files(folder) if name.split("/")[0] not in leave_out} for folder in (old, new)]
    found = []
    for name in sorted(names[0] ^ names[1]):
        sides = ["there" if name in side else ABSENT for side in names]
        found.append(Difference(where=f"file {name}", old=sides[0], new=sides[1]))
    for name in sorted(names[0] & names[1]):
        before, after = ((folder / name).read_bytes() for folder in (old, new))
        found += compare_files(name, before, after, old_reading, new_reading)
    return len(names[0] | names[1]), found


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def compare_files(name: str, old: bytes, new: bytes, old_reading: Reading, new_reading: Reading) -> list[Difference]:
    """Return the differences in one file's content: trees, arrays and tensors by value, other files byte for byte."""
    if old == new:
        return []
    readers = {".json": _json_file, ".npz": _npz, ".safetensors": _safetensors}
    reader = readers.get(Path(name).suffix)
    try:
        if reader is not None:
            return compare_trees(reader(old), reader(new), old_reading, new_reading, f"file {name}")
    except (ValueError, KeyError, msgspec.DecodeError) as error:
        return [Difference(where=f"file {name}", old=f"does not read: {error}", new="")]
    return [Difference(where=f"file {name}", old=digest(old), new=digest(new))]


def digest(data: bytes) -> str:
    """Return a file's size in bytes and SHA-256."""
    return f"{len(data)} bytes, sha256 {hashlib.sha256(data).hexdigest()}"


def _json_file(data: bytes) -> Any:
    return msgspec.json.decode(data)


def _npz(data: bytes) -> dict[str, str]:
    with np.load(io.BytesIO(data), allow_pickle=False) as table:
        return {name: _array(table[name]) for name in sorted(table.files)}


def _array(array: np.ndarray[Any, Any]) -> str:
    return f"{array.dtype} {array.shape} {hashlib.sha256(array.tobytes()).hexdigest()} {array.ravel()[:8].tolist()}"


def _safetensors(data: bytes) -> dict[str, Any]:
    """Return names, types, shapes and digests of the tensors, and the file's metadata."""
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = msgspec.json.decode(data[8 : 8 + length])
    texts = header.pop("__metadata__", {})
    tree: dict[str, Any] = {"metadata": {key: _maybe_tree(text) for key, text in texts.items()}}
    for name, entry in sorted(header.items()):
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tree[name] = f"{entry['dtype']} {entry['shape']} {hashlib.sha256(data[start:end]).hexdigest()}"
    return tree


def _maybe_tree(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


def untouched(before: Mapping[str, str], folder: Path) -> list[Difference]:
    """Return what has changed in a folder since `digests` read it."""
    after = digests(folder)
    names: Iterable[str] = sorted(before.keys() | after.keys())
    return [
        Difference(where=f"file {name}", old=before.get(name, ABSENT), new=after.get(name, ABSENT))
        for name in names
        if before.get(name) != after.get(name)
    ]


def digests(folder: Path) -> dict[str, str]:
    """Return file -> its digest."""
    return {name: digest((folder / name).read_bytes()) for name in sorted(_files(folder))}
