"""The accuracy benchmark's data set: it keeps its promises, and its cache returns nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import set as accuracy_set
from benchmarks.accuracy.set import QUALITIES, AccuracySet, contact_sheet, load

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(cache: Path) -> AccuracySet:
    return load(seed=3, scenes=1, objects=5, cache=cache)


def refuse(*args: object, **options: object) -> None:
    raise AssertionError("made anew")


def same(one: AccuracySet, other: AccuracySet) -> bool:
    a, b = one.scenes[0], other.scenes[0]
    arrays = [(a.rgb, b.rgb), (a.depth_raw, b.depth_raw), (a.K, b.K)]
    arrays += [(x.T_cam_obj, y.T_cam_obj) for x, y in zip(a.instances, b.instances, strict=True)]
    arrays += [(np.array(one.masks[quality]), np.array(other.masks[quality])) for quality in QUALITIES]
    words = [[(item.shape.name, item.visibility) for item in scene.instances] for scene in (a, b)]
    return words[0] == words[1] and all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in arrays)


def test_a_set_has_what_it_promises(made: AccuracySet) -> None:
    assert len(made.shapes) == 5
    scene = made.scenes[0]
    assert 3 <= len(scene.instances) <= 6
    assert {item.shape.name for item in scene.instances} <= made.shapes.keys()
    for quality in QUALITIES:
        masks = made.masks[quality][0]
        assert len(masks) == len(scene.instances)
        assert all(mask.shape == scene.depth_raw.shape and mask.dtype == np.bool_ for mask in masks)
    for item, exact, under in zip(scene.instances, made.masks["exact"][0], made.masks["under"][0], strict=True):
        assert np.array_equal(exact, item.mask)
        assert np.count_nonzero(under) > np.count_nonzero(exact)


def test_the_cache_gives_the_same_set(cache: Path, made: AccuracySet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy_set, "make_scene", refuse)
    assert same(load(seed=3, scenes=1, objects=5, cache=cache), made)


def test_a_broken_cache_is_made_anew(
    cache: Path, made: AccuracySet, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(accuracy_set, "make_scene", refuse)
        for spoilt in (b"", b"no archive", path.read_bytes()[:-1000]):
            path.write_bytes(spoilt)
            with pytest.raises(AssertionError, match="made anew"):
                load(seed=3, scenes=1, objects=5, cache=cache)
            assert "is made anew" in capsys.readouterr().err
    assert same(load(seed=3, scenes=1, objects=5, cache=cache), made)
    assert [entry.name for entry in cache.iterdir()] == [path.name]


def test_changed_sources_make_the_set_anew(
    cache: Path, made: AccuracySet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = tmp_path / "changed.py"
    changed.write_text("# another generator\n")
    monkeypatch.setattr(accuracy_set, "SOURCES", (*accuracy_set.SOURCES[1:], str(changed)))
    monkeypatch.setattr(accuracy_set, "make_scene", refuse)
    with pytest.raises(AssertionError, match="made anew"):
        load(seed=3, scenes=1, objects=5, cache=cache)


def test_objects_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(accuracy_set, "CANDIDATES", 1)  # so that each scene is asked for twice
    real = accuracy_set.make_scene

    def remember(seed: int, shapes: list, count: int, **options: int) -> object:
        asked.extend(shape.name for shape in shapes)
        return real(seed, shapes[:1], count=1, width=32, height=24, noise=False)

    monkeypatch.setattr(accuracy_set, "make_scene", remember)
    load(seed=1, scenes=12, objects=9, cache=None)
    uses = [asked.count(name) for name in set(asked)]
    assert len(uses) == 9
    assert max(uses) - min(uses) <= 2


def test_the_contact_sheet_has_a_row_per_scene(made: AccuracySet) -> None:
    height, width = made.scenes[0].depth_raw.shape
    assert contact_sheet(made).shape == (height, 5 * width, 3)
