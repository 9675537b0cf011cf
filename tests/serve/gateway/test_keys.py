"""API keys: shown once, stored hashed, seen at once by a running server; a broken file refuses everybody."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from serve.gateway import keys


def test_an_added_key_opens_and_any_other_does_not(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "robot", rate=5)
    ring = keys.KeyRing(path)
    assert re.fullmatch(r"pem_[A-Za-z0-9_-]{32}", key)
    record = ring.check(key)
    assert record is not None
    assert (record.name, record.rate) == ("robot", 5.0)
    assert ring.check(key[:-1]) is None
    assert ring.check("") is None
    assert ring.check("\udcff") is None


def test_the_file_holds_no_key_and_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "data" / "keys.json"
    key = keys.add(path, "robot")
    assert key not in path.read_text()
    assert key.removeprefix(keys.PREFIX) not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600


def test_without_a_file_there_are_no_keys(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = keys.KeyRing(path)
    assert not ring
    assert ring.check("pem_x") is None
    assert keys.list_keys(path) == []


def test_a_running_server_sees_adds_and_revokes(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    ring = keys.KeyRing(path)
    first = keys.add(path, "first")
    assert ring
    second = keys.add(path, "second")
    assert ring.check(first) is not None
    keys.revoke(path, "first")
    assert ring.check(first) is None
    assert ring.check(second) is not None
    assert [record.name for record in keys.list_keys(path)] == ["second"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"keys": [{"name": "x"}]}', "\xff"], ids=repr)
def test_a_broken_file_closes_the_door(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "robot")
    ring = keys.KeyRing(path)
    path.write_bytes(content.encode("latin-1"))
    for ask in (lambda: ring.check(key), lambda: bool(ring), lambda: keys.add(path, "b"), lambda: keys.KeyRing(path)):
        with pytest.raises(keys.KeysBroken, match="broken"):
            ask()


def test_a_file_that_is_a_folder_closes_the_door(tmp_path: Path) -> None:
    with pytest.raises(keys.KeysBroken, match="cannot read"):
        keys.KeyRing(tmp_path)


def test_a_ring_opens_again_when_the_file_is_mended(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key = keys.add(path, "robot")
    good = path.read_bytes()
    ring = keys.KeyRing(path)
    path.write_bytes(b"broken")
    with pytest.raises(keys.KeysBroken):
        ring.check(key)
    path.write_bytes(good)
    assert ring.check(key) is not None


def test_names_are_unique_and_plain(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    keys.add(path, "robot")
    with pytest.raises(keys.KeyNameTaken, match="already"):
        keys.add(path, "robot")
    with pytest.raises(keys.BadKeyName):
        keys.add(path, "a b\n")
    with pytest.raises(keys.BadKeyName, match="rate"):
        keys.add(path, "other", rate=0)
    with pytest.raises(keys.KeyNameUnknown, match="nobody"):
        keys.revoke(path, "nobody")


def test_adds_at_the_same_time_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    threads = [threading.Thread(target=keys.add, args=(path, f"robot-{index}")) for index in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(keys.list_keys(path)) == 12
    assert sorted(p.name for p in tmp_path.iterdir()) == ["keys.json", "keys.json.lock"]
