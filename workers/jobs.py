"""What several stages do with a job: read it, and turn an error into the failure that the gateway understands."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

import msgspec

from posekit.errors import PoseError
from workers.messages import Failure, Job

INLINE_BYTES = 64 * 1024  # smaller messages go through the socket
_ROOM = 2.0  # times its size must be free, so that the other users of /dev/shm are left some
BESIDE = "~"  # between the name of a job's file and what stands beside it: no request's id has it


class GivenUp(Exception):
    """The job's file is gone: nobody waits for the answer."""


def read_job(path: str | None, inline: bytes) -> Job:
    """The job that a part belongs to. Raises GivenUp where its file is gone."""
    try:
        encoded = Path(path).read_bytes() if path else inline
    except FileNotFoundError:
        raise GivenUp from None
    return msgspec.msgpack.decode(encoded, type=Job)


def write_large(path: Path, message: bytes) -> str | None:
    """Write a message to a file; None where it should go through the socket instead (small, or no room)."""
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
    """`write_large` beside a job's file, where it has one. `take` removes it, and so does the end of the job.

    Mosec's front keeps what a stage sent until its call is answered: for ever where the worker that held it died.
    """
    if job_path is None:
        return None
    path = write_large(Path(f"{job_path}{BESIDE}{secrets.token_hex(4)}"), message)
    if path is not None and not Path(job_path).exists():  # given up meanwhile: nobody would remove it
        Path(path).unlink(missing_ok=True)
        return None
    return path


def take(path: str) -> bytes:
    """What `put_beside` wrote, and the file is gone. Raises GivenUp where it is gone already."""
    try:
        message = Path(path).read_bytes()
        Path(path).unlink(missing_ok=True)
    except FileNotFoundError:
        raise GivenUp from None
    return message


def failure_from(error: PoseError, item_id: str) -> Failure:
    """An error that posekit raised on purpose, as it travels."""
    return Failure(part_id=item_id, code=error.code, detail=error.detail, field=error.field)
