"""Helpers for jobs that several stages use: read a job, pass large messages as files, turn errors into failures."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from posekit.errors import PoseError
from workers.messages import Failure, Job

INLINE_BYTES = 64 * 1024  # smaller messages go through the socket
_ROOM = 2.0  # free space needed, in message sizes: other users of /dev/shm need room too
BESIDE = "~"  # separates the name of a job's file from the suffix of files beside it; no request's id contains it


class GivenUp(Exception):
    """The job's file is gone: nobody waits for the answer."""


def read_job(path: str | None, inline: bytes) -> Job:
    """Read the job that a part belongs to. Raises GivenUp if its file is gone."""
    try:
        encoded = Path(path).read_bytes() if path else inline
    except FileNotFoundError:
        raise GivenUp from None
    return msgspec.msgpack.decode(encoded, type=Job)


def write_large(path: Path, message: bytes) -> str | None:
    """Write a message to a file; return None if it should go through the socket instead (small, or no room)."""
    if len(message) < INLINE_BYTES:
        return None
    try:
        room = os.statvfs(path.parent)
        if room.f_bavail * room.f_frsize < _ROOM * len(message):
            return None
        path.write_bytes(message)
    except OSError:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    return str(path)


def put_beside(job_path: str | None, message: bytes) -> str | None:
    """Write a large message beside the job's file, if it has one. `take` removes it, and so does the end of the job.

    Mosec's front keeps what a stage sent until its call is answered: for ever if the worker that held it died.
    """
    if job_path is None:
        return None
    path = write_large(Path(f"{job_path}{BESIDE}{secrets.token_hex(4)}"), message)
    if path is not None and not Path(job_path).exists():  # given up meanwhile: nobody would remove the new file
        Path(path).unlink(missing_ok=True)
        return None
    return path


def take(path: str) -> bytes:
    """Read a file of `put_beside` and remove it. Raises GivenUp if it is gone already."""
    try:
        message = Path(path).read_bytes()
        Path(path).unlink(missing_ok=True)
    except FileNotFoundError:
        raise GivenUp from None
    return message


def failure_from(error: PoseError, item_id: str) -> Failure:
    """Convert an error that posekit raised on purpose into a message."""
    return Failure(part_id=item_id, code=error.code, detail=error.detail, field=error.field)
