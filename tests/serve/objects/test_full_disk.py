"""A full data disk and a full /dev/shm: requests that can be answered are, the rest are 503, and nothing crashes.

The disks are small tmpfs mounts, so these tests need root; they are skipped where mounting is not permitted.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.running import SMALL, RunningServer, register, wait_until
from tests.serve.tiny import OBJECTS, Asker, ascii_ply, one, refusal, tetrahedron, tiny_question, tiny_scene
from workers.jobs import INLINE_BYTES

MB = 2**20


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """Mount a small disk at `folder`; skip the test if that is not allowed."""
    folder.mkdir(parents=True)
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("needs root to mount a small disk")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a small disk is not permitted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """Make a folder whose path leaves room for the names of Unix sockets."""
    with tempfile.TemporaryDirectory(prefix="pem-") as folder:
        yield Path(folder)


@contextlib.contextmanager
def filled(disk: Path, keep: int = 0) -> Iterator[None]:
    """Fill the disk during the block, except for `keep` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * MB)
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"\0" * 4096)
    if keep:
        os.truncate(filler, filler.stat().st_size - keep)
    try:
        yield
    finally:
        filler.unlink()


@dataclass
class OnSmallDisks:
    """A server whose data and shared memory each have a few megabytes."""

    server: RunningServer
    ask: Asker
    data: Path
    spool: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnSmallDisks]:
    root = tmp_path_factory.mktemp("disks")
    with short_folder() as short, small_disk(root / "data", 12) as data, small_disk(short / "spool", 6) as spool:
        server = RunningServer(data, {**SMALL, "spool_dir": spool, "pose_pass_detections": 1}).start()
        try:
            register(server.url, tiny_scene().instances[1].shape)
            with Asker(server.url) as client:
                yield OnSmallDisks(server, client, data, spool)
            assert server.stop() == 0
            assert list(spool.iterdir()) == []
        finally:
            if server.process is not None and server.process.poll() is None:
                server.kill()


def large(**changes: object) -> dict[str, object]:
    """Return a request that is large enough for shared memory."""
    tree = one(**changes)
    mask = tiny_scene().instances[1].mask.astype(int).tolist()
    copies = 3
    tree["detections"] = {"masks": [mask] * copies, "object_ids": ["wedge"] * copies}
    tree["init_poses"] = [tree["init_poses"][0]] * copies
    return tree


def right(rows: list[dict[str, object]]) -> bool:
    return all(max(tiny_question().errors(1, row)) < 2 for row in rows)


def test_large_requests_pass_through_shared_memory_and_leave_it_again(small: OnSmallDisks) -> None:
    assert small.server.run_dir.parent == small.spool
    assert right(small.ask.poses(large(), as_json=True))
    wait_until(lambda: not any((small.server.run_dir / "jobs").iterdir()), 30, "the request's file is gone")


def test_with_full_shared_memory_large_requests_are_answered_all_the_same(small: OnSmallDisks) -> None:
    wanted = small.ask.poses(large(), as_json=True)
    for keep in (0, 2 * INLINE_BYTES):
        with filled(small.spool, keep):
            assert small.ask.poses(large(), as_json=True) == wanted
            assert small.ask.poses(one())[0] == wanted[0]
            assert small.ask.send("GET", "/readyz").status_code == 200
    assert small.ask.poses(large(), as_json=True) == wanted


def test_a_worker_that_dies_is_replaced_even_with_full_shared_memory(small: OnSmallDisks) -> None:
    before = small.server.workers("decode")
    with filled(small.spool):
        os.kill(before[0].pid, 9)
        deadline = time.monotonic() + 90
        rows = []
        while time.monotonic() < deadline and not rows:
            response = small.ask.post(one())
            if response.status_code == 200:
                rows = response.json()["poses"]
            else:
                assert response.status_code == 503, response.text
        assert right(rows)
    wait_until(lambda: len(small.server.workers("decode")) == len(before), 90, "all decode workers are back")
    assert right(small.ask.poses(one()))


def test_with_a_full_data_disk_poses_are_answered_and_uploads_are_503(small: OnSmallDisks) -> None:
    with filled(small.data):
        assert right(small.ask.poses(one()))
        assert right(small.ask.poses(large(), as_json=True))
        refusal(small.ask.upload(b"ply\n" + b"\0" * MB), 503, "storage_full")
        refusal(small.ask.upload(ascii_ply(tetrahedron(84))), 503, "storage_full")
        fresh = one(objects=..., cad=ascii_ply(tetrahedron(84)), cad_format="ply", init_poses=...)
        refusal(small.ask.post(fresh), 503, "storage_full")
        refusal(small.ask.post(one(output_dir="results")), 503, "storage_full", "output_dir")
        assert small.ask.send("GET", OBJECTS).json()["objects"][0]["status"] == "ready"
        for path in ("/livez", "/readyz", "/api/v1/status", "/metrics"):
            assert small.ask.send("GET", path).status_code == 200
    assert [path.name for path in (small.data / "objects").iterdir() if path.name.startswith(".")] == []


def test_an_onboarding_that_finds_no_room_is_503_and_is_tried_again_later(small: OnSmallDisks) -> None:
    mesh = ascii_ply(tetrahedron(85))
    fresh = one(objects=..., cad=mesh, cad_format="ply", init_poses=...)
    with filled(small.data, keep=300_000):  # room for the mesh, none for what is made of it
        refusal(small.ask.post(fresh), 503, "storage_full")
        assert right(small.ask.poses(one()))
    (row,) = small.ask.poses(fresh)
    assert row["cad_id"]
    assert small.ask.send("DELETE", f"{OBJECTS}/{row['cad_id']}").status_code == 204


def test_once_there_is_room_again_everything_works_and_the_log_goes_on(small: OnSmallDisks) -> None:
    assert small.ask.upload(ascii_ply(tetrahedron(86))).json()["status"] == "ready"
    assert small.ask.ok(one(output_dir="results"))["output_dir_used"] == "results"
    marked = {"X-Request-Id": "after-the-flood"}
    assert small.ask.send("GET", "/api/v1/version", headers=marked).status_code == 200
    log = small.data / "logs" / "pem.log"
    wait_until(lambda: "after-the-flood" in log.read_text(errors="replace"), 30, "the log file is written again")


def test_a_server_starts_with_both_disks_full(tmp_path: Path) -> None:
    with (
        short_folder() as short,
        small_disk(tmp_path / "data", 1) as data,
        small_disk(short / "spool", 1) as spool,
        filled(data),
        filled(spool),
    ):
        server = RunningServer(data, {**SMALL, "spool_dir": spool, "pose_pass_detections": 1}).start()
        try:
            assert server.run_dir.parent != spool
            assert [path.name for path in spool.iterdir()] == ["filler"]
            with Asker(server.url) as client:
                (row,) = client.poses(one(objects={}))
                assert row["error"]["code"] == "no_cad"
                refusal(client.upload(ascii_ply(tetrahedron(87))), 503, "storage_full")
            assert server.stop() == 0
        finally:
            if server.process is not None and server.process.poll() is None:
                server.kill()
