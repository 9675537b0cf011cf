"""Large messages that go beside their job's file instead of through Mosec."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.jobs import INLINE_BYTES, GivenUp, put_beside, take


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job's file."""
    path = tmp_path / "job"
    path.write_bytes(b"job")
    return path


def test_a_large_message_is_taken_once(job: Path) -> None:
    message = bytes(range(256)) * (INLINE_BYTES // 256)
    path = put_beside(str(job), message)
    assert path is not None
    assert Path(path).parent == job.parent
    assert take(path) == message
    assert list(job.parent.iterdir()) == [job]
    with pytest.raises(GivenUp):
        take(path)


def test_the_same_part_twice_gives_two_files(job: Path) -> None:
    assert len({put_beside(str(job), bytes(INLINE_BYTES)) for _ in range(2)}) == 2


def test_beside_a_job_that_was_given_up_nothing_is_left(job: Path) -> None:
    job.unlink()
    assert put_beside(str(job), bytes(INLINE_BYTES)) is None
    assert list(job.parent.iterdir()) == []


def test_what_is_small_or_has_no_job_file_or_no_room_travels_inside(job: Path) -> None:
    assert put_beside(str(job), bytes(INLINE_BYTES - 1)) is None
    assert put_beside(None, bytes(INLINE_BYTES)) is None
    assert put_beside(str(job.parent / "nowhere" / "job"), bytes(INLINE_BYTES)) is None
    assert list(job.parent.iterdir()) == [job]
