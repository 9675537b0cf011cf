"""The names of objects: several for one, moves from one to another, and the state after a kill at any moment.

The stages behind the store are played: any bytes are a mesh, and onboarding goes on when a test lets it.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pem.contract import Health, ObjectAnswer, ObjectRequest, WireSymmetries
from posekit.engine import ObjectModel, Symmetries
from posekit.errors import StoreFull
from posekit.io.meshes import content_id
from posekit.store import ObjectStore, StoredObject
from serve import settings as serve_settings
from serve.errors import ApiError
from serve.objects.catalogue import Objects
from workers.messages import Failure, Inspected, InspectTask, Onboarded, OnboardTask

A, B, C = b"the old mug", b"the new mug", b"the newest mug"


class Depot:
    """The store of a server that can be restarted on the same folder."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder
        self.settings = serve_settings.load(environment={"PEM_DATA_DIR": str(folder)}, overrides={})
        self.store = ObjectStore(self.settings.objects_path)
        self.fails = False
        self.start()

    def start(self) -> None:
        """Start a new process: the memory of the last one is gone."""
        self.go = asyncio.Event()
        self.objects = Objects(self.settings, self, {"geometric": "1"})  # type: ignore[arg-type]
        self.objects.load()

    async def call_with_retries(self, route: str, task_id: str, data: bytes, retries: int) -> bytes:
        """Answer as the stages do."""
        if route == "/inspect":
            asked = msgspec.msgpack.decode(data, type=InspectTask)
            files = {path.name: path.read_bytes() for path in Path(asked.folder, "source").iterdir()}
            unit = "m" if asked.model_unit == "m" else "mm"
            health = Health(faces=4, watertight=True, extents_mm=(1.0, 1.0, 1.0), diameter_mm=2.0)
            return msgspec.msgpack.encode(
                Inspected(task_id=task_id, object_id=content_id(unit, files), model_unit=unit, health=health)
            )
        await self.go.wait()
        if self.fails:
            return msgspec.msgpack.encode(Failure(part_id=task_id, code="bad_data", detail="it has no surface"))
        object_id = msgspec.msgpack.decode(data, type=OnboardTask).object_id
        self.ready(object_id)
        return msgspec.msgpack.encode(
            Onboarded(task_id=task_id, object_id=object_id, symmetries=WireSymmetries(), seconds=0.1)
        )

    def ready(self, object_id: str) -> None:
        """Put the model of an object on disk."""
        made = ObjectModel(
            object_id=object_id,
            engine="geometric",
            engine_version="1",
            diameter_m=0.1,
            symmetries=Symmetries(discrete=(), continuous=()),
            arrays={"points": np.zeros((1, 3), np.float32)},
        )
        self.store.save_model(made)

    async def add(self, mesh: bytes, name: str | None = None, **more: Any) -> ObjectAnswer:
        staged = self.objects.ingest.stage()
        (staged / "source" / "upload").write_bytes(mesh)
        return (await self.objects.register(staged, "part.ply", ObjectRequest(name=name, **more)))[0]

    async def onboarded(self, added: ObjectAnswer) -> ObjectAnswer:
        """Let onboarding go on; return the object once its onboarding has ended."""
        self.go.set()
        await self.objects.onboarding.wait(added.object_id, 10)
        self.go.clear()
        return self.objects.get(added.object_id)

    async def ready_one(self, mesh: bytes, name: str | None = None) -> ObjectAnswer:
        return await self.onboarded(await self.add(mesh, name))

    def named(self) -> dict[str, list[str]]:
        """Return the names of each object, as listed."""
        return {one.object_id: one.names for one in self.objects.listing()}

    def files(self) -> dict[str, tuple[int, bytes]]:
        """Return every object's description: its inode, which changes with each write, and its content."""
        paths = self.store.root.glob("*/object.json")
        return {path.parent.name: (path.stat().st_ino, path.read_bytes()) for path in paths}


@pytest.fixture
def depot(tmp_path: Path) -> Depot:
    return Depot(tmp_path)


def refused(words: str) -> Any:
    return pytest.raises(ApiError, match=words)


def test_a_content_has_several_names_and_goes_with_the_last(depot: Depot) -> None:
    async def play() -> None:
        added = await depot.ready_one(A, "mug")
        assert (added.name, added.names) == ("mug", ["mug"])
        both = await depot.add(A, "cup")
        assert (both.name, both.names) == ("cup", ["mug", "cup"])
        assert (await depot.add(A, "mug")).names == ["cup", "mug"]  # the latest is the last
        depot.start()
        assert depot.objects.get("cup").names == ["cup", "mug"]
        depot.objects.remove("mug")
        assert depot.objects.get("cup").name == "cup"
        with refused("no object is registered as 'mug'"):
            depot.objects.get("mug")
        depot.start()
        assert depot.named() == {added.object_id: ["cup"]}
        depot.objects.remove("cup")
        assert depot.named() == depot.files() == {}
        again = await depot.ready_one(A, "mug")
        await depot.add(A, "cup")
        depot.objects.remove(again.object_id)  # by its id it goes with all of its names
        assert depot.named() == depot.files() == {}
        assert (await depot.add(B, "cup")).names == ["cup"]

    asyncio.run(play())


def test_an_unnamed_object_says_that_it_has_no_names(depot: Depot) -> None:
    answer = msgspec.to_builtins(asyncio.run(depot.add(A)))
    assert (answer["name"], answer["names"]) == (None, [])
    assert "pending_names" not in answer


def test_a_replaced_name_answers_with_the_old_content_until_the_new_one_is_ready(depot: Depot) -> None:
    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        with refused("send replace: true"):
            await depot.add(B, "mug")
        new = await depot.add(B, "mug", replace=True)
        assert (new.status, new.names, new.pending_names) == ("onboarding", [], ["mug"])
        assert depot.objects.get("mug").object_id == old.object_id
        new = await depot.onboarded(new)
        assert (new.status, new.name, new.names, new.pending_names) == ("ready", "mug", ["mug"], [])
        assert depot.objects.get("mug").object_id == new.object_id
        assert depot.objects.get(old.object_id).names == []
        depot.start()
        assert depot.named() == {old.object_id: [], new.object_id: ["mug"]}
        assert (await depot.add(A, "mug", replace=True)).names == ["mug"]  # what is ready has it at once
        assert depot.named() == {old.object_id: ["mug"], new.object_id: []}

    asyncio.run(play())


def test_a_name_stays_where_it_was_if_the_new_content_fails(depot: Depot) -> None:
    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        depot.fails = True
        new = await depot.onboarded(await depot.add(B, "mug", replace=True))
        assert (new.status, new.names, new.pending_names) == ("failed", [], [])
        told = f"it has no surface; the name 'mug' was not moved and stays with object {old.object_id[:12]}..."
        assert new.error == told
        assert depot.objects.get("mug").object_id == old.object_id
        depot.fails = False
        new = await depot.onboarded(await depot.add(B))  # the failed request is over: another does not move the name
        assert (new.status, new.error) == ("ready", None)
        assert depot.named() == {old.object_id: ["mug"], new.object_id: []}

    asyncio.run(play())


def test_replace_with_a_free_name_gives_it_at_once_and_without_a_name_is_refused(depot: Depot) -> None:
    async def play() -> None:
        assert (await depot.add(A, "mug", replace=True)).names == ["mug"]
        with refused("give the name"):
            await depot.add(B, replace=True)

    asyncio.run(play())


def test_the_last_who_asks_for_a_name_has_it(depot: Depot) -> None:
    async def play() -> None:
        await depot.ready_one(A, "mug")
        second, third = await depot.add(B, "mug", replace=True), await depot.add(C, "mug", replace=True)
        await depot.onboarded(second)
        await depot.onboarded(third)
        assert depot.objects.get(second.object_id).names == []
        assert depot.objects.get("mug").object_id == third.object_id
        waiting = await depot.add(b"one more", "mug", replace=True)
        assert (await depot.add(C, "mug", replace=True)).names == ["mug"]  # stays there, whoever waited
        assert (await depot.onboarded(waiting)).names == []

    asyncio.run(play())


def test_a_name_that_somebody_waits_for_is_not_given_to_another(depot: Depot) -> None:
    async def play() -> None:
        await depot.ready_one(A, "mug")
        new = await depot.add(B, "mug", replace=True)
        depot.objects.remove("mug")
        with refused("takes the name 'mug' as soon as it is ready"):
            await depot.add(C, "mug")
        depot.objects.remove(new.object_id)
        assert (await depot.add(C, "mug")).names == ["mug"]

    asyncio.run(play())


def test_a_restart_forgets_no_name_that_is_waited_for(depot: Depot) -> None:
    async def first() -> ObjectAnswer:
        await depot.ready_one(A, "mug")
        return await depot.add(B, "mug", replace=True)

    async def then() -> None:
        depot.start()
        assert depot.objects.get(new.object_id).pending_names == ["mug"]
        depot.go.set()
        await depot.objects.warm_up()
        assert depot.objects.get("mug").object_id == new.object_id

    new = asyncio.run(first())
    asyncio.run(then())


def test_a_kill_between_ready_and_moved_moves_the_name_at_the_start(depot: Depot) -> None:
    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        new = await depot.add(B, "mug", replace=True)
        depot.ready(new.object_id)
        depot.start()
        assert depot.named() == {old.object_id: [], new.object_id: ["mug"]}

    asyncio.run(play())


_REPLACE = ObjectStore.replace


def only_the_winner(store: ObjectStore, stored: StoredObject) -> None:
    """Write an object that is called mug; the disk is full for the one that lost this name."""
    if "mug" not in stored.names:
        raise StoreFull("the object cannot be written: the disk is full")
    _REPLACE(store, stored)


def test_a_kill_in_the_middle_of_a_move_leaves_one_owner(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "replace", only_the_winner)
            new = await depot.onboarded(await depot.add(B, "mug", replace=True))
            assert depot.named() == {old.object_id: [], new.object_id: ["mug"]}
        claims = {stored.object_id: stored.names for stored in depot.store.list()}
        assert claims == {old.object_id: ["mug"], new.object_id: ["mug"]}  # what a kill would leave
        depot.start()
        assert depot.named() == {old.object_id: [], new.object_id: ["mug"]}
        depot.objects.remove("mug")
        depot.start()
        assert depot.named() == {old.object_id: []}  # and it does not come back

    asyncio.run(play())


def test_a_name_is_removed_for_good_or_not_at_all(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loser of a name could not be written: its file would claim the name again once the winner is gone."""

    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "replace", only_the_winner)
            new = await depot.onboarded(await depot.add(B, "mug", replace=True))
            with refused("the disk is full"):
                depot.objects.remove("mug")
            assert depot.objects.get("mug").object_id == new.object_id
        depot.objects.remove("mug")
        depot.start()
        assert depot.named() == {old.object_id: []}

    asyncio.run(play())


def test_whoever_waits_is_told_to_stop_before_another_takes_the_name(
    depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(store: ObjectStore, stored: StoredObject) -> None:
        raise StoreFull("the object cannot be written: the disk is full")

    async def play() -> None:
        await depot.ready_one(A, "mug")
        waiting = await depot.add(B, "mug", replace=True)
        depot.objects.remove("mug")
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "replace", full)
            with refused("the disk is full"):
                await depot.add(C, "mug", replace=True)
        taken = await depot.add(C, "mug", replace=True)
        depot.start()
        await depot.onboarded(waiting)
        assert depot.objects.get("mug").object_id == taken.object_id

    asyncio.run(play())


def test_new_symmetries_that_could_not_be_applied_are_applied_by_the_next_request(
    depot: Depot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(store: ObjectStore, object_id: str) -> None:
        raise StoreFull("the model cannot be removed")

    half_turn = [[1.0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0, -1.0, 0, 0, 0, 0, 1.0]]

    async def play() -> None:
        await depot.ready_one(A, "mug")
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "remove_models", broken)
            with refused("cannot be removed"):
                await depot.add(A, "mug", symmetries_discrete=half_turn)
        again = await depot.add(A, "mug", symmetries_discrete=half_turn)
        assert again.status == "onboarding", "the model with the old symmetries is gone"
        assert (await depot.onboarded(again)).status == "ready"

    asyncio.run(play())


def test_a_name_that_cannot_be_written_stays_until_it_can(depot: Depot, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(store: ObjectStore, stored: StoredObject) -> None:
        raise StoreFull("the object cannot be written: the disk is full")

    async def play() -> None:
        old = await depot.ready_one(A, "mug")
        new = await depot.add(B, "mug", replace=True)
        with monkeypatch.context() as patch:
            patch.setattr(ObjectStore, "replace", full)
            answer = await depot.onboarded(new)
            assert (answer.status, answer.names, answer.pending_names) == ("ready", [], ["mug"])
            assert depot.objects.get("mug").object_id == old.object_id
        assert depot.objects.get(new.object_id).names == ["mug"]

    asyncio.run(play())


def test_objects_of_earlier_versions_are_read_and_left_alone(depot: Depot) -> None:
    async def play() -> None:
        await depot.ready_one(A, "mug")
        plain = await depot.ready_one(B, "can")
        for path in depot.store.root.glob("*/object.json"):
            before = json.loads(path.read_bytes())
            del before["awaited"], before["revision"], before["aliases"]
            path.write_text(json.dumps(before))
        files = depot.files()
        depot.start()
        depot.objects.listing()
        assert sorted(depot.named().values()) == [["can"], ["mug"]]
        assert depot.objects.get("can").status == "ready"  # without onboarding again
        assert depot.files() == files
        assert (await depot.add(B, "tin")).names == ["can", "tin"]
        assert [object_id for object_id, file in depot.files().items() if file != files[object_id]] == [plain.object_id]

    asyncio.run(play())


def test_a_name_that_clashes_by_the_unit_alone_says_so(depot: Depot) -> None:
    async def play() -> None:
        await depot.ready_one(A, "mug")
        words = 'same file in millimetres, while .* in metres; send model_unit: "mm" .* or replace: true'
        with refused(words):
            await depot.add(A, "mug", model_unit="m")
        with refused("or delete that object"):  # other bytes: another matter
            await depot.add(B, "mug", model_unit="m")
        assert (await depot.add(A, "mug", model_unit="m", replace=True)).pending_names == ["mug"]

    asyncio.run(play())
