"""CAD objects through the real port: every form of upload, names, units, health, symmetries, restarts and kills."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import struct
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest

from pem.contract import ObjectAnswer
from posekit.io import images
from posekit.store import ObjectStore, StoredObject
from serve import settings as serve_settings
from serve.backend.mosec import Backend
from serve.backend.run_dir import RunDir
from serve.engine_choice import choose
from serve.errors import ApiError
from serve.gateway.exchange import Answer, Call
from serve.gateway.object_routes import _registered
from serve.gateway.service import Service
from serve.objects import catalogue as serve_objects
from serve.objects.catalogue import Objects
from tests.running import ANSWER_S, SMALL, START_LIMIT_S, RunningServer, paused, running, wait_until
from tests.serve.tiny import (
    FACES,
    OBJECTS,
    POSE,
    Asker,
    ascii_ply,
    one,
    ply,
    refusal,
    tetrahedron,
    tiny_question,
    tiny_scene,
)
from workers.messages import Failure


@dataclass
class Depot:
    """A server whose objects may come, go and be killed."""

    server: RunningServer
    ask: Asker

    def get(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.ask.send("GET", f"{OBJECTS}/{name}").json()
        return answer

    def all(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask.send("GET", OBJECTS).json()["objects"]
        return found

    def leftovers(self) -> list[str]:
        """Return the entries of the store that are not objects."""
        return [path.name for path in (self.server.data / "objects").iterdir() if path.name.startswith(".")]


@pytest.fixture(scope="module")
def depot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Depot]:
    """Start one server for this module; its tests run in order, and those that restart it come last."""
    one_server = RunningServer(tmp_path_factory.mktemp("depot") / "data", {**SMALL, "pose_pass_detections": 1}).start()
    try:
        with Asker(one_server.url) as client:
            yield Depot(one_server, client)
        assert one_server.stop() == 0
    finally:
        if one_server.process is not None and one_server.process.poll() is None:
            one_server.kill()


def stl(vertices: Any) -> bytes:
    corners = np.asarray(vertices, dtype="<f4")[np.array(FACES)]
    facets = [b"\0" * 12 + triangle.tobytes() + b"\0\0" for triangle in corners]
    return b"\0" * 80 + struct.pack("<I", len(facets)) + b"".join(facets)


def off(vertices: Any) -> bytes:
    lines = ["OFF", f"{len(vertices)} {len(FACES)} 0", *(" ".join(map(str, v)) for v in vertices)]
    return ("\n".join([*lines, *("3 " + " ".join(map(str, face)) for face in FACES)]) + "\n").encode()


def obj(vertices: Any, material: str | None = None) -> bytes:
    lines = [] if material is None else [f"mtllib {material}", "usemtl paint"]
    lines += [f"v {x} {y} {z}" for x, y, z in vertices] + ["vt 0 0", "vt 1 0", "vt 0 1", "vt 1 1"]
    return ("\n".join([*lines, *("f " + " ".join(f"{i + 1}/{i + 1}" for i in f) for f in FACES)]) + "\n").encode()


def glb(vertices: Any) -> bytes:
    import trimesh

    mesh = trimesh.Trimesh(np.asarray(vertices) / 1000, np.array(FACES), process=False)
    data: bytes = trimesh.Scene(mesh).export(file_type="glb")
    return data


def zipped(files: dict[str, bytes], folder: str = "") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(folder + name, content)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------- uploads


def test_an_upload_is_201_then_200_and_serves_poses_by_id_and_name(depot: Depot) -> None:
    first = depot.ask.upload(ply(), "Wedge (final) v2.PLY", name="wedge")
    answer = first.json()
    assert first.status_code == 201
    assert answer.keys() >= {"object_id", "name", "status", "progress", "model_unit", "health", "symmetries"}
    assert (answer["name"], answer["status"], answer["progress"], answer["model_unit"]) == ("wedge", "ready", 1.0, "mm")
    assert len(answer["object_id"]) == 64
    assert first.headers["Location"] == f"{OBJECTS}/{answer['object_id']}"
    extents = np.ptp(tiny_scene().instances[1].shape.mesh.vertices_m, axis=0) * 1000
    assert answer["health"]["extents_mm"] == pytest.approx(extents.tolist(), abs=1e-3)
    assert answer["health"]["faces"] == len(tiny_scene().instances[1].shape.mesh.faces)
    assert answer["health"]["watertight"] is True
    assert answer["health"]["warnings"] == []
    assert answer["health"]["diameter_mm"] == pytest.approx(128.6, abs=0.1)
    again = depot.ask.upload(ply(), "other.ply")  # its name is not forgotten
    assert again.status_code == 200
    assert again.json()["object_id"] == answer["object_id"]
    assert again.json()["name"] == "wedge"
    for name in (answer["object_id"], "wedge"):
        assert depot.get(name) == again.json()
        assert max(tiny_question().errors(1, depot.ask.poses(one(objects=..., object_id=name))[0])) < 2
    assert depot.all() == [again.json()]


def test_every_format_is_the_same_mesh_in_another_form(depot: Depot) -> None:
    corners = tetrahedron(70)
    texture = images.encode_png(np.full((4, 4, 3), (200, 40, 40), np.uint8))
    material = b"newmtl paint\nKd 1 1 1\nmap_Kd skin.png\n"
    textured = {"part.obj": obj(corners, "part.mtl"), "part.mtl": material, "skin.png": texture}
    uploads = {
        "part.ply": ascii_ply(corners),
        "part.stl": stl(corners),
        "part.off": off(corners),
        "part.obj": obj(corners),
        "part.glb": glb(corners),
        "part.zip": zipped(textured),
    }
    ids = set()
    for file_name, data in uploads.items():
        response = depot.ask.upload(data, file_name, wait=None)
        assert response.status_code == 201, (file_name, response.text)
        answer = response.json()
        health = answer["health"]
        assert (health["faces"], health["watertight"]) == (4, True), file_name
        assert health["extents_mm"] == pytest.approx([70, 56, 42], abs=1e-2), file_name
        assert health["warnings"] == [], file_name
        ids.add(answer["object_id"])
    assert len(ids) == len(uploads)
    packed = depot.ask.upload(zipped(dict(reversed(textured.items())), "folder/"), "Other.ZIP", wait=None)
    assert packed.status_code == 200, packed.text  # an object is its files, however they were packed
    assert packed.json()["object_id"] in ids
    missing = depot.ask.upload(zipped({"part.obj": textured["part.obj"]}), "bare.zip", wait=None).json()
    assert any("part.mtl" in warning for warning in missing["health"]["warnings"])
    for object_id in [*ids, missing["object_id"]]:
        assert depot.ask.send("DELETE", f"{OBJECTS}/{object_id}").status_code == 204


def test_the_format_may_be_told_where_the_files_name_does_not(depot: Depot) -> None:
    refusal(depot.ask.upload(ply(), "wedge.bin"), 422, "invalid", "file")
    refusal(depot.ask.upload(ply(), "wedge"), 422, "invalid", "file")
    for file_name in ("part.STP", "part.iges"):
        assert "without triangles" in refusal(depot.ask.upload(b"x", file_name), 422, "invalid", "file")["detail"]
    step = depot.ask.upload(b"ISO-10303-21;\nHEADER;", "part.ply")
    assert "without triangles" in refusal(step, 422, "invalid", "file")["detail"]
    told = refusal(depot.ask.upload(ply(), "wedge.bin", cad_format="step"), 422, "invalid", "cad_format")
    assert "without triangles" in told["detail"]
    assert depot.ask.upload(ply(), "wedge.bin", cad_format="ply").status_code == 200
    assert depot.leftovers() == []


def test_without_wait_the_answer_comes_at_once_and_progress_can_be_watched(depot: Depot) -> None:
    with depot.server.paused("onboard"):  # whoever waited for it would wait for ever
        answer = depot.ask.upload(ascii_ply(tetrahedron(71)), wait=None).json()
        assert depot.get(answer["object_id"])["status"] == "onboarding"
    assert (answer["status"], answer["symmetries"]) == ("onboarding", None)
    assert 0 <= answer["progress"] < 1
    told = [answer["progress"]]

    def ready() -> bool:
        seen = depot.get(answer["object_id"])
        told.append(seen["progress"])
        return bool(seen["status"] == "ready")

    wait_until(ready, 120, "the object is ready")
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert depot.ask.send("DELETE", f"{OBJECTS}/{answer['object_id']}").status_code == 204


def test_a_pose_request_waits_for_an_onboarding_that_it_did_not_start(depot: Depot) -> None:
    with Asker(depot.ask.url) as other, ThreadPoolExecutor(1) as pool:
        with depot.server.paused("onboard"):
            assert depot.ask.upload(ply(0), wait=None, name="stepped").json()["status"] == "onboarding"
            asked = pool.submit(other.ok, one(0, objects=..., object_id="stepped"))
            with pytest.raises(TimeoutError):
                asked.result(1.0)
        response = asked.result()
    assert max(tiny_question().errors(0, response["poses"][0])) < 2
    assert response["timing"]["onboard_ms"] > 0


def test_one_onboarding_serves_all_who_ask(depot: Depot) -> None:
    tree = one(objects=..., cad=ascii_ply(tetrahedron(72)), cad_format="ply", init_poses=...)

    def send(_: int) -> Any:
        with Asker(depot.ask.url) as client:
            return client.ok(tree)["poses"]

    with ThreadPoolExecutor(5) as pool:
        rows = list(pool.map(send, range(5)))
    assert all(row == rows[0] for row in rows)
    object_id = rows[0][0]["cad_id"]
    wait_until(lambda: ready_lines(depot, object_id), ANSWER_S, "the log tells of it")
    assert len(ready_lines(depot, object_id)) == 1
    depot.ask.send("DELETE", f"{OBJECTS}/{object_id}")


def ready_lines(depot: Depot, object_id: str) -> list[str]:
    """Return the log's lines about an object's onboardings."""
    return [line for line in depot.server.lines('"object_ready"') if object_id in line]


# ------------------------------------------------------------------------------------------------- names and deletion


def test_a_name_belongs_to_one_object_until_it_is_given_up(depot: Depot) -> None:
    mesh = ascii_ply(tetrahedron(73))
    refusal(depot.ask.upload(mesh, name="wedge"), 422, "invalid", "name")
    added = depot.ask.upload(mesh, name="first", wait=None).json()
    renamed = depot.ask.upload(mesh, name="second", wait=None)
    assert (renamed.status_code, renamed.json()["name"]) == (200, "second")
    for name in ("first", "second"):  # somebody may be using the first one
        assert (depot.get(name)["object_id"], depot.get(name)["names"]) == (added["object_id"], ["first", "second"])
    refusal(depot.ask.upload(ascii_ply(tetrahedron(75)), name="first"), 422, "invalid", "name")
    assert depot.ask.send("DELETE", f"{OBJECTS}/first").status_code == 204
    refusal(depot.ask.send("GET", f"{OBJECTS}/first"), 404, "unknown_object")
    assert depot.get("second")["names"] == ["second"]
    assert depot.ask.send("DELETE", f"{OBJECTS}/second").status_code == 204
    for name in ("first", "second", added["object_id"]):
        refusal(depot.ask.send("GET", f"{OBJECTS}/{name}"), 404, "unknown_object")
        refusal(depot.ask.send("DELETE", f"{OBJECTS}/{name}"), 404, "unknown_object")
    depot.ask.refused(one(objects=..., object_id="second"), 404, "unknown_object", "object_id")


def test_a_replaced_name_moves_when_the_new_object_is_ready(depot: Depot) -> None:
    old = depot.ask.upload(ascii_ply(tetrahedron(75.1)), name="part").json()
    with depot.server.paused("onboard"):
        new = depot.ask.upload(ascii_ply(tetrahedron(75.2)), name="part", replace=True, wait=None).json()
        assert (new["status"], new["names"], new["pending_names"]) == ("onboarding", [], ["part"])
        assert depot.get("part")["object_id"] == old["object_id"]
    wait_until(lambda: depot.get(new["object_id"])["status"] == "ready", 120, "the new one is ready")
    assert depot.get("part")["object_id"] == new["object_id"]
    assert depot.get(old["object_id"])["names"] == []
    for entry in (old, new):
        assert depot.ask.send("DELETE", f"{OBJECTS}/{entry['object_id']}").status_code == 204


@pytest.mark.parametrize("name", ["", "a b", "../x", ".hidden", "a/b", "x" * 129, "f" * 64, "ä"])
def test_a_name_that_could_be_taken_for_something_else_is_422(depot: Depot, name: str) -> None:
    refusal(depot.ask.upload(ply(), name=name), 422, "invalid", "name")


def test_two_uploads_at_once_cannot_take_one_name(depot: Depot) -> None:
    def send(size: float) -> int:
        with Asker(depot.ask.url) as client:
            return client.upload(ascii_ply(tetrahedron(size)), name="contested", wait=None).status_code

    with ThreadPoolExecutor(4) as pool:
        statuses = list(pool.map(send, (74.0, 74.1, 74.2, 74.3)))
    assert sorted(statuses) == [201, 422, 422, 422]
    assert [entry["name"] for entry in depot.all()].count("contested") == 1
    assert depot.ask.send("DELETE", f"{OBJECTS}/contested").status_code == 204


def test_an_object_deleted_while_it_is_onboarded_can_be_registered_again_at_once(depot: Depot) -> None:
    mesh = ascii_ply(tetrahedron(75))
    first = depot.ask.upload(mesh, wait=None).json()
    assert depot.ask.send("DELETE", f"{OBJECTS}/{first['object_id']}").status_code == 204
    again = depot.ask.upload(mesh)
    assert again.status_code == 201
    assert again.json()["status"] == "ready"
    depot.ask.send("DELETE", f"{OBJECTS}/{first['object_id']}")


# -------------------------------------------------------------------------------------------- units, health, symmetries


def test_units_are_taken_told_or_guessed_and_are_part_of_the_identity(depot: Depot) -> None:
    in_mm = depot.get("wedge")
    told = depot.ask.upload(ply(unit="m"), model_unit="m", wait=None).json()
    guessed = depot.ask.upload(ply(unit="m"), model_unit="auto", wait=None)
    assert guessed.status_code == 200  # the same file in the same unit, once it is resolved
    assert guessed.json()["object_id"] == told["object_id"] != in_mm["object_id"]
    assert told["model_unit"] == "m"
    assert told["health"]["extents_mm"] == pytest.approx(in_mm["health"]["extents_mm"], abs=1e-2)
    fresh = depot.ask.upload(ascii_ply(tetrahedron(0.08)), model_unit="auto", wait=None).json()
    assert fresh["model_unit"] == "m"
    assert any("auto" in warning and "metres" in warning for warning in fresh["health"]["warnings"])
    millimetres = depot.ask.upload(ascii_ply(tetrahedron(80)), model_unit="auto", wait=None).json()
    assert millimetres["model_unit"] == "mm"
    for entry in (told, fresh, millimetres):
        depot.ask.send("DELETE", f"{OBJECTS}/{entry['object_id']}")


def test_health_warns_of_what_will_make_trouble(depot: Depot) -> None:
    troubles = {
        'model_unit: "m"': ascii_ply(tetrahedron(0.07)),
        'model_unit: "mm"': ascii_ply(tetrahedron(9000)),
        "watertight": ascii_ply(tetrahedron(76), FACES[:3]),
        "origin": ascii_ply(tetrahedron(77) + np.array([2000.0, 0, 0])),
        "degenerate": ascii_ply(tetrahedron(78), [*FACES, (0, 0, 1)]),
    }
    for words, data in troubles.items():
        answer = depot.ask.upload(data, wait=None).json()
        assert any(words in warning for warning in answer["health"]["warnings"]), (words, answer["health"])
        depot.ask.send("DELETE", f"{OBJECTS}/{answer['object_id']}")


HALF_TURN = [-1.0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0, 1.0]


def test_declared_symmetries_override_those_found_also_later(depot: Depot) -> None:
    mesh = ascii_ply(tetrahedron(79))
    plain = depot.ask.upload(mesh).json()
    assert plain["symmetries"] == {"symmetries_discrete": [], "symmetries_continuous": []}
    declared = depot.ask.upload(mesh, symmetries_discrete=[HALF_TURN])
    assert declared.status_code == 200
    assert declared.json()["status"] == "ready"
    assert declared.json()["symmetries"]["symmetries_discrete"] == [pytest.approx(HALF_TURN)]
    depot.ask.upload(mesh, symmetries_discrete=[HALF_TURN], wait=None)  # nothing new: nothing is done
    assert depot.get(plain["object_id"])["status"] == "ready"
    axis = {"axis": [0, 0, 2.0], "offset": [1.0, 2.0, 0]}
    depot.ask.upload(mesh, symmetries_discrete=[], symmetries_continuous=[], wait=None)
    turning = depot.ask.upload(mesh, symmetries_continuous=[axis]).json()  # while the one before is onboarded
    (found,) = turning["symmetries"]["symmetries_continuous"]
    assert found["axis"] == pytest.approx([0, 0, 1])
    assert found["offset"] == pytest.approx([1, 2, 0])
    assert turning["symmetries"]["symmetries_discrete"] == []


@pytest.mark.parametrize(
    "request_, field",
    [
        ({"symmetries_discrete": [HALF_TURN[:12]]}, "symmetries_discrete[0]"),
        ({"symmetries_discrete": [[2.0, *HALF_TURN[1:]]]}, "symmetries_discrete[0]"),
        ({"symmetries_continuous": [{"axis": [0, 0, 0], "offset": [0, 0, 0]}]}, "symmetries_continuous[0]"),
        ({"symmetries_continuous": [{"axis": [0, 0, 1]}]}, "symmetries_continuous[0].offset"),
        ({"symetries": []}, "symetries"),
        ({"model_unit": "cm"}, "model_unit"),
        ({"cad_format": "step"}, "cad_format"),
    ],
)
def test_a_wrong_request_part_is_422_with_its_path(depot: Depot, request_: dict[str, Any], field: str) -> None:
    refusal(depot.ask.upload(ply(), **request_), 422, "invalid", field)
    assert depot.leftovers() == []


# ------------------------------------------------------------------------------------------------------- wrong uploads


def test_an_upload_that_is_none_is_refused_and_leaves_nothing_behind(depot: Depot) -> None:
    def send(**content: Any) -> httpx.Response:
        return depot.ask.send("POST", OBJECTS, **content)

    refusal(send(files={"request": (None, b"{}")}), 422, "invalid", "file")
    refusal(send(files={"file": ("a.ply", ply()), "mesh": ("b.ply", b"x")}), 422, "invalid", "mesh")
    refusal(send(files={"file": ("a.ply", ply()), "request": (None, b"{")}), 400, "bad_body")
    refusal(send(files={"file": ("a.ply", ply())}, params={"wait": "long"}), 422, "invalid", "wait")
    refusal(send(files={"file": ("a.ply", ply())}, params={"wait": "-1"}), 422, "invalid", "wait")
    refusal(send(content=b"", headers={"Content-Type": "multipart/form-data; boundary=x"}), 400, "bad_body")
    assert depot.leftovers() == []


def test_an_upload_over_its_limit_is_413_and_leaves_nothing_behind(depot: Depot) -> None:
    boundary = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.ply"\r\n\r\n'
    pieces = [boundary, *[b"\0" * 2**20] * 82, b"\r\n--x--\r\n"]
    response = depot.ask.send(
        "POST", OBJECTS, content=iter(pieces), headers={"Content-Type": "multipart/form-data; boundary=x"}
    )
    refusal(response, 413, "too_large")
    assert depot.leftovers() == []


def test_an_upload_that_is_cut_off_leaves_nothing_behind(depot: Depot) -> None:
    head = (
        f"POST {OBJECTS} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.ply"\r\n\r\n'
    )
    with socket.create_connection(("127.0.0.1", depot.server.port)) as connection:
        connection.sendall(head.encode() + b"\0" * 100_000)
        wait_until(depot.leftovers, ANSWER_S, "the upload is being written")
    wait_until(lambda: not depot.leftovers(), ANSWER_S, "what was written is removed")


# -------------------------------------------------------------------------------------------------- restarts and kills


@pytest.mark.slow
def test_a_kill_in_the_middle_of_everything_loses_and_leaves_nothing(depot: Depot) -> None:
    before = {entry["object_id"] for entry in depot.all()}
    (onboarder,) = depot.server.workers("onboard")
    os.kill(onboarder.pid, signal.SIGSTOP)
    known = depot.ask.upload(ascii_ply(tetrahedron(81)), wait=None).json()  # its onboarding will be cut short
    assert known["status"] == "onboarding"
    upload = socket.create_connection(("127.0.0.1", depot.server.port))  # and so will this upload
    upload.sendall(
        f"POST {OBJECTS} HTTP/1.1\r\nHost: x\r\nContent-Length: 900000\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        '--x\r\nContent-Disposition: form-data; name="file"; filename="a.ply"\r\n\r\n123'.encode()
    )
    wait_until(depot.leftovers, ANSWER_S, "the upload is being written")
    everyone = depot.server.descendants()
    depot.server.kill()
    upload.close()
    wait_until(lambda: not any(running(pid) for pid in everyone), 30, "no process is left behind")
    folder = depot.server.data / "objects" / known["object_id"]
    assert (folder / "object.json").exists()
    assert not (folder / "geometric-2.safetensors").exists()
    depot.server.start()
    assert depot.leftovers() == []
    assert {entry["object_id"] for entry in depot.all()} == before | {known["object_id"]}
    assert depot.get(known["object_id"])["status"] == "ready"
    assert (folder / "geometric-2.safetensors").exists()


def test_objects_survive_a_restart_and_are_ready_before_the_service_is(depot: Depot) -> None:
    before = depot.all()
    assert {entry["name"] for entry in before} >= {"wedge", "stepped"}
    assert depot.server.stop() == 0
    broken = next(entry for entry in before if entry["name"] is None)
    (depot.server.data / "objects" / broken["object_id"] / "object.json").write_text("{ broken")
    depot.server.settings["storage_objects_mb"] = 1  # less than there is already
    depot.server.start(wait=False)
    refused: list[str] = []

    def ready() -> bool:
        try:
            response = depot.ask.http.get("/readyz")
        except httpx.HTTPError:
            return False
        if response.status_code == 503:
            refused.append(response.json()["error"]["code"])
            if len(refused) == 1:
                with paused(depot.server.descendants()):  # which would be ready in a moment
                    refusal(depot.ask.post(one()), 503, "not_ready")
                    refusal(depot.ask.upload(ply()), 503, "not_ready")
                    assert depot.ask.send("GET", "/livez").status_code == 200
        return response.status_code == 200

    wait_until(ready, START_LIMIT_S, "the service is ready again")
    assert set(refused) == {"not_ready"}
    before.remove(broken)  # one broken folder keeps nobody from starting
    assert '"object_broken"' in depot.server.log()
    after = depot.all()
    assert after == before
    assert max(tiny_question().errors(1, depot.ask.poses(one(objects=..., object_id="wedge"))[0])) < 2


def test_a_full_store_is_503_and_keeps_what_it_has(depot: Depot) -> None:
    before = depot.all()
    refusal(depot.ask.upload(ascii_ply(tetrahedron(82))), 503, "storage_full")
    refusal(depot.ask.post(one(objects=..., cad=ascii_ply(tetrahedron(83)), cad_format="ply")), 503, "storage_full")
    assert depot.all() == before
    assert depot.leftovers() == []
    assert depot.ask.poses(one(0, objects=..., object_id="stepped"))[0]["status"] == "ok"


# --------------------------------------------------------------------------------------------------- inside: the bound


def stored(number: int, name: str | None) -> StoredObject:
    return StoredObject(
        object_id=f"{number:064x}",
        name=name,
        cad_format="ply",
        model_unit="mm",
        files=["model.ply"],
        faces=4,
        watertight=True,
        extents_mm=(1.0, 1.0, 1.0),
        diameter_mm=2.0,
        created_unix=float(number),
    )


def test_an_objects_label_stays_when_somebody_gives_it_one_more_name(tmp_path: Path) -> None:
    settings = serve_settings.load(
        environment={"PEM_DATA_DIR": str(tmp_path), "PEM_METRICS_OBJECTS": "housing"}, overrides={}
    )
    store = ObjectStore(settings.objects_path)
    for number, name in enumerate(["housing", "bolt", None]):
        staged = store.stage()
        (staged / "source" / "model.ply").write_bytes(b"ply")
        assert store.commit(staged, stored(number, name))
    known = Objects(settings, None, {"geometric": "1"})  # type: ignore[arg-type]  # nothing here calls the backend
    known.load()
    known._update(known._known[f"{0:064x}"], "cover", None)
    assert known._known[f"{0:064x}"].stored.name == "cover"
    assert [known.label(f"{number:064x}") for number in range(4)] == ["housing", "other", "other", "other"]
    assert known.label(None) == "other"


def test_the_unnamed_leave_first_and_the_longest_unused_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = serve_settings.load(
        environment={"PEM_DATA_DIR": str(tmp_path), "PEM_STORAGE_OBJECTS_MB": "2"}, overrides={}
    )
    store = ObjectStore(settings.objects_path)
    for number, name in enumerate([None, "kept", None, None]):
        staged = store.stage()
        (staged / "source" / "model.ply").write_bytes(b"\0" * 600_000)
        assert store.commit(staged, stored(number, name))
    known = Objects(settings, None, {"geometric": "1"})  # type: ignore[arg-type]  # nothing here calls the backend
    known.load()

    def left() -> list[int]:
        return sorted(int(object_id, 16) for object_id in known._known)

    incoming = store.stage()
    with pytest.raises(ApiError, match="full"):  # all of them were in use a moment ago
        asyncio.run(known._make_room())
    now = time.time()
    monkeypatch.setattr(serve_objects.time, "time", lambda: now + 3600)
    known._known[f"{0:064x}"].last_used = now + 3000
    asyncio.run(known._make_room())
    assert left() == [0, 1, 3]
    (incoming / "source" / "upload").write_bytes(b"\0" * 1_100_000)
    asyncio.run(known._make_room())
    assert left() == [1]  # the one with a name
    assert [folder.name for folder in settings.objects_path.iterdir() if folder != incoming] == [f"{1:064x}"]


def test_an_onboarding_that_comes_to_nothing_is_not_waited_for_and_stalls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {"PEM_DATA_DIR": str(tmp_path), "PEM_SPOOL_DIR": str(tmp_path), "PEM_ENGINE": "geometric"}
    settings = serve_settings.load(environment=values)
    run_dir = RunDir(Path(settings.spool_dir))
    stages = settings.stages(run_dir=run_dir.path, devices=("cpu",), engines=("geometric",))
    service = Service(settings, Backend(stages, run_dir.path), run_dir, offer=choose(settings), device="cpu")
    store = ObjectStore(settings.objects_path)
    store.commit(store.stage(), stored(1, None))
    objects, call = (
        service.objects,
        Call.of({"type": "http", "method": "POST", "path": OBJECTS, "headers": []}, nothing),
    )
    objects.load()
    ticks = 0
    looked_at: list[int] = []  # ticks of the other task at each look at the object

    async def full(route: str, task_id: str, data: bytes, retries: int) -> bytes:
        await asyncio.sleep(0.05)
        return msgspec.msgpack.encode(Failure(part_id=task_id, code="storage_full", detail="the disk is full"))

    def look(object_id: str) -> ObjectAnswer:
        looked_at.append(ticks)
        return Objects.get(objects, object_id)

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def registered() -> tuple[ObjectAnswer, bool]:
        objects.onboarding.onboard_all(objects._known[f"{1:064x}"])
        return Objects.get(objects, f"{1:064x}"), True

    async def run() -> Answer:
        ticking = asyncio.create_task(tick())
        answer = await _registered(service, call, registered(), 1.0)
        ticking.cancel()
        return answer

    monkeypatch.setattr(service.backend, "call_with_retries", full)
    monkeypatch.setattr(objects, "get", look)
    answer = asyncio.run(run())
    run_dir.remove()
    assert (answer.status, json.loads(answer.body)["status"]) == (201, "onboarding")
    assert len(looked_at) - len(set(looked_at)) <= 1  # between all others, the other task had its turn


async def nothing() -> Any:
    raise AssertionError("nothing is read from this client")


def test_the_listing_is_a_list_of_objects_under_one_key(ask: Asker) -> None:
    listing = ask.send("GET", OBJECTS).json()
    assert listing.keys() == {"objects"}
    created = [entry["created"] for entry in listing["objects"]]
    assert created == sorted(created)
    assert json.dumps(listing)
    assert ask.send("GET", POSE).status_code == 405
