"""API keys: a small JSON file of hashes. A key is shown once, when it is made, and never stored.

A key is 192 random bits, so that inverting its plain SHA-256 is as hard as guessing it: no salt is needed. A running
server reads the file again when it changes. While the file cannot be read, every request that needs a key is refused.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

PREFIX = "pem_"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeyFileError(Exception):
    """Base of the errors with keys; the message tells the user what to do."""


class KeysBroken(KeyFileError):
    """The file of keys exists but cannot be used: nobody is let in until it can."""


class KeyNameTaken(KeyFileError):
    """A key of this name exists already."""


class KeyNameUnknown(KeyFileError):
    """No key has this name."""


class BadKeyName(KeyFileError):
    """A name or rate that cannot be stored."""


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The stored record of a key."""

    name: str
    sha256: str  # of the whole key, hexadecimal
    created: float  # unix seconds
    rate: float | None = None  # requests per second; None = unlimited


class _File(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    keys: list[KeyRecord]


def add(path: Path, name: str, rate: float | None = None) -> str:
    """Make a key and return it: it is shown only this once. `rate`: requests per second, None = unlimited.

    Raises KeyNameTaken, BadKeyName, and KeysBroken if the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise BadKeyName(f"{name!r} is no key name: use up to 64 letters, digits, dots, dashes and underscores")
    if rate is not None and not 0 < rate < float("inf"):
        raise BadKeyName("the rate must be a number of requests per second above 0")
    key = PREFIX + secrets.token_urlsafe(24)
    record = KeyRecord(name=name, sha256=_digest(key), created=time.time(), rate=rate)
    with _locked(path):
        records = _read(path)
        if any(known.name == name for known in records):
            raise KeyNameTaken(f"there already is a key named {name!r}; revoke it first or choose another name")
        _write(path, [*records, record])
    return key


def list_keys(path: Path) -> list[KeyRecord]:
    """Return all keys, oldest first; an empty list if there is no file. Raises KeysBroken."""
    return _read(path)


def revoke(path: Path, name: str) -> None:
    """Remove a key: a running server refuses it from the next request on. Raises KeyNameUnknown, KeysBroken."""
    if not path.exists():
        raise KeyNameUnknown(f"there is no key named {name!r}; `pem keys list` shows those there are")
    with _locked(path):
        records = _read(path)
        left = [record for record in records if record.name != name]
        if len(left) == len(records):
            raise KeyNameUnknown(f"there is no key named {name!r}; `pem keys list` shows those there are")
        _write(path, left)


class KeyRing:
    """The keys of a running server, read again whenever the file changes.

    Every method raises KeysBroken while the file exists but cannot be used. Without a file there are no keys.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, int, int] | None = None  # mtime in ns, size, inode of the file that was read
        self._records: list[KeyRecord] = []
        self._reload()

    def __bool__(self) -> bool:
        """Return True if there are keys: without any the service is open."""
        self._reload()
        return bool(self._records)

    def check(self, presented: str) -> KeyRecord | None:
        """Return the record of a presented key; None if the key is unknown. Takes the same time either way."""
        self._reload()
        digest = _digest(presented)
        found = None
        for record in self._records:
            if hmac.compare_digest(record.sha256, digest):
                found = record
        return found

    def _reload(self) -> None:
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._seen, self._records = None, []
            return
        except OSError as error:
            raise KeysBroken(f"cannot read the API keys in {self._path}: {error.strerror}") from None
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if seen != self._seen:
            self._records = _read(self._path)
            self._seen = seen


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _read(path: Path) -> list[KeyRecord]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise KeysBroken(f"cannot read the API keys in {path}: {error.strerror}") from None
    try:
        return msgspec.json.decode(data, type=_File).keys
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise KeysBroken(
            f"the API keys in {path} are broken ({error}); restore the file, or remove it and make new keys"
        ) from None


def _write(path: Path, records: list[KeyRecord]) -> None:
    """Write the file whole or not at all, readable by its owner alone."""
    data = msgspec.json.format(msgspec.json.encode(_File(keys=records))) + b"\n"
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise KeysBroken(f"cannot write the API keys to {path}: {error.strerror}") from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Admit one writer at a time, by a lock file beside the keys."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise KeysBroken(f"cannot write beside the API keys in {path}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
